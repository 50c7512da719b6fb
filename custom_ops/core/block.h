// The attention block, forward and backward, as a sequence of stages (docs/design.md, section 1):
//
//   [layer norm] -> QKV projection -> attention -> output projection -> bias + dropout + residual [+ layer norm]
//
// A caller fills in the sizes, types, switches and inputs of Params, then `out` or d_out and the gradients that it
// wants, gets memory and runs:
//
//   saved_bytes(p), forward_workspace_bytes(context, p, saves)    block_forward(context, p, saved, workspace)
//   saved_bytes(p), backward_workspace_bytes(context, p)          block_backward(context, p, saved, workspace)
//
// No memory needs values before. `saved` goes from forward to backward; it is null where forward is to save nothing.
//
// A device is a Context type whose namespace has the stages and stage_workspace_bytes; stages.md is their contract.
#pragma once

#include <algorithm>

#include "core/arena.h"
#include "core/params.h"

namespace pfa {

// Places what backward reads again, O(B*S*E + B*H*S) numbers, and returns its size. The layer-normalised x is not among
// them: it is computed anew.
inline size_t place_saved(Params& p, void* saved) {
  Arena arena(saved);
  const size_t rows = p.rows();
  const size_t element = size_of(p.dtype);
  const size_t residual_element = size_of(p.residual_dtype);
  const size_t statistic = size_of(accumulator_of(p.dtype));
  p.random_state = static_cast<uint64_t*>(arena.take(2 * sizeof(uint64_t)));
  p.pre_ln_mean = p.pre_layer_norm ? arena.take(rows * statistic) : nullptr;
  p.pre_ln_rstd = p.pre_layer_norm ? arena.take(rows * statistic) : nullptr;
  p.qkv = arena.take(rows * 3 * p.heads_dim() * element);
  p.log_sum_exp = arena.take(rows * p.num_heads * statistic);
  p.score_shift = arena.take(rows * p.num_heads * statistic);
  p.attn_out = arena.take(rows * p.heads_dim() * element);
  p.residual = p.final_layer_norm ? arena.take(rows * p.embed_dim * residual_element) : nullptr;
  p.ln_mean = p.final_layer_norm && !has_output_dropout(p) ? arena.take(rows * statistic) : nullptr;
  p.ln_rstd = p.final_layer_norm ? arena.take(rows * statistic) : nullptr;
  return arena.used();
}

inline size_t saved_bytes(Params p) { return place_saved(p, nullptr); }

// What the stages are called with. Where a plan is made for memory that is null, only its size is of use.
struct ForwardPlan {
  Params params;
  size_t workspace_bytes;
};

// Places what the forward pass writes. Without `saves` what is needed of what place_saved places lies in the workspace:
// the output projection then goes to `out` itself and the final layer norm runs there, and statistics are not kept.
template <class Context>
ForwardPlan plan_forward(const Context& context, Params p, bool saves, void* saved, void* workspace) {
  const size_t rows = p.rows();
  const size_t element = size_of(p.dtype);
  if (saves) place_saved(p, saved);
  Arena arena(workspace);
  p.hidden = has_own_hidden(p) ? arena.take(rows * p.embed_dim * element) : const_cast<void*>(p.x);
  if (!saves) {
    p.random_state = static_cast<uint64_t*>(arena.take(2 * sizeof(uint64_t)));
    p.qkv = arena.take(rows * 3 * p.heads_dim() * element);
    p.attn_out = arena.take(rows * p.heads_dim() * element);
    p.pre_ln_mean = p.pre_ln_rstd = p.log_sum_exp = p.score_shift = p.ln_mean = p.ln_rstd = p.residual = nullptr;
  }
  if (!p.residual) p.residual = p.out;
  p.stage_workspace = arena.take(stage_workspace_bytes(context, p, Phase::kForward));
  return {p, arena.used()};
}

template <class Context>
size_t forward_workspace_bytes(const Context& context, const Params& p, bool saves) {
  return plan_forward(context, p, saves, nullptr, nullptr).workspace_bytes;
}

template <class Context>
void make_hidden(Context& context, const Params& p) {
  if (p.pre_layer_norm) {
    layer_norm_forward(context, p);
  } else if (has_wide_residual(p)) {
    narrow_x(context, p);
  }
}

// Writes p.out, and what backward reads to `saved` unless that is null.
template <class Context>
void block_forward(Context& context, const Params& params, void* saved, void* workspace) {
  const Params p = plan_forward(context, params, saved != nullptr, saved, workspace).params;
  make_hidden(context, p);
  qkv_linear_forward(context, p);
  attention_forward(context, p);
  output_linear_forward(context, p);
  residual_forward(context, p);
}

inline Params with_workspace(Params p, void* workspace) {
  p.stage_workspace = workspace;
  return p;
}

// What the stages of each phase are called with, which differs in stage_workspace only.
struct BackwardPlan {
  Params output;
  Params attention;
  Params input;
  size_t workspace_bytes;
};

// Places what the backward pass reads and writes. It leaves `saved` as it is: what make_hidden writes there is there
// already.
//
// Memory is shared by what lives at different times. d_linear, and the workspace of the stages that make and read it,
// end before d_qkv begins. d_attn_out, hidden and d_hidden follow each other in one place; that is d_x itself, where
// the last of them becomes d_x, unless d_residual waits there, or the last of them is d_hidden and narrower than d_x.
// So layer_norm_backward and qkv_linear_backward find what they read where they write, in numbers of one type. Where
// only d_attn_out has been there, the workspace of qkv_linear_backward follows it.
template <class Context>
BackwardPlan plan_backward(const Context& context, Params p, const void* saved, void* workspace) {
  place_saved(p, const_cast<void*>(saved));
  Arena arena(workspace);
  const size_t row_bytes = p.rows() * size_of(p.dtype);
  const size_t activation = row_bytes * p.embed_dim;
  const size_t residual = p.rows() * p.embed_dim * size_of(p.residual_dtype);
  const bool needs_d_residual = p.d_x || (needs_d_linear(p) && !has_own_d_linear(p));
  p.d_residual = !p.final_layer_norm ? const_cast<void*>(p.d_out)
                 : !needs_d_residual ? nullptr
                 : p.d_x             ? p.d_x
                                     : arena.take(residual);

  const size_t d_qkv_bytes = needs_d_qkv(p) ? row_bytes * 3 * p.heads_dim() : 0;
  const size_t d_linear_bytes = needs_d_linear(p) && has_own_d_linear(p) ? activation : 0;
  const size_t output_workspace = stage_workspace_bytes(context, p, Phase::kOutputBackward);
  p.d_qkv = arena.take(std::max(d_qkv_bytes, Arena::aligned(d_linear_bytes) + output_workspace));
  Arena before_d_qkv(p.d_qkv);
  void* d_linear = before_d_qkv.take(d_linear_bytes);
  p.d_linear = !needs_d_linear(p) ? nullptr : has_own_d_linear(p) ? d_linear : p.d_residual;
  void* const output_memory = before_d_qkv.take(output_workspace);
  if (!needs_d_qkv(p)) {
    p.d_qkv = p.d_attn_out = p.hidden = p.d_hidden = nullptr;
    return {with_workspace(p, output_memory), with_workspace(p, nullptr), with_workspace(p, nullptr), arena.used()};
  }

  const size_t attention_workspace = stage_workspace_bytes(context, p, Phase::kAttentionBackward);
  const size_t input_workspace = stage_workspace_bytes(context, p, Phase::kInputBackward);
  const bool in_d_x = p.d_x && !p.final_layer_norm && row_bytes * p.heads_dim() <= residual &&
                      !(p.pre_layer_norm && has_wide_residual(p));
  const bool is_free_again = !in_d_x && !has_own_hidden(p);
  const size_t later = has_own_hidden(p) ? activation : is_free_again ? input_workspace : 0;
  void* shared = in_d_x ? p.d_x : arena.take(std::max(row_bytes * p.heads_dim(), later));
  p.d_attn_out = shared;
  p.hidden = !has_own_hidden(p) ? const_cast<void*>(p.x) : p.d_qkv_weight ? shared : nullptr;
  p.d_hidden = p.pre_layer_norm && needs_d_hidden(p) ? shared : nullptr;
  void* const attention_memory = arena.take(std::max(attention_workspace, is_free_again ? 0 : input_workspace));
  return {with_workspace(p, output_memory), with_workspace(p, attention_memory),
          with_workspace(p, is_free_again ? shared : attention_memory), arena.used()};
}

template <class Context>
size_t backward_workspace_bytes(const Context& context, const Params& p) {
  return plan_backward(context, p, nullptr, nullptr).workspace_bytes;
}

// Writes the gradients that are asked for.
template <class Context>
void block_backward(Context& context, const Params& params, const void* saved, void* workspace) {
  const BackwardPlan plan = plan_backward(context, params, saved, workspace);
  if (params.final_layer_norm || needs_d_linear(params)) residual_backward(context, plan.output);
  if (needs_d_linear(params)) output_linear_backward(context, plan.output);
  if (needs_d_qkv(params)) {
    attention_backward(context, plan.attention);
    if (params.d_qkv_weight) make_hidden(context, plan.input);
    qkv_linear_backward(context, plan.input);
    if (plan.input.d_hidden) layer_norm_backward(context, plan.input);
  }
}

}  // namespace pfa
