// Where the rows of one head lie, one row a token: of queries, keys, values, the attention's result, and the gradients
// of these; and its numbers among the statistics.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/host_device.h"
#include "core/params.h"

namespace pfa {

enum class QkvPart : int { kQuery, kKey, kValue };

// A head's rows of head_dim numbers: that of token i begins at data + i * stride.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;

  PFA_HOST_DEVICE T* row(int64_t token) const { return data + token * stride; }
};

// One head of queries of one sequence.
struct HeadIndex {
  int64_t batch;
  int64_t head;
  int64_t kv_head;        // that it reads
  int64_t flat;           // batch * H + head
  uint32_t dropout_head;  // the same among the heads of the whole layer, as dropout counts
};

struct QkvLayout {
  int64_t num_heads;
  int64_t group;  // query heads that read one head of keys
  int64_t head_dim;
  int64_t first_head;           // these heads among those of the whole layer
  int64_t total_heads;          // of the whole layer
  int64_t queries;              // of a sequence; of packed ones, of all
  int64_t keys;                 // likewise
  const int32_t* query_starts;  // as in AttentionParams
  const int32_t* key_starts;

  PFA_HOST_DEVICE int64_t heads_dim() const { return num_heads * head_dim; }

  template <class Flat>  // uint32_t on GPUs, whose 64-bit divisions are long
  PFA_HOST_DEVICE HeadIndex head(Flat flat) const {
    const Flat heads = static_cast<Flat>(num_heads);
    const Flat batch = flat / heads;
    const Flat head = flat % heads;
    const auto dropout_head = static_cast<uint32_t>(batch) * static_cast<uint32_t>(total_heads) +
                              static_cast<uint32_t>(first_head) + static_cast<uint32_t>(head);
    return {static_cast<int64_t>(batch), static_cast<int64_t>(head),
            static_cast<int64_t>(head / static_cast<Flat>(group)), static_cast<int64_t>(flat), dropout_head};
  }

  // The head's rows of queries, of the result, or of the gradient of either.
  template <class T, class Data>
  PFA_HOST_DEVICE HeadRows<T> query_rows(const Heads<Data>& heads, const HeadIndex& h) const {
    return rows<T>(heads, h.batch, h.head, query_starts);
  }

  // The rows that the head reads of keys or values; the rows of the gradient of either.
  template <class T, class Data>
  PFA_HOST_DEVICE HeadRows<T> key_rows(const Heads<Data>& heads, const HeadIndex& h) const {
    return rows<T>(heads, h.batch, h.kv_head, key_starts);
  }

  // Where the head's query 0 is in what has a number for every query of every head.
  PFA_HOST_DEVICE int64_t statistics(const HeadIndex& h) const {
    return query_starts ? h.head * queries + query_starts[h.batch] : h.flat * queries;
  }

  // Where a head's part begins in d_qkv_bias [H + 2 * num_kv_heads, D], and the numbers of that.
  PFA_HOST_DEVICE int64_t bias_offset(const HeadIndex& h, QkvPart part) const {
    const int64_t kv_heads = num_heads / group;
    const int64_t head = part == QkvPart::kQuery ? h.head
                         : part == QkvPart::kKey ? num_heads + h.kv_head
                                                 : num_heads + kv_heads + h.kv_head;
    return head * head_dim;
  }
  PFA_HOST_DEVICE int64_t bias_numbers() const { return (num_heads + 2 * (num_heads / group)) * head_dim; }

 private:
  template <class T, class Data>
  PFA_HOST_DEVICE static HeadRows<T> rows(const Heads<Data>& heads, int64_t batch, int64_t head,
                                          const int32_t* starts) {
    T* data = static_cast<T*>(heads.data) + batch * heads.batch_stride + head * heads.head_stride;
    return {starts ? data + starts[batch] * heads.token_stride : data, heads.token_stride};
  }
};

PFA_HOST_DEVICE QkvLayout qkv_layout(const AttentionParams& p) {
  const bool is_packed = p.query_starts;
  return {p.num_heads,
          p.num_heads / p.num_kv_heads,
          p.head_dim,
          p.first_head,
          p.heads_in_all(),
          is_packed ? p.packed_queries : p.queries,
          is_packed ? p.packed_keys : p.keys,
          p.query_starts,
          p.key_starts};
}

// From head `first` on of a dense tensor [batch, tokens, heads, head_dim]; `by_head`: [batch, heads, tokens, head_dim].
template <class Data>
Heads<Data> heads_from(Data* data, int64_t first, int64_t tokens, int64_t heads, int64_t head_dim, DType dtype,
                       bool by_head = false) {
  using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
  const int64_t token_stride = by_head ? head_dim : heads * head_dim;
  const int64_t head_stride = by_head ? tokens * head_dim : head_dim;
  if (data) data = static_cast<Byte*>(data) + first * head_stride * static_cast<int64_t>(size_of(dtype));
  return {data, tokens * heads * head_dim, token_stride, head_stride};
}

}  // namespace pfa
