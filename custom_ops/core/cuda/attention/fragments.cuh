// The 16 x 16 pieces of a tile that one warp holds as tensor-core accumulators, and what attention does to them.
//
// Of such a piece lane 4 g + t (g < 8, t < 4) holds eight numbers c[0..7]: c[e] lies in row g + 8 * (e / 2 % 2) and
// column 2 t + e % 2 + 8 * (e / 4). The forward pass has queries as rows ("rows are queries"); the gradients of keys
// and values have keys as rows, so that P^T and dS^T can be operands from registers.
#pragma once

#include <type_traits>

#include "core/cuda/attention/common.cuh"

namespace pfa {
namespace cuda {

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

// Scores to units of log2, with the mask, in one rounding as everywhere (add_fetched). Elements outside of seq_len read
// the last row or column instead.
template <bool kRowsAreKeys>
__device__ __forceinline__ void add_mask(const AttentionArgs& args, int64_t mask_offset, int row0, int column0,
                                         float scale_log2, float (&scores)[8]) {
  const int64_t row_stride = args.mask.strides[kRowsAreKeys ? 3 : 2];
  const int64_t column_stride = args.mask.strides[kRowsAreKeys ? 2 : 3];
  int64_t rows[2], columns[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) rows[i] = mask_offset + min(row0 + lane_row(2 * i), args.seq_len - 1) * row_stride;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    columns[i] = min(column0 + lane_column(i / 2 * 4 + i % 2), args.seq_len - 1) * column_stride;
  with_mask_elements(args.mask, [&](const auto* elements) {
    if (args.mask.strides[2] == 0) {  // the same for all queries
      constexpr int kKeys = kRowsAreKeys ? 2 : 4;
      float added[kKeys];
#pragma unroll
      for (int i = 0; i < kKeys; ++i)
        added[i] = mask_log2<float>(elements[kRowsAreKeys ? rows[i] : rows[0] + columns[i]]);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        scores[e] = fmaf(scores[e], scale_log2, added[kRowsAreKeys ? e / 2 % 2 : e / 4 * 2 + e % 2]);
      }
      return;
    }
    std::remove_cv_t<std::remove_pointer_t<decltype(elements)>> values[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] = elements[rows[e / 2 % 2] + columns[e / 4 * 2 + e % 2]];
#pragma unroll
    for (int e = 0; e < 8; ++e) scores[e] = fmaf(scores[e], scale_log2, mask_log2<float>(values[e]));
  });
}

// A mask element in 32 bits, to be understood later: as it is, but a double as a float, rounded towards zero so that it
// stays finite, and 1 for a nonzero int64.
template <class T>
__device__ __forceinline__ uint32_t mask_bits(const T* from) {
  if constexpr (std::is_same<T, double>::value) {
    return __float_as_uint(*from == -infinity<double>() ? -INFINITY : __double2float_rz(*from));
  } else if constexpr (sizeof(T) == 8) {
    return *from != 0;
  } else {
    uint32_t bits;
    if constexpr (sizeof(T) == 4) {
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(bits) : "l"(from));
    } else if constexpr (sizeof(T) == 2) {
      asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(bits) : "l"(from));
    } else {
      asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(bits) : "l"(from));
    }
    return bits;
  }
}

// Starts loading the mask of 16 rows and 2 * kCount columns, in the order in which a warp holds their scores, unless
// its elements have 8 bytes: there are no registers for those. Elements outside of seq_len read the last row or column
// instead.
template <bool kRowsAreKeys, int kCount>
__device__ __forceinline__ void fetch_mask(const AttentionArgs& args, int64_t mask_offset, int row0, int column0,
                                           uint32_t (&bits)[kCount]) {
  const auto fetch = [&](auto element) {
    using T = decltype(element);
    const int64_t row_bytes = args.mask.strides[kRowsAreKeys ? 3 : 2] * static_cast<int64_t>(sizeof(T));
    const int64_t column_bytes = args.mask.strides[kRowsAreKeys ? 2 : 3] * static_cast<int64_t>(sizeof(T));
    const char* rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = min(row0 + lane_row(2 * i), args.seq_len - 1);
      rows[i] =
          static_cast<const char*>(args.mask.data) + mask_offset * static_cast<int64_t>(sizeof(T)) + row * row_bytes;
    }
    const int column = column0 + lane_column(0);
    if (column0 + 2 * kCount <= args.seq_len) {
      // From column to column, so that no offsets wait in registers.
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[i] += column * column_bytes;
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          bits[i + e % 2 * 2 + e / 2] = mask_bits(reinterpret_cast<const T*>(rows[e % 2] + e / 2 * column_bytes));
#pragma unroll
        for (int e = 0; e < 2; ++e) rows[e] += 8 * column_bytes;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 8) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int64_t offset = min(column + 2 * i + e / 4 * 8 + e % 2, args.seq_len - 1) * column_bytes;
          bits[i + e] = mask_bits(reinterpret_cast<const T*>(rows[e / 2 % 2] + offset));
        }
      }
    }
  };
  switch (args.mask.dtype) {
    case DType::kFloat64:
    case DType::kInt64:
#pragma unroll
      for (int i = 0; i < kCount; ++i) bits[i] = 0;
      return;
    case DType::kFloat32:
    case DType::kInt32:
      return fetch(uint32_t{});
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt16:
      return fetch(uint16_t{});
    default:
      return fetch(uint8_t{});
  }
}

// Calls f with the function that says what mask_bits add to a score, in units of log2.
template <class F>
__device__ __forceinline__ void with_added_by_bits(const Mask& mask, F&& f) {
  switch (mask.dtype) {
    case DType::kFloat32:
    case DType::kFloat64:
      return f([](uint32_t bits) { return mask_log2<float>(__uint_as_float(bits)); });
    case DType::kFloat16:
      return f([](uint32_t bits) { return mask_log2<float>(__ushort_as_half(static_cast<unsigned short>(bits))); });
    case DType::kBFloat16:
      return f([](uint32_t bits) { return mask_log2<float>(__uint_as_float(bits << 16)); });
    default:
      return f([](uint32_t bits) { return mask_log2<float>(bits); });
  }
}

// Scores to units of log2, with the mask from fetch_mask; elements of 8 bytes are loaded here, a piece at a time.
template <bool kRowsAreKeys, int kCount>
__device__ __forceinline__ void add_fetched(const AttentionArgs& args, int64_t mask_offset, int row0, int column0,
                                            float scale_log2, const uint32_t (&bits)[kCount], float (&scores)[kCount]) {
  const auto add = [&](const auto* elements) {
#pragma unroll
    for (int i = 0; i < kCount; i += 8) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int row = min(row0 + lane_row(e), args.seq_len - 1);
        const int column = min(column0 + 2 * i + lane_column(e), args.seq_len - 1);
        const int64_t query = kRowsAreKeys ? column : row;
        const int64_t key = kRowsAreKeys ? row : column;
        const float added =
            mask_log2<float>(elements[mask_offset + query * args.mask.strides[2] + key * args.mask.strides[3]]);
        scores[i + e] = fmaf(scores[i + e], scale_log2, added);
      }
      asm volatile("" ::: "memory");  // keeps the loads of all pieces from being in flight together
    }
  };
  if (args.mask.dtype == DType::kFloat64) return add(static_cast<const double*>(args.mask.data));
  if (args.mask.dtype == DType::kInt64) return add(static_cast<const uint64_t*>(args.mask.data));
  with_added_by_bits(args.mask, [&](auto added) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = fmaf(scores[i], scale_log2, added(bits[i]));
  });
}

// Stores 16 rows that a warp holds as accumulators of 8 columns each, through the warp's own 16 rows of shared memory
// (kStride elements apart), as whole vectors.
template <class T, int kHeadDim, int kStride>
__device__ __forceinline__ void store_rows(const float (&sums)[kHeadDim / 8][4], float factor0, float factor1,
                                           T* shared, T* to, int64_t stride, int row0, const AttentionArgs& args) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    T* place = shared + lane / 4 * kStride + 8 * n + lane % 4 * 2;
    if constexpr (std::is_same<T, float>::value) {
      *reinterpret_cast<float2*>(place) = make_float2(sums[n][0] * factor0, sums[n][1] * factor0);
      *reinterpret_cast<float2*>(place + 8 * kStride) = make_float2(sums[n][2] * factor1, sums[n][3] * factor1);
    } else {
      *reinterpret_cast<uint32_t*>(place) = pack<T>(sums[n][0] * factor0, sums[n][1] * factor0);
      *reinterpret_cast<uint32_t*>(place + 8 * kStride) = pack<T>(sums[n][2] * factor1, sums[n][3] * factor1);
    }
  }
  __syncwarp();
  if (args.vectors) {
    constexpr int kVector = 16 / sizeof(T);
    constexpr int kVectors = kHeadDim / kVector;
#pragma unroll
    for (int i = lane; i < 16 * kVectors; i += 32) {
      const int row = i / kVectors;
      const int d = i % kVectors * kVector;
      if (row0 + row < args.seq_len && d < args.head_dim) {
        *reinterpret_cast<uint4*>(to + (row0 + row) * stride + d) =
            *reinterpret_cast<const uint4*>(shared + row * kStride + d);
      }
    }
  } else {
    for (int i = lane; i < 16 * kHeadDim; i += 32) {
      const int row = i / kHeadDim;
      const int d = i % kHeadDim;
      if (row0 + row < args.seq_len && d < args.head_dim) to[(row0 + row) * stride + d] = shared[row * kStride + d];
    }
  }
  __syncwarp();
}

}  // namespace cuda
}  // namespace pfa
