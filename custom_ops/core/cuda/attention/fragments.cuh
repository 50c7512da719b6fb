// The 16 x 16 pieces of a tile that a warp holds as tensor-core accumulators, and the packing of their numbers.
//
// Lane 4 g + t (g < 8, t < 4) holds eight numbers c[0..7] of a piece: c[e] lies in row g + 8 * (e / 2 % 2) and column
// 2 t + e % 2 + 8 * (e / 4); PTX ISA, "Matrix Fragments for mma.m16n8k16" and "Register Fragments for wgmma". Pieces
// side by side follow each other. The forward pass has queries as rows; the gradients of keys and values have keys as
// rows, so that P^T and dS^T can be operands from registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "core/cuda/attention/args.h"
#include "core/cuda/attention/heads.cuh"

namespace pfa {
namespace cuda {

template <class Acc>
__device__ __forceinline__ Acc infinity() {
  return static_cast<Acc>(INFINITY);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same<T, __half>::value) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The first (low) or second number of a packed pair.
template <class T>
__device__ __forceinline__ float unpack(uint32_t packed, int which) {
  if constexpr (std::is_same<T, __half>::value) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(which ? packed >> 16 : packed)));
  } else {
    return __uint_as_float(which ? packed & 0xFFFF0000u : packed << 16);
  }
}

// A packed pair with zeros for negative numbers.
__device__ __forceinline__ uint32_t clear_negative(uint32_t packed) {
  uint32_t signs;
  asm("prmt.b32 %0, %1, %1, 0xBB99;" : "=r"(signs) : "r"(packed));
  return packed & ~signs;
}

__device__ __forceinline__ int lane_row(int e) { return static_cast<int>(threadIdx.x % 32 / 4) + e / 2 % 2 * 8; }
__device__ __forceinline__ int lane_column(int e) { return static_cast<int>(threadIdx.x % 4) * 2 + e % 2 + e / 4 * 8; }

// The columns before `column` among those that a lane holds of up to eight pieces side by side, as bits: bit 2 n + j
// stands for column 8 n + lane_column(j).
__device__ __forceinline__ uint32_t lane_columns_before(int column) {
  const int of_lane = column - lane_column(0);
  const int count = (of_lane >> 3) * 2 + min(of_lane & 7, 2);
  return __funnelshift_lc(~0u, 0u, min(max(count, 0), 32));
}
__device__ __forceinline__ uint32_t lane_columns_in(int first, int end) {
  return lane_columns_before(end) & ~lane_columns_before(first);
}

}  // namespace cuda
}  // namespace pfa
