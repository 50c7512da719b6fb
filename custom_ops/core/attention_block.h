// The attention block, forward and backward, as a sequence of stages (docs/design.md, section 1):
//
//   [layer norm] -> QKV projection -> attention -> output projection -> bias + dropout + residual [+ layer norm]
#pragma once

#include <algorithm>

#include "core/block.h"
#include "core/qkv_layout.h"
#include "core/rounding_residue.h"

namespace pfa {

// The block's attention by itself, between qkv and attn_out.
inline AttentionParams attention_of(const AttentionBlockParams& p) {
  AttentionParams a;
  a.batch = p.batch;
  a.queries = a.keys = p.seq_len;
  a.num_heads = p.num_heads;
  a.num_kv_heads = p.num_kv_heads;
  a.head_dim = p.head_dim;
  a.first_head = p.first_head;
  a.total_heads = p.total_heads;
  a.packed_queries = a.packed_keys = p.starts ? p.rows : 0;
  a.dtype = p.dtype;
  a.scale = p.scale;
  a.causal = p.causal;
  a.window_left = p.window_left;
  a.window_right = p.window_right;
  a.dropout = p.attn_dropout;
  a.seed = p.seed;
  a.offset = p.offset;
  a.query_starts = a.key_starts = p.starts;

  // From head `first` on of [M, heads, D].
  const auto from = [&](auto* data, int64_t first, int64_t heads) {
    auto result = heads_from(data, first, p.seq_len, heads, p.head_dim, p.dtype);
    if (p.starts) result.batch_stride = 0;
    return result;
  };
  const int64_t all_heads = p.num_heads + 2 * p.num_kv_heads;
  const int64_t key = p.num_heads, value = p.num_heads + p.num_kv_heads;
  const void* const qkv = p.qkv;
  a.query = from(qkv, 0, all_heads);
  a.key = from(qkv, key, all_heads);
  a.value = from(qkv, value, all_heads);
  a.mask = p.mask;
  a.mask.data = p.attn_mask;
  a.out = from(p.attn_out, 0, p.num_heads);
  a.random_state = p.random_state;
  a.log_sum_exp = p.log_sum_exp;
  a.score_shift = p.score_shift;
  a.out_residue = p.out_residue;
  a.d_out = from(static_cast<const void*>(p.d_attn_out), 0, p.num_heads);
  a.d_query = from(p.d_qkv, 0, all_heads);
  a.d_key = from(p.d_qkv, key, all_heads);
  a.d_value = from(p.d_qkv, value, all_heads);
  a.d_mask = p.d_attn_mask;
  a.d_qkv_bias = p.d_qkv_bias;
  a.spare = p.d_qkv_weight;
  a.spare_bytes = p.d_qkv_weight ? p.qkv_dim() * p.embed_dim * size_of(p.dtype) : 0;
  a.stage_workspace = p.stage_workspace;
  return a;
}

// Places what backward reads again, O(B*S*E + B*H*S) numbers, and returns its size.
inline size_t place_saved(AttentionBlockParams& p, void* saved) {
  Arena arena(saved);
  place_saved_of_input(arena, p);
  p.qkv = arena.take(activation_bytes(p, p.qkv_dim()));
  p.log_sum_exp = arena.take(statistics_bytes(p) * p.num_heads);
  p.score_shift = arena.take(statistics_bytes(p) * p.num_heads);
  p.attn_out = arena.take(activation_bytes(p, p.heads_dim()));
  p.out_residue = place_out_residue(arena, attention_of(p));
  place_saved_of_residual(arena, p);
  return arena.used();
}

inline size_t saved_bytes(AttentionBlockParams p) { return place_saved(p, nullptr); }

// What the stages are called with. Where a plan is made for memory that is null, only its size is of use.
struct AttentionForwardPlan {
  AttentionBlockParams params;
  size_t workspace_bytes;
};

// Places what the forward pass writes. Without `saves` what is needed of what place_saved places lies in the workspace.
template <class Context>
AttentionForwardPlan plan_forward(const Context& context, AttentionBlockParams p, bool saves, void* saved,
                                  void* workspace) {
  if (saves) place_saved(p, saved);
  Arena arena(workspace);
  place_hidden(arena, p);
  if (!saves) {
    place_without_saving(arena, p);
    p.qkv = arena.take(activation_bytes(p, p.qkv_dim()));
    p.attn_out = arena.take(activation_bytes(p, p.heads_dim()));
    p.log_sum_exp = p.score_shift = nullptr;
    p.out_residue = nullptr;
  }
  if (!p.residual) p.residual = p.out;
  p.y = p.residual;
  p.stage_workspace = arena.take(stage_workspace_bytes(context, p, Phase::kForward));
  return {p, arena.used()};
}

template <class Context>
size_t forward_workspace_bytes(const Context& context, const AttentionBlockParams& p, bool saves) {
  return plan_forward(context, p, saves, nullptr, nullptr).workspace_bytes;
}

// Writes p.out, and what backward reads to `saved` unless that is null.
template <class Context>
void run_forward(Context& context, const AttentionBlockParams& params, void* saved, void* workspace) {
  const AttentionBlockParams p = plan_forward(context, params, saved != nullptr, saved, workspace).params;
  make_hidden(context, p);
  qkv_linear_forward(context, p);
  attention_forward(context, attention_of(p));
  output_linear_forward(context, p);
  residual_forward(context, p);
}

// What the stages of each phase are called with, which differs in stage_workspace only.
struct AttentionBackwardPlan {
  AttentionBlockParams output;
  AttentionBlockParams attention;
  AttentionBlockParams input;
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
AttentionBackwardPlan plan_backward(const Context& context, AttentionBlockParams p, const void* saved,
                                    void* workspace) {
  place_saved(p, const_cast<void*>(saved));
  Arena arena(workspace);
  const size_t row_bytes = p.rows * size_of(p.dtype);
  const size_t activation = row_bytes * p.embed_dim;
  place_d_residual(arena, p, needs_d_linear(p));

  const size_t d_qkv_bytes = needs_d_qkv(p) ? row_bytes * p.qkv_dim() : 0;
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
  const bool in_d_x = p.d_x && !p.final_layer_norm && row_bytes * p.heads_dim() <= residual_bytes(p) &&
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
size_t backward_workspace_bytes(const Context& context, const AttentionBlockParams& p) {
  return plan_backward(context, p, nullptr, nullptr).workspace_bytes;
}

// Writes the gradients that are asked for.
template <class Context>
void run_backward(Context& context, const AttentionBlockParams& params, const void* saved, void* workspace) {
  const AttentionBackwardPlan plan = plan_backward(context, params, saved, workspace);
  if (params.final_layer_norm || needs_d_linear(params)) residual_backward(context, plan.output);
  if (needs_d_linear(params)) output_linear_backward(context, plan.output);
  if (needs_d_qkv(params)) {
    attention_backward(context, attention_of(plan.attention));
    if (params.d_qkv_weight) make_hidden(context, plan.input);
    qkv_linear_backward(context, plan.input);
    if (plan.input.d_hidden) layer_norm_backward(context, plan.input);
  }
}

}  // namespace pfa
