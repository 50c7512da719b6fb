// What the attention's kernels are given, by value: what both passes need, and what each needs beside that.
//
// Kernels work with scores in units of log2: s2 = (q . k) * scale * log2(e) + mask * log2(e), so that exp2 does for
// exp.
//
// Backward finds the probabilities of forward only if both subtract the same number from the same scores, rounded
// alike. Where a row's highest score is beyond kLargeScore, the last bit of a score is worth so much that this counts:
// both scale a score and subtract from it in one operation, but with a mask, where the masked score is rounded first;
// and backward subtracts the highest score before the sum of exponentials, beside which that would be lost. Elsewhere
// backward subtracts both at once.
#pragma once

#include "core/params.h"
#include "core/philox.h"
#include "core/qkv_layout.h"
#include "core/visibility.h"

namespace pfa {
namespace cuda {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kLargeScore = 256.0f;

struct AttentionArgs {
  Heads<const void> query;
  Heads<const void> key;
  Heads<const void> value;
  QkvLayout layout;
  Visibility<int> visibility;  // of packed sequences, as if all were as long as the longest
  bool causal;
  int64_t window_left;  // as in AttentionParams, as window_right
  int64_t window_right;
  Mask mask;
  ColumnRanges hidden_ranges;
  int64_t batch;
  bool vectors;  // rows start at multiples of 16 bytes
  bool drops;
  uint32_t drop_limit;  // an element is kept when its 16-bit number << 16 exceeds this; unused where `drops` is false
  double drop_scale;
  double score_scale;

  __host__ __device__ bool is_packed() const { return layout.query_starts; }
  bool is_packed_or_grouped() const { return is_packed() || layout.group > 1; }
  bool has_mask_or_dropout() const { return mask.data || drops || hidden_ranges.data; }
  __host__ __device__ int head_dim() const { return static_cast<int>(layout.head_dim); }
  __host__ __device__ int64_t heads() const { return batch * layout.num_heads; }
  __host__ __device__ int64_t kv_heads() const { return batch * (layout.num_heads / layout.group); }
};

struct ForwardArgs : AttentionArgs {
  Heads<void> out;
  void* log_sum_exp;       // [B, H, queries], packed [H, T], or null: not wanted
  void* score_shift;       // the same in units of log2, or null: not wanted
  uint32_t* out_residue;   // as in AttentionParams, or null: not wanted
  uint64_t* random_state;  // written; or null: not wanted
  uint64_t seed;
  uint64_t offset;
};

struct BackwardArgs : AttentionArgs {
  Heads<const void> out;
  const void* log_sum_exp;       // [B, H, queries], packed [H, T]
  const void* score_shift;       // the same in units of log2
  const uint32_t* out_residue;   // as in AttentionParams, or null
  const uint64_t* random_state;  // [2]: seed and offset of the forward pass
  Heads<const void> d_out;
  const void* weights;    // [B, H, queries, keys], as d_weights
  const void* d_weights;  // of_weights: the gradient that is given, and there are no out, d_out and d_value
  bool of_weights;
  Heads<void> d_query;
  Heads<void> d_key;
  Heads<void> d_value;

  // The row statistics, [B, H, rows_padded] each, packed [H, rows_padded], made by the pass's first kernel.
  // Sum over d of d_out * out, as that was before rounding, or over keys of d_weights * weights; 0 past the last query.
  void* delta;
  void* lse2;    // log_sum_exp * log2(e), and score_shift unless that is large; +inf past the last query
  void* shift2;  // score_shift if it is large, else 0
  // The number of queries rounded up to whole tiles; of packed sequences, of all with their tiles apart.
  int rows_padded;
};

// The row statistics of a sequence begin a multiple of it, and there are so many: whole tiles of any kernel.
constexpr int kStatisticsMultiple = 128;

inline bool is_vector_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether every row of every tensor starts at a multiple of 16 bytes. A pointer that is not placed yet is null, and
// will.
inline bool has_vectors(const AttentionParams& p) {
  const int64_t element = size_of(p.dtype);
  const auto aligned = [&](const auto& heads) {
    return is_vector_aligned(heads.data) && heads.batch_stride * element % 16 == 0 &&
           heads.token_stride * element % 16 == 0 && heads.head_stride * element % 16 == 0;
  };
  return p.head_dim * element % 16 == 0 && aligned(p.query) && aligned(p.key) && aligned(p.value) && aligned(p.out) &&
         aligned(p.d_out) && aligned(p.d_query) && aligned(p.d_key) && aligned(p.d_value);
}

inline AttentionArgs attention_args(const AttentionParams& p) {
  AttentionArgs args{};
  args.query = p.query;
  args.key = p.key;
  args.value = p.value;
  args.layout = qkv_layout(p);
  args.visibility = visibility_of<int>(p);
  args.causal = p.causal;
  args.window_left = p.window_left;
  args.window_right = p.window_right;
  args.mask = p.mask;
  args.hidden_ranges = p.hidden_ranges;
  args.batch = p.batch;
  args.vectors = has_vectors(p);
  args.drops = p.dropout.threshold > 0;
  args.drop_limit = (p.dropout.threshold << 16) - 1;
  args.drop_scale = p.dropout.scale;
  args.score_scale = p.scale;
  return args;
}

inline ForwardArgs forward_args(const AttentionParams& p) {
  return {attention_args(p), p.out, p.log_sum_exp, p.score_shift, p.out_residue, p.random_state, p.seed, p.offset};
}

inline BackwardArgs backward_args(const AttentionParams& p) {
  BackwardArgs args{};
  static_cast<AttentionArgs&>(args) = attention_args(p);
  args.out = {p.out.data, p.out.batch_stride, p.out.token_stride, p.out.head_stride};
  args.log_sum_exp = p.log_sum_exp;
  args.score_shift = p.score_shift;
  args.out_residue = p.out_residue;
  args.random_state = p.random_state;
  args.d_out = p.d_out;
  args.weights = p.weights;
  args.d_weights = p.d_weights;
  args.of_weights = p.of_weights;
  args.d_query = p.d_query;
  args.d_key = p.d_key;
  args.d_value = p.d_value;
  return args;
}

}  // namespace cuda
}  // namespace pfa
