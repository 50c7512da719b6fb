// Tensor maps: what the copy engine knows of the tensors it reads, and the copies of tiles by them.
#pragma once

#include <cuda.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "core/cuda/attention/heads.cuh"
#include "core/cuda/attention/hopper/instructions.cuh"
#include "core/cuda/context.h"

namespace pfa {
namespace cuda {
namespace hopper {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
#endif
    if (!entry || found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

// A map of `data`, with five dimensions whose first is dense, in copies of kCopyRows rows and box_columns columns.
// False where the copy engine cannot read it.
inline bool encode_map(CUtensorMap* map, CUtensorMapDataType type, const void* data, const cuuint64_t (&sizes)[5],
                       const cuuint64_t (&strides)[4], int box_columns) {
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(box_columns), 1, kCopyRows, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return encode_tiled()(map, type, 5, const_cast<void*>(data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Packed sequences: row r of n has coordinate kPackedRows - n + r, so that what lies past its last row is past the
// dimension's end, and reads as zeros. The next coordinate is the token behind the sequence's last, a token a step too.
// Both together are kPackedRows tokens too far; the last coordinate, kPackedRows as well, brings them back, for
// addresses are counted modulo 2^64.
constexpr int kPackedRows = 1 << 30;
constexpr int64_t kOriginBytes = int64_t{1} << 34;  // kPackedRows times that is 2^64

// Maps `count` heads of `of_sequence` rows, or of packed sequences, for copies of 64 rows x 64 head dims. The
// dimensions are (head dim, head, row, sequence, origin).
template <class T>
CUtensorMap heads_tensor_map(const Heads<const void>& heads, int64_t count, int64_t of_sequence,
                             const AttentionArgs& args) {
  constexpr bool kIsHalf = std::is_same<T, __half>::value;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const auto bytes = [&](int64_t stride, int64_t n) { return size(n > 1 ? stride * 2 : 16); };
  const bool packed = args.is_packed();
  const cuuint64_t all = INT_MAX;
  CUtensorMap map;
  if (!encode_map(&map, kIsHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, heads.data,
                  {size(args.layout.head_dim), size(count), packed ? size(kPackedRows) : size(of_sequence),
                   packed ? all : size(args.batch), packed ? all : 1},
                  {bytes(heads.head_stride, count), bytes(heads.token_stride, packed ? 2 : of_sequence),
                   packed ? bytes(heads.token_stride, 2) : bytes(heads.batch_stride, args.batch),
                   packed ? size(kOriginBytes - heads.token_stride * 2) : 16},
                  kPanelColumns)) {
    throw std::runtime_error("cuTensorMapEncodeTiled does not take the tensors of attention");
  }
  return map;
}

template <class T>
CUtensorMap query_tensor_map(const Heads<const void>& heads, const AttentionArgs& args) {
  return heads_tensor_map<T>(heads, args.layout.num_heads, args.visibility.queries, args);
}

template <class T>
CUtensorMap key_tensor_map(const Heads<const void>& heads, const AttentionArgs& args) {
  const QkvLayout& layout = args.layout;
  return heads_tensor_map<T>(heads, layout.num_heads / layout.group, args.visibility.keys, args);
}

#if PFA_HOPPER_CODE

// Where a sequence's rows lie in a tensor map of heads.
struct MapRows {
  int first;     // coordinate of its row 0
  int sequence;  // coordinate
};

template <bool kPacked>
__device__ __forceinline__ MapRows map_rows(const int32_t* starts, const HeadState& head, int length) {
  if (!kPacked) return {0, static_cast<int>(head.index.batch)};
  return {kPackedRows - length, starts[head.index.batch] + length};
}

template <bool kPacked>
__device__ __forceinline__ MapRows query_map_rows(const AttentionArgs& args, const HeadState& head) {
  return map_rows<kPacked>(args.layout.query_starts, head, head.visibility.queries);
}

template <bool kPacked>
__device__ __forceinline__ MapRows key_map_rows(const AttentionArgs& args, const HeadState& head) {
  return map_rows<kPacked>(args.layout.key_starts, head, head.visibility.keys);
}

// Starts copying kRows rows x kColumns head dims of a head to panels of 64 columns. The first row and the sequence are
// the map's coordinates.
template <int kRows, int kColumns, bool kPacked>
__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int head, int row,
                                          int sequence) {
#pragma unroll
  for (int column = 0; column < kColumns; column += kPanelColumns) {
#pragma unroll
    for (int r = 0; r < kRows; r += kCopyRows) {
      copy_panel(static_cast<char*>(to) + (column / kPanelColumns * kRows + r) * kRowBytes, map, barrier, column, head,
                 row + r, sequence, kPacked ? kPackedRows : 0);
    }
  }
}

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
