// The stages of the block, compiled once for every instruction set; the best that this processor has is chosen at run
// time.
#pragma once

#include <cstddef>
#include <vector>

#include "core/params.h"

namespace pfa::cpu {

struct Context;

struct Kernels {
  const char* name;
  bool (*supported)();
  bool has_tile_products;  // of bfloat16 matrices, by AMX
  void (*layer_norm_forward)(Context&, const Params&);
  void (*layer_norm_backward)(Context&, const Params&);
  void (*narrow_x)(Context&, const Params&);
  void (*qkv_linear_forward)(Context&, const Params&);
  void (*qkv_linear_backward)(Context&, const Params&);
  void (*attention_forward)(Context&, const Params&);
  void (*attention_backward)(Context&, const Params&);
  void (*output_linear_forward)(Context&, const Params&);
  void (*output_linear_backward)(Context&, const Params&);
  void (*residual_forward)(Context&, const Params&);
  void (*residual_backward)(Context&, const Params&);
  size_t (*stage_workspace_bytes)(const Context&, const Params&, Phase);
};

// Those this processor can run, slowest first.
const std::vector<Kernels>& supported_kernels();

inline const Kernels& best_kernels() { return supported_kernels().back(); }

}  // namespace pfa::cpu
