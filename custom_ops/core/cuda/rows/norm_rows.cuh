// What the kernels over rows share: the shape of their thread blocks and sums over the threads of a row.
//
// A row is held in registers by a group of threads, threadIdx.y being the group and threadIdx.x the thread within it; a
// group is a whole number of warps.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {

constexpr int kMaxWarps = 32;
constexpr int kMaxGroups = 15;  // one of a thread block's 16 barriers is __syncthreads

struct RowShape {
  int group_threads = 0;
  int groups = 0;
  int64_t row_groups(int64_t rows) const { return (rows + groups - 1) / groups; }
};

// The shape for rows of `vectors` vectors, `items` of them per thread.
inline RowShape row_shape(int64_t vectors, int items, int block_threads) {
  RowShape shape;
  shape.group_threads = static_cast<int>((vectors + 32 * items - 1) / (32 * items) * 32);
  shape.groups = std::max(1, std::min(kMaxGroups, block_threads / shape.group_threads));
  return shape;
}

inline bool all_aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

// Groups wait each by itself, or (kTogether) all in one barrier. The former leaves them independent. But the compiler
// sees no barrier's number then and reserves all 16, and no more than four such thread blocks fit on a multiprocessor.
template <bool kTogether>
__device__ __forceinline__ void group_barrier() {
  if constexpr (kTogether) {
    __syncthreads();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
  }
}

// Sums N values over the group. `slots` is shared memory of N * kMaxWarps numbers, free until the group's next barrier
// but one.
template <bool kTogether, int N, class A>
__device__ __forceinline__ void group_sum(A (&value)[N], A* slots) {
#pragma unroll
  for (int n = 0; n < N; ++n) value[n] = warp_sum(value[n]);
  const int warps = blockDim.x / 32;
  if (warps == 1) return;
  slots += threadIdx.y * warps * N;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) slots[threadIdx.x / 32 * N + n] = value[n];
  }
  group_barrier<kTogether>();
  // As many neighbouring lanes as there are warps, or the next power of two, hold their sums.
  const int lanes = 1 << (32 - __clz(warps - 1));
  const int warp = threadIdx.x % lanes;
#pragma unroll
  for (int n = 0; n < N; ++n) value[n] = warp < warps ? slots[warp * N + n] : A(0);
#pragma unroll 1
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) value[n] += __shfl_xor_sync(0xFFFFFFFFu, value[n], distance);
  }
}

__device__ __forceinline__ float reciprocal_root(float value) { return rsqrtf(value); }
__device__ __forceinline__ double reciprocal_root(double value) { return 1.0 / sqrt(value); }

// Calls f(T*, P*) with the device types of the activations and of the layer-norm parameters.
template <class F>
void dispatch_norm(DType dtype, DType norm_dtype, F&& f) {
  dispatch_float(dtype, [&](auto* type) {
    if (norm_dtype == dtype) {
      f(type, type);
    } else if (norm_dtype == DType::kFloat32 && is_16bit_float(dtype)) {
      if constexpr (sizeof(*type) == 2) f(type, static_cast<float*>(nullptr));
    } else {
      throw std::runtime_error("layer-norm parameters must have the dtype of x, or float32 for a 16-bit x");
    }
  });
}

// Calls f with the device type of what is 16-bit beside float32 rows with float32 layer-norm parameters.
template <class F>
void dispatch_narrow(DType dtype, DType norm_dtype, DType narrow, F&& f) {
  if (dtype != DType::kFloat32 || norm_dtype != DType::kFloat32) {
    throw std::runtime_error("x of another dtype than the weights must be float32, with float32 layer-norm parameters");
  }
  dispatch_16bit(narrow, f);
}

}  // namespace cuda
}  // namespace pfa
