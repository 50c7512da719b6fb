// The implementations of the blocks' stages: one for every instruction set, compiled from the same code (isa/), and the
// choice between them at run time.
#pragma once

#include <cstddef>
#include <vector>

#include "core/params.h"

namespace pfa::cpu {

struct Context;

// DO(name, Params): the stages of the blocks (stages.md) that depend on the instruction set.
#define PFA_CPU_STAGES(DO)                         \
  DO(layer_norm_forward, BlockParams)              \
  DO(layer_norm_backward, BlockParams)             \
  DO(narrow_x, BlockParams)                        \
  DO(residual_forward, BlockParams)                \
  DO(residual_backward, BlockParams)               \
  DO(qkv_linear_forward, AttentionBlockParams)     \
  DO(qkv_linear_backward, AttentionBlockParams)    \
  DO(attention_forward, AttentionParams)           \
  DO(attention_backward, AttentionParams)          \
  DO(attention_weights, AttentionParams)           \
  DO(output_linear_forward, AttentionBlockParams)  \
  DO(output_linear_backward, AttentionBlockParams) \
  DO(linear1_forward, FeedForwardParams)           \
  DO(linear1_backward, FeedForwardParams)          \
  DO(linear2_forward, FeedForwardParams)           \
  DO(linear2_backward, FeedForwardParams)          \
  DO(linear_forward, LinearParams)                 \
  DO(linear_backward, LinearParams)                \
  DO(activation_backward, LinearParams)

struct Implementation {
  const char* name;
  // Null if this processor runs it, else what is missing: a static text.
  const char* (*why_not)();
  bool has_tile_products;  // of bfloat16 matrices, by AMX
#define PFA_POINTER(name, P) void (*name)(Context&, const P&);
  PFA_CPU_STAGES(PFA_POINTER)
#undef PFA_POINTER
  size_t (*attention_workspace_bytes)(const Context&, const AttentionParams&, Phase);
  size_t (*attention_block_workspace_bytes)(const Context&, const AttentionBlockParams&, Phase);
  size_t (*feed_forward_workspace_bytes)(const Context&, const FeedForwardParams&, Phase);
  size_t (*residual_norm_workspace_bytes)(const Context&, const ResidualNormParams&, Phase);
  size_t (*linear_workspace_bytes)(const Context&, const LinearParams&, Phase);
};

// All that were compiled in, slowest first. What the compiler or the architecture has no way for is not among them.
const std::vector<const Implementation*>& compiled_implementations();

// Those of them that this processor runs, slowest first.
const std::vector<const Implementation*>& usable_implementations();

inline const Implementation& best_implementation() { return *usable_implementations().back(); }

}  // namespace pfa::cpu
