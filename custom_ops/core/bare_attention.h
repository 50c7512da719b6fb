// Attention by itself, forward and backward, on dense tensors: the stage that the attention block has between its
// products.
//
// The three may share tensors, as a projection leaves them, so that nobody copies its slices.
#pragma once

#include "core/arena.h"
#include "core/params.h"
#include "core/qkv_layout.h"
#include "core/rounding_residue.h"

namespace pfa {

// query [batch, queries, H, D], key and value [batch, keys, Hkv, D]; of packed sequences [tokens of all, heads, D].
// What lies behind another has its heads after the other's, in the other's tensor, and so has its gradient; its own
// pointers are null.
struct BareAttentionParams {
  // Sizes, types, switches, and the inputs without gradients; with_tensors places the others in it.
  AttentionParams attention;
  bool key_behind_query = false;
  bool value_behind_key = false;
  bool keys_by_head = false;  // key and value are [batch, Hkv, keys, D]
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
  const int64_t heads_behind_key = p.value_behind_key ? a.num_kv_heads : 0;
  const int64_t heads_of_key = a.num_kv_heads + heads_behind_key;
  const int64_t heads_of_query = a.num_heads + (p.key_behind_query ? heads_of_key : 0);
  // Heads from `first` on of a tensor of so many.
  const auto from = [&](auto* data, int64_t first, int64_t tokens, int64_t heads, bool by_head) {
    auto result = heads_from(data, first, tokens, heads, a.head_dim, a.dtype, by_head);
    if (a.query_starts) result.batch_stride = 0;
    return result;
  };
  const auto place = [&](auto* query, auto* key, auto* value, auto& query_heads, auto& key_heads, auto& value_heads) {
    query_heads = from(query, 0, a.queries, heads_of_query, false);
    key_heads = p.key_behind_query ? from(query, a.num_heads, a.queries, heads_of_query, false)
                                   : from(key, 0, a.keys, heads_of_key, p.keys_by_head);
    if (!p.value_behind_key) {
      value_heads = from(value, 0, a.keys, a.num_kv_heads, p.keys_by_head);
    } else if (p.key_behind_query) {
      value_heads = from(query, a.num_heads + a.num_kv_heads, a.queries, heads_of_query, false);
    } else {
      value_heads = from(key, a.num_kv_heads, a.keys, heads_of_key, p.keys_by_head);
    }
  };
  place(p.query, p.key, p.value, a.query, a.key, a.value);
  place(p.d_query, p.d_key, p.d_value, a.d_query, a.d_key, a.d_value);
  a.mask.data = p.attn_mask;
  a.out = from(p.out, 0, a.queries, a.num_heads, false);
  a.d_out = from(p.d_out, 0, a.queries, a.num_heads, false);
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
  a.out_residue = place_out_residue(arena, a);
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
