// What the blocks share: where lies what the first layer norm and the residual keep for backward, and hidden.
//
// A caller fills in the sizes, types, switches and inputs of a block's struct, then the result or its gradient and the
// gradients that it wants, gets memory and runs:
//
//   saved_bytes(p), forward_workspace_bytes(context, p, saves)    run_forward(context, p, saved, workspace)
//   saved_bytes(p), backward_workspace_bytes(context, p)          run_backward(context, p, saved, workspace)
//
// No memory needs values before. `saved` goes from forward to backward; it is null where forward is to save nothing.
//
// A device is a Context type whose namespace has the stages and stage_workspace_bytes; stages.md is their contract.
#pragma once

#include "core/arena.h"
#include "core/params.h"

namespace pfa {

inline size_t statistics_bytes(const BlockParams& p) { return p.rows * size_of(accumulator_of(p.dtype)); }

inline size_t residual_bytes(const BlockParams& p) { return p.rows * p.embed_dim * size_of(p.residual_dtype); }

// Bytes of [M, width] in the type of the products.
inline size_t activation_bytes(const BlockParams& p, int64_t width) { return p.rows * width * size_of(p.dtype); }

// Places what comes first of what is saved. The layer-normalised x is not kept: it is computed anew.
inline void place_saved_of_input(Arena& arena, BlockParams& p) {
  p.random_state = static_cast<uint64_t*>(arena.take(2 * sizeof(uint64_t)));
  p.pre_ln_mean = p.pre_layer_norm ? arena.take(statistics_bytes(p)) : nullptr;
  p.pre_ln_rstd = p.pre_layer_norm ? arena.take(statistics_bytes(p)) : nullptr;
}

// Places what comes last of what is saved.
inline void place_saved_of_residual(Arena& arena, BlockParams& p) {
  p.residual = p.final_layer_norm ? arena.take(residual_bytes(p)) : nullptr;
  p.ln_mean = p.final_layer_norm && !has_output_dropout(p) ? arena.take(statistics_bytes(p)) : nullptr;
  p.ln_rstd = p.final_layer_norm ? arena.take(statistics_bytes(p)) : nullptr;
}

// Where nothing is saved statistics are not kept, the last product goes to `out` itself, and the final layer norm runs
// there.
inline void place_without_saving(Arena& arena, BlockParams& p) {
  p.random_state = static_cast<uint64_t*>(arena.take(2 * sizeof(uint64_t)));
  p.pre_ln_mean = p.pre_ln_rstd = p.ln_mean = p.ln_rstd = p.residual = nullptr;
}

inline void place_hidden(Arena& arena, BlockParams& p) {
  p.hidden = has_own_hidden(p) ? arena.take(activation_bytes(p, p.embed_dim)) : const_cast<void*>(p.x);
}

template <class Context>
void make_hidden(Context& context, const BlockParams& p) {
  if (p.pre_layer_norm) {
    layer_norm_forward(context, p);
  } else if (has_wide_residual(p)) {
    narrow_x(context, p);
  }
}

// Places the gradient of z: where d_x will be, if that is wanted, since the other branch's gradient is added to it
// there.
inline void place_d_residual(Arena& arena, BlockParams& p, bool needs_d_linear) {
  const bool is_needed = p.d_x || (needs_d_linear && !has_own_d_linear(p));
  p.d_residual = !p.final_layer_norm ? const_cast<void*>(p.d_out)
                 : !is_needed        ? nullptr
                 : p.d_x             ? p.d_x
                                     : arena.take(residual_bytes(p));
}

// What a struct asks for, with other memory for its stages.
template <class P>
P with_workspace(P p, void* workspace) {
  p.stage_workspace = workspace;
  return p;
}

}  // namespace pfa
