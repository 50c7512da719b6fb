// The mask on scores in units of log2: what an element adds, and the elements of a warp's pieces of a tile
// (fragments.cuh).
//
// A float element is added; of other types only whether it is 0 counts. Kernels whose rows are keys read the mask as
// its transpose. Elements past the last query or key are read as the last one: such scores are hidden or dropped
// elsewhere.
#pragma once

#include <cfloat>

#include "core/cuda/attention/fragments.cuh"

namespace pfa {
namespace cuda {

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

// A head's mask as a matrix with the kernel's rows and columns. Offsets count elements.
template <bool kRowsAreKeys>
struct MaskMatrix {
  int64_t offset;
  int64_t row_stride;
  int64_t column_stride;
  int last_row;
  int last_column;

  __device__ __forceinline__ MaskMatrix(const AttentionArgs& args, int64_t mask_offset)
      : offset(mask_offset),
        row_stride(args.mask.strides[kRowsAreKeys ? 3 : 2]),
        column_stride(args.mask.strides[kRowsAreKeys ? 2 : 3]),
        last_row((kRowsAreKeys ? args.visibility.keys : args.visibility.queries) - 1),
        last_column((kRowsAreKeys ? args.visibility.queries : args.visibility.keys) - 1) {}

  __device__ __forceinline__ int64_t row(int i) const { return offset + min(i, last_row) * row_stride; }
  __device__ __forceinline__ int64_t column(int j) const { return min(j, last_column) * column_stride; }
};

// Brings a piece's scores to units of log2 and adds its elements, in one rounding, as everywhere.
template <bool kRowsAreKeys, class Element>
__device__ __forceinline__ void add_elements(const Element* elements, const MaskMatrix<kRowsAreKeys>& mask, int row0,
                                             int column0, float scale_log2, float (&scores)[8]) {
  int64_t rows[2], columns[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) rows[i] = mask.row(row0 + lane_row(2 * i));
#pragma unroll
  for (int i = 0; i < 4; ++i) columns[i] = mask.column(column0 + lane_column(i / 2 * 4 + i % 2));
  Element values[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) values[e] = elements[rows[e / 2 % 2] + columns[e / 4 * 2 + e % 2]];
#pragma unroll
  for (int e = 0; e < 8; ++e) scores[e] = fmaf(scores[e], scale_log2, mask_log2<float>(values[e]));
}

// The same where the mask is the same for all queries: a lane loads an element for each of its keys.
template <bool kRowsAreKeys, class Element>
__device__ __forceinline__ void add_key_elements(const Element* elements, const MaskMatrix<kRowsAreKeys>& mask,
                                                 int row0, int column0, float scale_log2, float (&scores)[8]) {
  constexpr int kKeys = kRowsAreKeys ? 2 : 4;
  float added[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int64_t key = kRowsAreKeys ? mask.row(row0 + lane_row(2 * i))
                                     : mask.offset + mask.column(column0 + lane_column(i / 2 * 4 + i % 2));
    added[i] = mask_log2<float>(elements[key]);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    scores[e] = fmaf(scores[e], scale_log2, added[kRowsAreKeys ? e / 2 % 2 : e / 4 * 2 + e % 2]);
  }
}

// The same for any mask.
template <bool kRowsAreKeys>
__device__ __forceinline__ void add_mask(const AttentionArgs& args, int64_t mask_offset, int row0, int column0,
                                         float scale_log2, float (&scores)[8]) {
  const MaskMatrix<kRowsAreKeys> mask(args, mask_offset);
  with_mask_elements(args.mask, [&](const auto* elements) {
    if (args.mask.strides[2] == 0) {
      add_key_elements(elements, mask, row0, column0, scale_log2, scores);
    } else {
      add_elements(elements, mask, row0, column0, scale_log2, scores);
    }
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

// Starts loading the mask of 16 rows and 2 * kCount columns, in the order of a warp's scores, for add_fetched. Elements
// of 8 bytes are left to that: there are no registers for them.
template <bool kRowsAreKeys, int kCount>
__device__ __forceinline__ void fetch_mask(const AttentionArgs& args, int64_t mask_offset, int row0, int column0,
                                           uint32_t (&bits)[kCount]) {
  const MaskMatrix<kRowsAreKeys> mask(args, mask_offset);
  const auto fetch = [&](auto element) {
    using Element = decltype(element);
    const auto bytes = [](int64_t count) { return count * static_cast<int64_t>(sizeof(Element)); };
    const char* rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows[i] = static_cast<const char*>(args.mask.data) + bytes(mask.row(row0 + lane_row(2 * i)));
    }
    const int column = column0 + lane_column(0);
    if (column0 + 2 * kCount <= mask.last_column + 1) {
      // From column to column, so that no offsets wait in registers.
      const int64_t column_bytes = bytes(mask.column_stride);
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[i] += column * column_bytes;
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          bits[i + e % 2 * 2 + e / 2] = mask_bits(reinterpret_cast<const Element*>(rows[e % 2] + e / 2 * column_bytes));
#pragma unroll
        for (int e = 0; e < 2; ++e) rows[e] += 8 * column_bytes;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 8) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int64_t offset = bytes(mask.column(column + 2 * i + e / 4 * 8 + e % 2));
          bits[i + e] = mask_bits(reinterpret_cast<const Element*>(rows[e / 2 % 2] + offset));
        }
      }
    }
  };
  switch (size_of(args.mask.dtype)) {
    case 4:
      return fetch(uint32_t{});
    case 2:
      return fetch(uint16_t{});
    case 1:
      return fetch(uint8_t{});
    default:
#pragma unroll
      for (int i = 0; i < kCount; ++i) bits[i] = 0;
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

// Brings scores to units of log2 and adds the mask that fetch_mask loaded.
template <bool kRowsAreKeys, int kCount>
__device__ __forceinline__ void add_fetched(const AttentionArgs& args, int64_t mask_offset, int row0, int column0,
                                            float scale_log2, const uint32_t (&bits)[kCount], float (&scores)[kCount]) {
  const auto add = [&](const auto* elements) {
    const MaskMatrix<kRowsAreKeys> mask(args, mask_offset);
#pragma unroll
    for (int i = 0; i < kCount; i += 8) {
      add_elements(elements, mask, row0, column0 + 2 * i, scale_log2, reinterpret_cast<float (&)[8]>(scores[i]));
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

}  // namespace cuda
}  // namespace pfa
