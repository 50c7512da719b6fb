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

// N neighbouring numbers as they lie in memory.
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
__device__ __forceinline__ void store_vector(T* target, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(target) = vector;
}

__device__ __forceinline__ float2 widen_pair(__half2 pair) { return __half22float2(pair); }
__device__ __forceinline__ float2 widen_pair(__nv_bfloat162 pair) {
  const uint32_t bits = reinterpret_cast<const uint32_t&>(pair);
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u)};
}
__device__ __forceinline__ void narrow_pair(float low, float high, __half2& pair) {
  pair = __floats2half2_rn(low, high);
}
__device__ __forceinline__ void narrow_pair(float low, float high, __nv_bfloat162& pair) {
  pair = __floats2bfloat162_rn(low, high);
}

// 16-bit numbers go by twos, so that a register holds two of them.
template <class T>
struct PairOf;
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

template <int N, class T>
__device__ __forceinline__ void widen(const Vector<T, N>& vector, Accumulator<T> (&result)[N]) {
  if constexpr (sizeof(T) == 2 && N > 1) {
    const auto* pairs = reinterpret_cast<const typename PairOf<T>::type*>(&vector);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 pair = widen_pair(pairs[i]);
      result[2 * i] = pair.x;
      result[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] = widen(vector.value[i]);
  }
}

template <class T, int N>
__device__ __forceinline__ Vector<T, N> narrow_vector(const Accumulator<T> (&source)[N]) {
  Vector<T, N> vector;
  if constexpr (sizeof(T) == 2 && N > 1) {
    auto* pairs = reinterpret_cast<typename PairOf<T>::type*>(&vector);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) narrow_pair(source[2 * i], source[2 * i + 1], pairs[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) vector.value[i] = narrow<T>(source[i]);
  }
  return vector;
}

// N consecutive numbers as accumulators.
template <int N, class T>
__device__ __forceinline__ void load(const T* source, Accumulator<T> (&result)[N]) {
  widen(load_vector<N>(source), result);
}

template <int N, class T>
__device__ __forceinline__ void store(T* target, const Accumulator<T> (&source)[N]) {
  store_vector(target, narrow_vector<T, N>(source));
}

// A product that is rounded by itself, and not fused with a sum it goes into: so that the sum has the same bits whether
// or not the product is also stored.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

// The random numbers of output dropout of the eight elements that hold element `index`.
__device__ __forceinline__ PhiloxWords output_words(PhiloxState state, int64_t index) {
  const uint64_t call = static_cast<uint64_t>(index) / 8;
  return philox(state, static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), 0);
}

// Whether dropout keeps element `number` of the eight of a call, threshold > 0.
__device__ __forceinline__ bool is_kept(const PhiloxWords& words, uint32_t threshold, int number) {
  const uint32_t limit = (threshold << 16) - 1;  // a number in the upper half exceeds it when it is >= threshold
  const uint32_t low = number & 2 ? words.w[1] : words.w[0];
  const uint32_t high = number & 2 ? words.w[3] : words.w[2];
  const uint32_t word = number & 4 ? high : low;
  return (number & 1 ? word : word << 16) > limit;
}

// Multiplies N elements by 0 or scale; index is that of the first and a multiple of N, a divisor of 8.
template <int N, class A>
__device__ __forceinline__ void apply_output_dropout(const PhiloxWords& words, uint32_t threshold, A scale,
                                                     int64_t index, A (&value)[N]) {
  static_assert(N == 1 || N == 2 || N == 4 || N == 8, "one call serves eight elements");
  const int first = N == 8 ? 0 : static_cast<int>(index % 8);
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = is_kept(words, threshold, first + i) ? value[i] * scale : A(0);
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

// The same for a 16-bit one.
template <class F>
void dispatch_16bit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      throw std::runtime_error("expected a 16-bit float dtype");
  }
}

}  // namespace cuda
}  // namespace pfa
