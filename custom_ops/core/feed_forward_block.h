// The feed-forward block, forward and backward, as a sequence of stages (docs/design.md, section 1):
//
//   [layer norm] -> linear, activation, dropout -> linear -> bias + dropout + residual [+ layer norm]
#pragma once

#include <algorithm>

#include "core/block.h"

namespace pfa {

// Places what backward reads again, O(M*F + M*E) numbers, and returns its size: the first product, or where
// saves_activated what comes of it.
inline size_t place_saved(FeedForwardParams& p, void* saved) {
  Arena arena(saved);
  place_saved_of_input(arena, p);
  void* const product = arena.take(activation_bytes(p, p.linear1_dim()));
  (saves_activated(p) ? p.activated : p.pre_activation) = product;
  place_saved_of_residual(arena, p);
  return arena.used();
}

inline size_t saved_bytes(FeedForwardParams p) { return place_saved(p, nullptr); }

// What the stages are called with. Where a plan is made for memory that is null, only its size is of use.
struct FeedForwardPlan {
  FeedForwardParams params;
  size_t workspace_bytes;
};

// Places what the forward pass writes. Without `saves` what is needed of what place_saved places lies in the workspace.
template <class Context>
FeedForwardPlan plan_forward(const Context& context, FeedForwardParams p, bool saves, void* saved, void* workspace) {
  if (saves) place_saved(p, saved);
  Arena arena(workspace);
  place_hidden(arena, p);
  if (!saves) place_without_saving(arena, p);
  if (!saves && p.gated) p.pre_activation = arena.take(activation_bytes(p, p.linear1_dim()));
  if (!saves || !saves_activated(p)) p.activated = arena.take(activation_bytes(p, p.hidden_dim));
  if (!p.residual) p.residual = p.out;
  p.y = p.residual;
  p.stage_workspace = arena.take(stage_workspace_bytes(context, p, Phase::kForward));
  return {p, arena.used()};
}

template <class Context>
size_t forward_workspace_bytes(const Context& context, const FeedForwardParams& p, bool saves) {
  return plan_forward(context, p, saves, nullptr, nullptr).workspace_bytes;
}

// Writes p.out, and what backward reads to `saved` unless that is null.
template <class Context>
void run_forward(Context& context, const FeedForwardParams& params, void* saved, void* workspace) {
  const FeedForwardParams p = plan_forward(context, params, saved != nullptr, saved, workspace).params;
  if (p.hidden_dropout.threshold || p.dropout.threshold) store_random_state(context, p);
  make_hidden(context, p);
  linear1_forward(context, p);
  linear2_forward(context, p);
  residual_forward(context, p);
}

// Places what the backward pass reads and writes. It leaves `saved` as it is: what make_hidden writes there is there
// already.
//
// d_linear and the hidden activations, of which linear2_backward is the last reader, lie where hidden, and then
// d_hidden, will; d_linear rather where d_x will, unless d_residual waits there. layer_norm_backward and
// linear1_backward find what they read where they write, in numbers of one type.
template <class Context>
FeedForwardPlan plan_backward(const Context& context, FeedForwardParams p, const void* saved, void* workspace) {
  place_saved(p, const_cast<void*>(saved));
  Arena arena(workspace);
  place_d_residual(arena, p, needs_d_linear(p));
  const bool needs_d_pre = needs_d_pre_activation(p);
  const size_t width = activation_bytes(p, p.embed_dim);
  p.d_pre_activation = needs_d_pre ? arena.take(activation_bytes(p, p.linear1_dim())) : nullptr;

  const bool in_d_x = p.d_x && !p.final_layer_norm;
  const size_t d_linear_bytes = needs_d_linear(p) && has_own_d_linear(p) && !in_d_x ? width : 0;
  // A gated block's gradient of the hidden activations takes the place of these first.
  const bool makes_activated = !saves_activated(p) && (p.d_linear2_weight || (p.gated && needs_d_pre));
  const size_t activated_bytes = makes_activated ? activation_bytes(p, activated_columns(context, p)) : 0;
  const size_t hidden_bytes = needs_d_pre && has_own_hidden(p) ? width : 0;
  void* const shared = arena.take(std::max(Arena::aligned(d_linear_bytes) + activated_bytes, hidden_bytes));
  Arena before_hidden(shared);
  void* const d_linear = before_hidden.take(d_linear_bytes);
  void* const activated = before_hidden.take(activated_bytes);
  p.d_linear = !needs_d_linear(p) ? nullptr : !has_own_d_linear(p) ? p.d_residual : in_d_x ? p.d_x : d_linear;
  if (!saves_activated(p)) p.activated = makes_activated ? activated : nullptr;
  p.hidden = !has_own_hidden(p) ? const_cast<void*>(p.x) : p.d_linear1_weight ? shared : nullptr;
  p.d_hidden = p.pre_layer_norm && needs_d_hidden(p) ? shared : nullptr;
  p.stage_workspace = arena.take(std::max(stage_workspace_bytes(context, p, Phase::kOutputBackward),
                                          stage_workspace_bytes(context, p, Phase::kInputBackward)));
  return {p, arena.used()};
}

template <class Context>
size_t backward_workspace_bytes(const Context& context, const FeedForwardParams& p) {
  return plan_backward(context, p, nullptr, nullptr).workspace_bytes;
}

// Writes the gradients that are asked for.
template <class Context>
void run_backward(Context& context, const FeedForwardParams& params, const void* saved, void* workspace) {
  const FeedForwardParams p = plan_backward(context, params, saved, workspace).params;
  if (p.final_layer_norm || needs_d_linear(p)) residual_backward(context, p);
  if (p.d_linear2_weight || needs_d_pre_activation(p)) linear2_backward(context, p);
  if (!needs_d_pre_activation(p)) return;
  if (p.d_linear1_weight) make_hidden(context, p);
  linear1_backward(context, p);
  if (p.d_hidden) layer_norm_backward(context, p);
}

}  // namespace pfa
