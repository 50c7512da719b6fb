// Attention by itself, forward and backward, on dense tensors: the stage that the attention block has between its
// products.
#pragma once

#include "core/arena.h"
#include "core/params.h"
#include "core/qkv_layout.h"

namespace pfa {

// query [batch, queries, H, D], key and value [batch, keys, Hkv, D]; of packed sequences [tokens of all, heads, D].
struct BareAttentionParams {
  // Sizes, types, switches, and the inputs without gradients; with_tensors places the others in it.
  AttentionParams attention;
  uint64_t seed = 0;
  uint64_t offset = 0;

  const void* query = nullptr;
  const void* key = nullptr;
  const void* value = nullptr;
  const void* attn_mask = nullptr;  // of attention.mask, or null

  void* out = nullptr;  // as query; backward reads it

  const void* d_out = nullptr;
  void* d_query = nullptr;
  void* d_key = nullptr;
  void* d_value = nullptr;
  void* d_attn_mask = nullptr;
};

// The attention of the struct's tensors.
inline AttentionParams with_tensors(const BareAttentionParams& p) {
  AttentionParams a = p.attention;
  a.seed = p.seed;
  a.offset = p.offset;
  const auto rows = [&](auto* data, int64_t tokens, int64_t heads) {
    auto result = dense_heads(data, tokens, heads, a.head_dim);
    if (a.query_starts) result.batch_stride = 0;
    return result;
  };
  const auto queries = [&](auto* data) { return rows(data, a.queries, a.num_heads); };
  const auto keys = [&](auto* data) { return rows(data, a.keys, a.num_kv_heads); };
  a.query = queries(p.query);
  a.key = keys(p.key);
  a.value = keys(p.value);
  a.mask.data = p.attn_mask;
  a.out = queries(p.out);
  a.d_out = queries(p.d_out);
  a.d_query = queries(p.d_query);
  a.d_key = keys(p.d_key);
  a.d_value = keys(p.d_value);
  a.d_mask = p.d_attn_mask;
  return a;
}

// Places what backward reads again, and returns its size.
inline size_t place_saved(AttentionParams& a, void* saved) {
  Arena arena(saved);
  const size_t statistics = a.queries_in_all() * a.num_heads * size_of(accumulator_of(a.dtype));
  a.random_state = static_cast<uint64_t*>(arena.take(2 * sizeof(uint64_t)));
  a.log_sum_exp = arena.take(statistics);
  a.score_shift = arena.take(statistics);
  return arena.used();
}

inline size_t saved_bytes(const BareAttentionParams& p) {
  AttentionParams a = p.attention;
  return place_saved(a, nullptr);
}

// Places what the forward pass writes, and returns the size of the workspace.
template <class Context>
size_t plan_forward(const Context& context, AttentionParams& a, void* saved, void* workspace) {
  Arena arena(workspace);
  if (saved) {
    place_saved(a, saved);
  } else {
    a.random_state = static_cast<uint64_t*>(arena.take(2 * sizeof(uint64_t)));
  }
  a.stage_workspace = arena.take(stage_workspace_bytes(context, a, Phase::kForward));
  return arena.used();
}

template <class Context>
size_t forward_workspace_bytes(const Context& context, const BareAttentionParams& p, bool) {
  AttentionParams a = with_tensors(p);
  return plan_forward(context, a, nullptr, nullptr);
}

// Writes p.out, and what backward reads to `saved` unless that is null.
template <class Context>
void run_forward(Context& context, const BareAttentionParams& p, void* saved, void* workspace) {
  AttentionParams a = with_tensors(p);
  plan_forward(context, a, saved, workspace);
  attention_forward(context, a);
}

template <class Context>
size_t backward_workspace_bytes(const Context& context, const BareAttentionParams& p) {
  return stage_workspace_bytes(context, with_tensors(p), Phase::kAttentionBackward);
}

// Writes the gradients that are asked for.
template <class Context>
void run_backward(Context& context, const BareAttentionParams& p, const void* saved, void* workspace) {
  AttentionParams a = with_tensors(p);
  place_saved(a, const_cast<void*>(saved));
  a.stage_workspace = workspace;
  attention_backward(context, a);
}

}  // namespace pfa
