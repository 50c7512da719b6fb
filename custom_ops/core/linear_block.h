// A linear layer with its bias and activation, forward and backward.
#pragma once

#include "core/arena.h"
#include "core/params.h"

namespace pfa {

// With an activation backward reads the product before it.
inline size_t place_saved(LinearParams& p, void* saved) {
  Arena arena(saved);
  const bool saves = p.activation != Activation::kNone;
  p.pre_activation = saves ? arena.take(p.rows * p.out_features * size_of(p.dtype)) : nullptr;
  return arena.used();
}

inline size_t saved_bytes(LinearParams p) { return place_saved(p, nullptr); }

template <class Context>
size_t forward_workspace_bytes(const Context& context, const LinearParams& p, bool) {
  return stage_workspace_bytes(context, p, Phase::kForward);
}

// Writes p.out, and what backward reads to `saved` unless that is null.
template <class Context>
void run_forward(Context& context, LinearParams p, void* saved, void* workspace) {
  if (saved) place_saved(p, saved);
  p.stage_workspace = workspace;
  linear_forward(context, p);
}

struct LinearPlan {
  LinearParams params;
  size_t workspace_bytes;
};

template <class Context>
LinearPlan plan_backward(const Context& context, LinearParams p, const void* saved, void* workspace) {
  place_saved(p, const_cast<void*>(saved));
  Arena arena(workspace);
  p.d_pre_activation = p.activation == Activation::kNone ? const_cast<void*>(p.d_out)
                                                         : arena.take(p.rows * p.out_features * size_of(p.dtype));
  p.stage_workspace = arena.take(stage_workspace_bytes(context, p, Phase::kInputBackward));
  return {p, arena.used()};
}

template <class Context>
size_t backward_workspace_bytes(const Context& context, const LinearParams& p) {
  return plan_backward(context, p, nullptr, nullptr).workspace_bytes;
}

// Writes the gradients that are asked for.
template <class Context>
void run_backward(Context& context, const LinearParams& params, const void* saved, void* workspace) {
  const LinearParams p = plan_backward(context, params, saved, workspace).params;
  if (p.activation != Activation::kNone) activation_backward(context, p);
  linear_backward(context, p);
}

}  // namespace pfa
