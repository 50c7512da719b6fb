// Attention dropout on a piece (fragments.cuh): the random numbers that a lane's eight elements draw (philox.h), and
// what becomes of elements that are dropped.
#pragma once

#include "core/cuda/attention/fragments.cuh"

namespace pfa {
namespace cuda {

// The eight elements' random numbers in the upper 16 bits, to be compared with drop_limit, where rows are queries: i0
// and j0 are the piece's first query and key.
__device__ __forceinline__ void numbers_by_query(PhiloxState key, uint32_t head, int i0, int j0,
                                                 uint32_t (&numbers)[8]) {
  const uint32_t lane = threadIdx.x % 32;
  const PhiloxWords words =
      philox(key, static_cast<uint32_t>(j0) / 4 + lane % 4, static_cast<uint32_t>(i0) / 2 + lane / 4, head);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint32_t word = words.w[e / 2 % 2 * 2 + e / 4];
    numbers[e] = e % 2 ? word : word << 16;
  }
}

// The same where rows are keys. A call of Philox covers one query and two neighbouring keys; this lane needs two
// queries and one key, so it makes the call for one of the queries and trades halves with the lane that holds the
// neighbouring key.
__device__ __forceinline__ void numbers_by_key(PhiloxState key, uint32_t head, int j0, int i0, uint32_t (&numbers)[8]) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t g = lane / 4;
  const bool odd = g % 2;
  const PhiloxWords words = philox(key, static_cast<uint32_t>(j0) / 4 + g / 2,
                                   static_cast<uint32_t>(i0) / 2 + lane % 4 * 2 + (odd ? 1 : 0), head);
  const uint32_t mine = odd ? 0x7632 : 0x5410;
  const uint32_t theirs = odd ? 0x5410 : 0x7632;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t own = __byte_perm(words.w[2 * half], words.w[2 * half + 1], mine);
    const uint32_t other =
        __shfl_xor_sync(0xFFFFFFFFu, __byte_perm(words.w[2 * half], words.w[2 * half + 1], theirs), 4);
    const uint32_t first = odd ? other : own;   // query 2 t
    const uint32_t second = odd ? own : other;  // query 2 t + 1
    numbers[4 * half + 0] = first << 16;
    numbers[4 * half + 1] = second << 16;
    numbers[4 * half + 2] = first;
    numbers[4 * half + 3] = second;
  }
}

// Zero, or minus the value, for an element that is dropped. Predicated moves, because selects would crowd the unit that
// computes the random numbers.
__device__ __forceinline__ void zero_dropped(float& value, uint32_t number, uint32_t drop_limit) {
  asm("{\n.reg .pred kept;\nsetp.hi.u32 kept, %1, %2;\n@!kept mov.f32 %0, 0f00000000;\n}"
      : "+f"(value)
      : "r"(number), "r"(drop_limit));
}
__device__ __forceinline__ void negate_dropped(float& value, uint32_t number, uint32_t drop_limit) {
  asm("{\n.reg .pred kept;\nsetp.hi.u32 kept, %1, %2;\n@!kept neg.f32 %0, %0;\n}"
      : "+f"(value)
      : "r"(number), "r"(drop_limit));
}
__device__ __forceinline__ void zero_unless_positive(float& value, float condition) {
  asm("{\n.reg .pred positive;\nsetp.gt.f32 positive, %1, 0f00000000;\n@!positive mov.f32 %0, 0f00000000;\n}"
      : "+f"(value)
      : "f"(condition));
}

}  // namespace cuda
}  // namespace pfa
