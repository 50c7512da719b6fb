// The implementations of the block's stages: one for every instruction set, compiled from the same code (isa/), and the
// choice between them at run time.
#pragma once

#include <cstddef>
#include <vector>

#include "core/params.h"

namespace pfa::cpu {

struct Context;

struct Implementation {
  const char* name;
  // Null if this processor runs it, else what is missing: a static text.
  const char* (*why_not)();
  bool has_tile_products;  // of bfloat16 matrices, by AMX
  void (*layer_norm_forward)(Context&, const AttentionParams&);
  void (*layer_norm_backward)(Context&, const AttentionParams&);
  void (*narrow_x)(Context&, const AttentionParams&);
  void (*qkv_linear_forward)(Context&, const AttentionParams&);
  void (*qkv_linear_backward)(Context&, const AttentionParams&);
  void (*attention_forward)(Context&, const AttentionParams&);
  void (*attention_backward)(Context&, const AttentionParams&);
  void (*output_linear_forward)(Context&, const AttentionParams&);
  void (*output_linear_backward)(Context&, const AttentionParams&);
  void (*residual_forward)(Context&, const AttentionParams&);
  void (*residual_backward)(Context&, const AttentionParams&);
  size_t (*stage_workspace_bytes)(const Context&, const AttentionParams&, Phase);
};

// All that were compiled in, slowest first. What the compiler or the architecture has no way for is not among them.
const std::vector<const Implementation*>& compiled_implementations();

// Those of them that this processor runs, slowest first.
const std::vector<const Implementation*>& usable_implementations();

inline const Implementation& best_implementation() { return *usable_implementations().back(); }

}  // namespace pfa::cpu
