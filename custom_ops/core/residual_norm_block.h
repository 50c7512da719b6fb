// Bias, dropout, residual and layer norm as a block of their own, forward and backward: the last stage of the others.
#pragma once

#include "core/block.h"

namespace pfa {

inline size_t place_saved(ResidualNormParams& p, void* saved) {
  Arena arena(saved);
  p.random_state = static_cast<uint64_t*>(arena.take(2 * sizeof(uint64_t)));
  place_saved_of_residual(arena, p);
  return arena.used();
}

inline size_t saved_bytes(ResidualNormParams p) { return place_saved(p, nullptr); }

struct ResidualNormPlan {
  ResidualNormParams params;
  size_t workspace_bytes;
};

template <class Context>
ResidualNormPlan plan_forward(const Context& context, ResidualNormParams p, bool saves, void* saved, void* workspace) {
  if (saves) place_saved(p, saved);
  Arena arena(workspace);
  if (!saves) place_without_saving(arena, p);
  if (!p.residual) p.residual = p.out;
  p.stage_workspace = arena.take(stage_workspace_bytes(context, p, Phase::kForward));
  return {p, arena.used()};
}

template <class Context>
size_t forward_workspace_bytes(const Context& context, const ResidualNormParams& p, bool saves) {
  return plan_forward(context, p, saves, nullptr, nullptr).workspace_bytes;
}

// Writes p.out, and what backward reads to `saved` unless that is null.
template <class Context>
void run_forward(Context& context, const ResidualNormParams& params, void* saved, void* workspace) {
  const ResidualNormParams p = plan_forward(context, params, saved != nullptr, saved, workspace).params;
  if (p.dropout.threshold) store_random_state(context, p);
  residual_forward(context, p);
}

// The gradient of z is that of x, and d_linear that of y.
template <class Context>
ResidualNormPlan plan_backward(const Context& context, ResidualNormParams p, const void* saved, void* workspace) {
  place_saved(p, const_cast<void*>(saved));
  Arena arena(workspace);
  p.d_residual = p.final_layer_norm ? p.d_x : const_cast<void*>(p.d_out);
  p.d_linear = p.d_y;
  if (!p.d_linear && p.d_linear_bias) p.d_linear = arena.take(residual_bytes(p));
  p.stage_workspace = arena.take(stage_workspace_bytes(context, p, Phase::kOutputBackward));
  return {p, arena.used()};
}

template <class Context>
size_t backward_workspace_bytes(const Context& context, const ResidualNormParams& p) {
  return plan_backward(context, p, nullptr, nullptr).workspace_bytes;
}

// Writes the gradients that are asked for.
template <class Context>
void run_backward(Context& context, const ResidualNormParams& params, const void* saved, void* workspace) {
  const ResidualNormParams p = plan_backward(context, params, saved, workspace).params;
  if (p.final_layer_norm || p.d_linear) residual_backward(context, p);
  if (p.d_x && p.d_x != p.d_residual) copy(context, p.d_residual, p.d_x, residual_bytes(p));
}

}  // namespace pfa
