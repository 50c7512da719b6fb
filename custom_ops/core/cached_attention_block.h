// The attention block's forward pass where a cache holds keys and values: all that there are, or those that come before
// the block's own. Nothing is dropped and nothing saved.
//
// Its stages are the block's; before the attention `append_keys`, which copies the cache and what is new into one.
#pragma once

#include <algorithm>

#include "core/attention_block.h"

namespace pfa {

struct CachedAttentionParams {
  AttentionBlockParams block;  // its mask has a column for every key; sequences are not packed
  int64_t cached_keys = 0;     // of a sequence, that are there

  // [batch, num_kv_heads, cached_keys, D] of the block's dtype
  const void* cached_key = nullptr;
  const void* cached_value = nullptr;

  // [batch, num_kv_heads, cached_keys + seq_len, D]: the cache with the block's own keys and values after its own. Null
  // where the block makes none.
  void* key = nullptr;
  void* value = nullptr;

  int64_t keys() const { return cached_keys + (key ? block.seq_len : 0); }
};

// The attention by itself; where the block makes no keys qkv is [M, H, D].
inline AttentionParams attention_of(const CachedAttentionParams& p) {
  const AttentionBlockParams& b = p.block;
  AttentionParams a = attention_of(b);
  a.keys = p.keys();
  const auto all_heads = [&](const void* data, int64_t tokens, int64_t heads, bool by_head) {
    return heads_from(data, 0, tokens, heads, b.head_dim, b.dtype, by_head);
  };
  if (!p.key) a.query = all_heads(b.qkv, b.seq_len, b.num_heads, false);
  a.key = all_heads(p.key ? p.key : p.cached_key, a.keys, b.num_kv_heads, true);
  a.value = all_heads(p.key ? p.value : p.cached_value, a.keys, b.num_kv_heads, true);
  return a;
}

// The projection of the queries alone: the first rows of the packed weight.
inline LinearParams query_linear_of(const CachedAttentionParams& p) {
  const AttentionBlockParams& b = p.block;
  LinearParams query;
  query.rows = b.rows;
  query.in_features = b.embed_dim;
  query.out_features = b.heads_dim();
  query.dtype = b.dtype;
  query.transpose_weight = true;
  query.has_arranged_weights = b.has_arranged_weights;
  query.x = b.hidden;
  query.weight = b.qkv_weight;
  query.bias = b.qkv_bias;
  query.out = b.qkv;
  query.stage_workspace = b.stage_workspace;
  return query;
}

struct CachedAttentionPlan {
  CachedAttentionParams params;
  size_t workspace_bytes;
};

template <class Context>
CachedAttentionPlan plan_forward(const Context& context, CachedAttentionParams p, void* workspace) {
  AttentionBlockParams& b = p.block;
  Arena arena(workspace);
  place_hidden(arena, b);
  place_without_saving(arena, b);
  b.qkv = arena.take(activation_bytes(b, p.key ? b.qkv_dim() : b.heads_dim()));
  b.attn_out = arena.take(activation_bytes(b, b.heads_dim()));
  b.log_sum_exp = b.score_shift = nullptr;
  b.residual = b.out;
  b.y = b.residual;
  b.stage_workspace = arena.take(std::max({stage_workspace_bytes(context, b, Phase::kForward),
                                           stage_workspace_bytes(context, attention_of(p), Phase::kForward),
                                           stage_workspace_bytes(context, query_linear_of(p), Phase::kForward)}));
  return {p, arena.used()};
}

template <class Context>
size_t forward_workspace_bytes(const Context& context, const CachedAttentionParams& p) {
  return plan_forward(context, p, nullptr).workspace_bytes;
}

// Writes block.out, and key and value unless they are null.
template <class Context>
void run_forward(Context& context, const CachedAttentionParams& params, void* workspace) {
  const CachedAttentionParams p = plan_forward(context, params, workspace).params;
  make_hidden(context, p.block);
  if (p.key) {
    qkv_linear_forward(context, p.block);
    append_keys(context, p);
  } else {
    linear_forward(context, query_linear_of(p));
  }
  attention_forward(context, attention_of(p));
  output_linear_forward(context, p.block);
  residual_forward(context, p.block);
}

}  // namespace pfa
