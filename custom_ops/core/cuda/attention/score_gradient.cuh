// Backward's mathematics on scores: with P the probabilities and R what dropout does to them (0 or drop_scale),
//
//   d_v = (P R)^T d_out,  dP = d_out v^T R,  dS = P (dP - delta),  d_q = D^-0.5 dS k,  d_k = D^-0.5 dS^T q,
//
// delta = sum over d of d_out * out. P is computed anew from q, k and the rows' saved statistics (Dao et al.,
// "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022).
#pragma once

#include "core/cuda/attention/dropout.cuh"
#include "core/cuda/attention/mask.cuh"
#include "core/cuda/attention/softmax.cuh"

namespace pfa {
namespace cuda {

// dS of one element; d_product is that of d_out and v, or 0 where dropout drops the element.
template <class Acc>
__device__ __forceinline__ Acc score_gradient(Acc probability, Acc d_product, Acc drop_scale, Acc delta) {
  return probability * (d_product * drop_scale - delta);
}

// The warp's answer to whether any of kRows rows has a large score.
template <int kRows>
__device__ __forceinline__ bool any_large(const float* shift2) {
  bool large = false;
#pragma unroll
  for (int i = 0; i < kRows; i += 32) large |= shift2[(i + threadIdx.x % 32) % kRows] != 0.0f;
  return __any_sync(0xFFFFFFFFu, large);
}

}  // namespace cuda
}  // namespace pfa
