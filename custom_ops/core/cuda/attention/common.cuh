// What all attention kernels share: their arguments, the mask and the dropout bits.
//
// Kernels work with scores in units of log2: s2 = (q . k) * D^-0.5 * log2(e) + mask * log2(e), so that exp2 does for
// exp.
//
// Backward finds the probabilities of forward only if both subtract the same number from the same scores, rounded
// alike. Where a row's highest score is beyond kLargeScore, the last bit of a score is worth so much that this counts:
// both scale a score and subtract from it in one operation, but with a mask, where the masked score is rounded first;
// and backward subtracts the highest score before the sum of exponentials, beside which that would be lost. Elsewhere
// backward subtracts both at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "core/cuda/context.h"
#include "core/cuda/numbers.cuh"
#include "core/params.h"
#include "core/philox.h"

namespace pfa {
namespace cuda {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kLargeScore = 256.0f;
constexpr int kBiasCopies = 8;  // so that blocks rarely add to the same number at once

// Everything a kernel reads of Params, by value. Rows of q, k, v are token_stride elements apart: [B, S, 3, H, D].
struct AttentionArgs {
  const void* qkv;
  void* out;               // [B, S, H, D]
  void* log_sum_exp;       // [B, H, S], or null: not wanted
  void* score_shift;       // [B, H, S] in log2 units, or null: not wanted
  uint64_t* random_state;  // or null: not wanted
  uint64_t seed;           // of the forward pass
  uint64_t offset;
  Mask mask;
  int64_t batch;
  int64_t num_heads;
  uint32_t first_head;   // of the whole layer's
  uint32_t total_heads;  // of the whole layer
  int seq_len;
  int head_dim;
  bool causal;
  bool vectors;         // rows start at multiples of 16 bytes
  uint32_t drop_limit;  // an element is kept when its 16-bit number << 16 exceeds this; unused where `drops` is false
  bool drops;
  double score_scale;  // D^-0.5
  double drop_scale;

  const void* d_out;  // [B, S, H, D]
  void* d_qkv;        // [B, S, 3, H, D]
  void* delta;        // [B, H, rows_padded]: sum over d of d_out * out
  void* lse2;    // [B, H, rows_padded]: log_sum_exp * log2(e), and score_shift unless that is large; +inf past seq_len
  void* shift2;  // [B, H, rows_padded]: score_shift if it is large, else 0
  int rows_padded;  // seq_len rounded up to whole tiles of queries

  // For blocks that add to d_q together; null and 0 for others. Head h has slot h % dq_slots of the sums; the first
  // dq_lent_slots lie in memory that will be another result's. What dq_lag means is said in
  // attention_hopper_backward.cu.
  float* dq_lent_sum;  // [dq_lent_slots, rows_padded, dq_columns]
  float* dq_sum;       // [dq_slots - dq_lent_slots, rows_padded, dq_columns]
  int dq_lent_slots;
  int dq_columns;  // head_dim rounded up to whole blocks of columns
  int dq_slots;
  int dq_lag;
  // [1 + 2 * dq_slots]: how many tiles blocks have begun; and of each slot, are in the sums, and have left them
  uint32_t* progress;
  float* bias_sums;  // [kBiasCopies, 3, H, D]: parts of the gradient of the QKV bias; or null: not wanted

  __host__ __device__ int64_t heads_dim() const { return num_heads * head_dim; }
  __host__ __device__ int64_t token_stride() const { return 3 * heads_dim(); }
};

inline AttentionArgs attention_args(const Params& p) {
  AttentionArgs a{};
  a.qkv = p.qkv;
  a.out = p.attn_out;
  a.log_sum_exp = p.log_sum_exp;
  a.score_shift = p.score_shift;
  a.random_state = p.random_state;
  a.seed = p.seed;
  a.offset = p.offset;
  a.mask = p.mask;
  a.batch = p.batch;
  a.num_heads = p.num_heads;
  a.first_head = static_cast<uint32_t>(p.first_head);
  a.total_heads = static_cast<uint32_t>(p.heads_in_all());
  a.seq_len = static_cast<int>(p.seq_len);
  a.head_dim = static_cast<int>(p.head_dim);
  a.causal = p.causal;
  a.vectors = p.head_dim * size_of(p.dtype) % 16 == 0 && reinterpret_cast<uintptr_t>(p.qkv) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(p.attn_out) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(p.d_attn_out) % 16 == 0 && reinterpret_cast<uintptr_t>(p.d_qkv) % 16 == 0;
  a.drops = p.attn_dropout.threshold > 0;
  a.drop_limit = (p.attn_dropout.threshold << 16) - 1;
  a.score_scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  a.drop_scale = p.attn_dropout.scale;
  a.d_out = p.d_attn_out;
  a.d_qkv = p.d_qkv;
  return a;
}

// Where a block finds the head it works on.
struct HeadIndex {
  int64_t batch;
  int64_t head;
  uint32_t flat;    // batch * H + head
  uint32_t random;  // the same among the heads of the whole layer, as dropout counts
};

__device__ __forceinline__ HeadIndex head_index(const AttentionArgs& a, uint32_t flat) {
  const uint32_t heads = static_cast<uint32_t>(a.num_heads);
  const uint32_t batch = flat / heads;
  const uint32_t head = flat % heads;
  return {batch, head, flat, batch * a.total_heads + a.first_head + head};
}

// The sums of d_q of a head: [rows_padded, dq_columns].
__device__ __forceinline__ float* dq_sums(const AttentionArgs& a, uint32_t head) {
  const int slot = static_cast<int>(head % a.dq_slots);
  float* first = slot < a.dq_lent_slots ? a.dq_lent_sum : a.dq_sum;
  return first +
         static_cast<int64_t>(slot < a.dq_lent_slots ? slot : slot - a.dq_lent_slots) * a.rows_padded * a.dq_columns;
}

// `which` 0, 1, 2: q, k, v (or their gradients) of a head, at token 0.
template <class T>
__device__ __forceinline__ T* qkv_head(const AttentionArgs& a, void* base, const HeadIndex& h, int which) {
  return static_cast<T*>(base) + h.batch * a.seq_len * a.token_stride() + which * a.heads_dim() + h.head * a.head_dim;
}

template <class T>
__device__ __forceinline__ T* out_head(const AttentionArgs& a, void* base, const HeadIndex& h) {
  return static_cast<T*>(base) + h.batch * a.seq_len * a.heads_dim() + h.head * a.head_dim;
}

template <class Acc>
__device__ __forceinline__ Acc infinity() {
  return static_cast<Acc>(INFINITY);
}

// What backward needs to know of a row: its highest score in log2 units, and the sum of exponentials beside it. The
// highest score may be 1e9 or -1e9, where a rounding error outweighs everything else: it is kept as it is.
template <class Acc>
__device__ __forceinline__ void store_row_statistics(const AttentionArgs& a, uint32_t head, int row, Acc maximum,
                                                     Acc sum) {
  if (!a.log_sum_exp || row >= a.seq_len) return;
  const int64_t index = head * static_cast<int64_t>(a.seq_len) + row;
  static_cast<Acc*>(a.log_sum_exp)[index] = sum > 0 ? log(sum) : infinity<Acc>();
  static_cast<Acc*>(a.score_shift)[index] = sum > 0 ? maximum : Acc(0);
}

// A product of queries and keys in units of log2, rounded as such: no subtraction is fused to it.
__device__ __forceinline__ float scaled(float product, float scale_log2) { return __fmul_rn(product, scale_log2); }
__device__ __forceinline__ double scaled(double product, double scale_log2) { return __dmul_rn(product, scale_log2); }

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

// What a mask element adds to a score in log2 units. Finite values stay finite, because a product rounded towards zero
// does not overflow: only -inf, false and 0 forbid a key.
__device__ __forceinline__ float additive_mask(float value) { return __fmul_rz(value, static_cast<float>(kLog2e)); }
__device__ __forceinline__ double additive_mask(double value) { return __dmul_rz(value, kLog2e); }

// One mask element in log2 units: floats are added, of other types only whether they are 0 counts.
template <class Acc, class T>
__device__ __forceinline__ Acc mask_log2(T value) {
  return value == T(0) ? -infinity<Acc>() : Acc(0);
}
template <>
__device__ __forceinline__ float mask_log2<float, float>(float value) {
  return additive_mask(value);
}
template <>
__device__ __forceinline__ double mask_log2<double, float>(float value) {
  return additive_mask(static_cast<double>(value));
}
template <>
__device__ __forceinline__ float mask_log2<float, double>(double value) {
  return value == -infinity<double>() ? -INFINITY
                                      : additive_mask(static_cast<float>(max(value, static_cast<double>(-FLT_MAX))));
}
template <>
__device__ __forceinline__ double mask_log2<double, double>(double value) {
  return additive_mask(value);
}
template <>
__device__ __forceinline__ float mask_log2<float, __half>(__half value) {
  return additive_mask(__half2float(value));
}
template <>
__device__ __forceinline__ double mask_log2<double, __half>(__half value) {
  return additive_mask(static_cast<double>(__half2float(value)));
}
template <>
__device__ __forceinline__ float mask_log2<float, __nv_bfloat16>(__nv_bfloat16 value) {
  return additive_mask(__bfloat162float(value));
}
template <>
__device__ __forceinline__ double mask_log2<double, __nv_bfloat16>(__nv_bfloat16 value) {
  return additive_mask(static_cast<double>(__bfloat162float(value)));
}

// Calls f with a pointer to the mask's elements, of their type or, where only zeros count, of an integer of their size.
template <class F>
__device__ __forceinline__ void with_mask_elements(const Mask& mask, F&& f) {
  switch (mask.dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(mask.data));
    case DType::kFloat64:
      return f(static_cast<const double*>(mask.data));
    case DType::kFloat16:
      return f(static_cast<const __half*>(mask.data));
    case DType::kBFloat16:
      return f(static_cast<const __nv_bfloat16*>(mask.data));
    case DType::kInt16:
      return f(static_cast<const uint16_t*>(mask.data));
    case DType::kInt32:
      return f(static_cast<const uint32_t*>(mask.data));
    case DType::kInt64:
      return f(static_cast<const uint64_t*>(mask.data));
    default:
      return f(static_cast<const uint8_t*>(mask.data));
  }
}

// To be called by all threads of a forward kernel: leaves the random state to the stages that come later.
__device__ __forceinline__ void write_random_state(const AttentionArgs& a) {
  if (blockIdx.x == 0 && threadIdx.x == 0 && a.random_state) {
    a.random_state[0] = a.seed;
    a.random_state[1] = a.offset;
  }
}

__device__ __forceinline__ PhiloxState forward_philox(const AttentionArgs& a) {
  return philox_state(a.seed, a.offset, DropoutStage::kAttention);
}

__device__ __forceinline__ PhiloxState backward_philox(const AttentionArgs& a) {
  return philox_state(a.random_state[0], a.random_state[1], DropoutStage::kAttention);
}

}  // namespace cuda
}  // namespace pfa
