// Tensor maps: what the copy engine knows of the tensors it reads, and the copies of tiles by them. The only place,
// with qkv_layout.h, that knows how qkv [B, S, 3, H, D] and out [B, S, H, D] lie.
#pragma once

#include <cuda.h>

#include <stdexcept>
#include <string>

#include "core/cuda/attention/args.h"
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
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(box_columns), 1, 1, kCopyRows, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return encode_tiled()(map, type, 5, const_cast<void*>(data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Maps a tensor [B, S, parts, H, D], for copies of 64 tokens x 64 head dims of one head.
inline CUtensorMap tensor_map(const void* data, DType dtype, const AttentionArgs& args, int parts) {
  const auto size = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  const QkvLayout& layout = args.layout;
  const cuuint64_t row_bytes = size(layout.head_dim) * 2;
  const cuuint64_t part_bytes = row_bytes * layout.num_heads;
  const cuuint64_t token_bytes = part_bytes * parts;
  CUtensorMap map;
  if (!encode_map(&map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                  data,
                  {size(layout.head_dim), size(layout.num_heads), size(parts), size(layout.queries), size(args.batch)},
                  {row_bytes, part_bytes, token_bytes, token_bytes * layout.queries}, kPanelColumns)) {
    throw std::runtime_error("cuTensorMapEncodeTiled does not take the tensors of attention");
  }
  return map;
}

inline CUtensorMap qkv_tensor_map(const void* qkv, DType dtype, const AttentionArgs& args) {
  return tensor_map(qkv, dtype, args, 3);
}

inline CUtensorMap out_tensor_map(const void* out, DType dtype, const AttentionArgs& args) {
  return tensor_map(out, dtype, args, 1);
}

#if PFA_HOPPER_CODE

// Starts copying kRows rows x kColumns head dims of a head's part to panels of 64 columns; kQuery for a tensor that has
// one part only.
template <int kRows, int kColumns>
__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int head, QkvPart part,
                                          int row, int batch) {
#pragma unroll
  for (int column = 0; column < kColumns; column += kPanelColumns) {
#pragma unroll
    for (int r = 0; r < kRows; r += kCopyRows) {
      copy_panel(static_cast<char*>(to) + (column / kPanelColumns * kRows + r) * kRowBytes, map, barrier, column, head,
                 static_cast<int>(part), row + r, batch);
    }
  }
}

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
