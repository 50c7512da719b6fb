// Number types on the device: conversion to and from the accumulator type, 16-byte vectors, and sums over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>

#include "core/params.h"
#include "core/philox.h"

namespace pfa {
namespace cuda {

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T narrow(Accumulator<T> value) {
  return static_cast<T>(value);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T value[N];
};

template <class T>
constexpr int kVectorSize = 16 / sizeof(T);

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* source) {
  return *reinterpret_cast<const Vector<T, N>*>(source);
}

template <int N, class T>
__device__ __forceinline__ void widen(const Vector<T, N>& vector, Accumulator<T> (&result)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = widen(vector.value[i]);
}

// N consecutive numbers as accumulators.
template <int N, class T>
__device__ __forceinline__ void load(const T* source, Accumulator<T> (&result)[N]) {
  widen(load_vector<N>(source), result);
}

template <int N, class T>
__device__ __forceinline__ void store(T* target, const Accumulator<T> (&source)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.value[i] = narrow<T>(source[i]);
  *reinterpret_cast<Vector<T, N>*>(target) = vector;
}

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

// Multiplies N elements of the output dropout by 0 or scale; index is that of the first and a multiple of N, a divisor of 8.
template <int N, class A>
__device__ __forceinline__ void apply_output_dropout(PhiloxState state, uint32_t threshold, A scale, int64_t index,
                                                     A (&value)[N]) {
  static_assert(N == 1 || N == 2 || N == 4 || N == 8, "one call serves eight elements");
  const uint64_t call = static_cast<uint64_t>(index) / 8;
  const PhiloxWords words = philox(state, static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), 0);
  const int first = N == 8 ? 0 : static_cast<int>(index % 8);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int number = first + i;
    const uint32_t low = number & 2 ? words.w[1] : words.w[0];
    const uint32_t high = number & 2 ? words.w[3] : words.w[2];
    const uint32_t word = number & 4 ? high : low;
    const uint32_t random = number & 1 ? word >> 16 : word & 0xFFFFu;
    value[i] = random >= threshold ? value[i] * scale : A(0);
  }
}

// Calls f with a null pointer to the device type of a float dtype.
template <class F>
void dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      throw std::runtime_error("expected a float dtype");
  }
}

}  // namespace cuda
}  // namespace pfa
