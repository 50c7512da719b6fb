// Tensor maps and the order of tiles, for the Hopper kernels.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "core/cuda/attention/common.cuh"
#include "core/cuda/attention/hopper/instructions.cuh"
#include "core/cuda/attention/launch.h"

namespace pfa {
namespace cuda {
namespace hopper {

// What a block works on: tile `tile` of `tiles` of head `head`.
struct TileIndex {
  uint32_t head;
  int tile;
  int tiles;
};

// Tiles start in the order of `index`: head by head. With causal masks, where tiles differ in length, heads go in
// groups that fit in the L2 cache, and within a group the same tile of every head comes before the next, so that long
// tiles start first.
__device__ __forceinline__ TileIndex tile_index(const AttentionArgs& args, uint32_t index, int heads_per_group,
                                                int tiles) {
  const uint32_t heads = static_cast<uint32_t>(args.batch * args.num_heads);
  const uint32_t first = index / (heads_per_group * tiles) * heads_per_group;
  const uint32_t size = min(static_cast<uint32_t>(heads_per_group), heads - first);
  const uint32_t place = index - first * tiles;
  return {first + place % size, static_cast<int>(place / size), tiles};
}

inline int heads_per_group(const AttentionArgs& args, int bytes_per_element) {
  if (!args.causal) return 1;
  constexpr int64_t kCacheBytes = 24 << 20;
  const int64_t head_bytes = static_cast<int64_t>(bytes_per_element) * args.seq_len * args.head_dim;
  return static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(args.batch * args.num_heads, kCacheBytes / head_bytes)));
}

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

// Of a tensor [B, S, parts, H, D], in copies of 64 tokens x 64 head dims of one head.
inline CUtensorMap tensor_map(const void* data, DType dtype, const AttentionArgs& args, int parts) {
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(args.head_dim) * 2;
  const cuuint64_t part_bytes = row_bytes * args.num_heads;
  const cuuint64_t token_bytes = part_bytes * parts;
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(args.head_dim), static_cast<cuuint64_t>(args.num_heads),
                               static_cast<cuuint64_t>(parts), static_cast<cuuint64_t>(args.seq_len),
                               static_cast<cuuint64_t>(args.batch)};
  const cuuint64_t strides[4] = {row_bytes, part_bytes, token_bytes, token_bytes * args.seq_len};
  const cuuint32_t box[5] = {kBlockColumns, 1, 1, kCopyRows, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode_tiled()(
      &map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)));
  }
  return map;
}

// A key mask is the same for all queries. Of the others, a tiled one comes to shared memory with the copy engine.
enum MaskKind { kNoMask, kKeyMask, kFullMask, kTiledMask };

// Calls f with the kind of the mask but for how it comes to shared memory, as a std::integral_constant.
template <class F>
void with_mask_kind(const AttentionArgs& args, F&& f) {
  if (!args.mask.data) {
    f(std::integral_constant<MaskKind, kNoMask>{});
  } else if (args.mask.strides[2] == 0) {
    f(std::integral_constant<MaskKind, kKeyMask>{});
  } else {
    f(std::integral_constant<MaskKind, kFullMask>{});
  }
}

constexpr int64_t kMaxTiledMaskBytes = 4;  // of an element

// Of a mask, in copies of 64 queries x 128 bytes of keys; false where the copy engine cannot read it.
inline bool mask_tensor_map(const AttentionArgs& args, CUtensorMap* map) {
  const Mask& mask = args.mask;
  const int64_t size = size_of(mask.dtype);
  if (size > kMaxTiledMaskBytes || mask.strides[3] != 1 || reinterpret_cast<uintptr_t>(mask.data) % 16 != 0)
    return false;
  for (int i = 0; i < 3; ++i) {
    if (mask.strides[i] < 0 || mask.strides[i] * size % 16 != 0 || mask.strides[i] * size >= int64_t{1} << 40)
      return false;
  }
  const bool by_batch = mask.strides[0] != 0;
  const bool by_head = mask.strides[1] != 0;
  const cuuint64_t sizes[5] = {
      static_cast<cuuint64_t>(args.seq_len), static_cast<cuuint64_t>(by_head ? args.num_heads : 1), 1,
      static_cast<cuuint64_t>(args.seq_len), static_cast<cuuint64_t>(by_batch ? args.batch : 1)};
  const auto bytes = [&](int i) { return static_cast<cuuint64_t>(mask.strides[i] ? mask.strides[i] * size : 16); };
  const cuuint64_t strides[4] = {bytes(1), 16, bytes(2), bytes(0)};
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(kRowBytes / size), 1, 1, kCopyRows, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = size == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : size == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                               : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  return encode_tiled()(map, type, 5, const_cast<void*>(mask.data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
