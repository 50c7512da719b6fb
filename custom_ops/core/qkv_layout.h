// Where queries, keys, values, the attention's result, and the gradients of these lie: the rows of one head, one row a
// token.
//
// Query, key and value are packed: qkv is [batch, seq_len, 3, H, D], attn_out [batch, seq_len, H, D].
#pragma once

#include <cstdint>

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

struct HeadIndex {
  int64_t batch;
  int64_t head;
  int64_t flat;           // batch * H + head
  uint32_t dropout_head;  // the same among the heads of the whole layer, as dropout counts
};

struct QkvLayout {
  int64_t seq_len;
  int64_t num_heads;
  int64_t head_dim;
  int64_t first_head;   // these heads among those of the whole layer
  int64_t total_heads;  // of the whole layer

  PFA_HOST_DEVICE int64_t heads_dim() const { return num_heads * head_dim; }

  template <class Flat>  // uint32_t on GPUs, whose 64-bit divisions are long
  PFA_HOST_DEVICE HeadIndex head(Flat flat) const {
    const Flat heads = static_cast<Flat>(num_heads);
    const Flat batch = flat / heads;
    const Flat head = flat % heads;
    const auto dropout_head = static_cast<uint32_t>(batch) * static_cast<uint32_t>(total_heads) +
                              static_cast<uint32_t>(first_head) + static_cast<uint32_t>(head);
    return {static_cast<int64_t>(batch), static_cast<int64_t>(head), static_cast<int64_t>(flat), dropout_head};
  }

  // The head's rows of qkv or its gradient.
  template <class T>
  PFA_HOST_DEVICE HeadRows<T> rows(T* qkv, const HeadIndex& h, QkvPart part) const {
    return {qkv + h.batch * seq_len * 3 * heads_dim() + bias_offset(h, part), 3 * heads_dim()};
  }

  // The head's rows of attn_out or its gradient.
  template <class T>
  PFA_HOST_DEVICE HeadRows<T> out_rows(T* attn_out, const HeadIndex& h) const {
    return {attn_out + h.batch * seq_len * heads_dim() + h.head * head_dim, heads_dim()};
  }

  // Where a head's part begins in qkv_bias [3, H, D], and so in every token of qkv.
  PFA_HOST_DEVICE int64_t bias_offset(const HeadIndex& h, QkvPart part) const {
    return static_cast<int64_t>(part) * heads_dim() + h.head * head_dim;
  }
};

PFA_HOST_DEVICE QkvLayout qkv_layout(const AttentionParams& p) {
  return {p.seq_len, p.num_heads, p.head_dim, p.first_head, p.heads_in_all()};
}

}  // namespace pfa
