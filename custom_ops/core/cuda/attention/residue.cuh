// What rounding takes from the result (rounding_residue.h), from a warp's registers to memory and back.
#pragma once

#include "core/cuda/attention/fragments.cuh"
#include "core/rounding_residue.h"

namespace pfa {
namespace cuda {

template <class T>
__device__ __forceinline__ RoundingResidue rounding_residue() {
  return RoundingResidue::of(std::is_same<T, __half>::value ? DType::kFloat16 : DType::kBFloat16);
}

// Of four lanes side by side each has a word of four bytes; each gets the bytes of its own number of all four.
__device__ __forceinline__ uint32_t transpose_bytes(uint32_t word) {
  uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, word, 1);
  word = __byte_perm(word, other, threadIdx.x & 1 ? 0x3715 : 0x6240);
  other = __shfl_xor_sync(0xFFFFFFFFu, word, 2);
  return __byte_perm(word, other, threadIdx.x & 2 ? 0x3276 : 0x5410);
}

// The residues of a strip's sums (fragments.cuh), times a factor for each of a lane's rows, where these are rounded to
// rows row0.. below `rows` of the result of a head.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_residues(const ForwardArgs& args, const HeadState& head,
                                               const float (&sums)[kHeadDim / 2], const float (&factor)[2], int row0,
                                               int rows) {
  if (!args.out_residue) return;
  const RoundingResidue rounding = rounding_residue<T>();
  const int words = static_cast<int>(residue_words(args.head_dim()));
  uint32_t* const of_head = args.out_residue + args.layout.statistics(head.index) * words;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane_row(2 * half);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 4) {
      uint32_t bytes = 0;  // of two columns of each of four pieces side by side
#pragma unroll
      for (int i = 0; i < 4 && n + i < kHeadDim / 8; ++i) {
        const float* pair = &sums[4 * (n + i) + 2 * half];
        const float low = pair[0] * factor[half], high = pair[1] * factor[half];
        const uint32_t packed = pack<T>(low, high);
        const uint32_t both = rounding.encode(low, unpack<T>(packed, 0)) | rounding.encode(high, unpack<T>(packed, 1))
                                                                               << 4;
        bytes |= both << 8 * i;
      }
      bytes = transpose_bytes(bytes);
      const int word = n + static_cast<int>(threadIdx.x % 4);
      if (row < rows && word < words) of_head[static_cast<int64_t>(row) * words + word] = bytes;
    }
  }
}

// Adds to `values`, numbers d.. of a row of the result, what rounding took from them; kCount divides eight, and `row`
// has the row's residues.
template <class T, int kCount>
__device__ __forceinline__ void add_residues(const uint32_t* row, int d, float (&values)[kCount]) {
  static_assert(kResiduesInWord % kCount == 0, "of one word");
  const RoundingResidue rounding = rounding_residue<T>();
  const uint32_t word = row[d / static_cast<int>(kResiduesInWord)] >> 4 * (d % static_cast<int>(kResiduesInWord));
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] += rounding.decode(word >> 4 * i & 15u, values[i]);
}

}  // namespace cuda
}  // namespace pfa
