// The implementations of the block's stages: one for each instruction set, all compiled from the same sources (isa/).
// The best that this processor has is chosen at run time.
#pragma once

#include <cstddef>
#include <vector>

#include "core/params.h"

namespace pfa::cpu {

struct Context;

struct Implementation {
  const char* name;
  const char* (*why_not)();  // why this processor does not run it; null if it does
  bool has_tile_products;    // of bfloat16 matrices, by AMX
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

// All that are compiled in, slowest first.
const std::vector<const Implementation*>& implementations();

// Those that this processor runs, slowest first.
const std::vector<const Implementation*>& usable_implementations();

inline const Implementation& best_implementation() { return *usable_implementations().back(); }

}  // namespace pfa::cpu
