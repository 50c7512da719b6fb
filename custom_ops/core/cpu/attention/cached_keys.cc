#include "core/cpu/attention/cached_keys.h"

#include <cstring>

#include "core/cpu/parallel.h"

namespace pfa::cpu {

void append_keys(Context& context, const CachedAttentionParams& p) {
  const AttentionBlockParams& b = p.block;
  const AttentionParams own = attention_of(b);
  const int64_t number = size_of(b.dtype);
  const int64_t row = b.head_dim * number;
  // One head of keys or of values of one sequence.
  parallel_for(2 * b.batch * b.num_kv_heads, context.threads, [&](int64_t unit, int) {
    const bool is_value = unit % 2;
    const int64_t head = unit / 2 % b.num_kv_heads, batch = unit / 2 / b.num_kv_heads;
    const Heads<const void>& from = is_value ? own.value : own.key;
    auto* rows = static_cast<const char*>(from.data) + (batch * from.batch_stride + head * from.head_stride) * number;
    auto* to = static_cast<char*>(is_value ? p.value : p.key) + unit / 2 * p.keys() * row;
    const int64_t cached = p.cached_keys * row;
    auto* old = static_cast<const char*>(is_value ? p.cached_value : p.cached_key);
    if (cached) std::memcpy(to, old + unit / 2 * cached, cached);
    for (int64_t token = 0; token < b.seq_len; ++token) {
      std::memcpy(to + cached + token * row, rows + token * from.token_stride * number, row);
    }
  });
}

}  // namespace pfa::cpu
