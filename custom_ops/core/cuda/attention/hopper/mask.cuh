// The mask on Hopper: how it comes to shared memory, and what is done with it there. A mask that is read in place goes
// by fetch_mask and add_fetched of ../mask.cuh.
#pragma once

#include <climits>
#include <type_traits>

#include "core/cuda/attention/hopper/tensor_maps.h"
#include "core/cuda/attention/hopper/tile_order.h"
#include "core/cuda/attention/mask.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

// A key mask is the same for all queries. Of the others, a tiled one comes to shared memory with the copy engine.
// Ranges are those of hidden queries (hidden_tiles.h), without a mask.
enum MaskKind { kNoMask, kKeyMask, kFullMask, kTiledMask, kRanges };

// Calls f with the kind of the mask but for how it comes to shared memory, as a std::integral_constant.
template <class F>
void with_mask_kind(const AttentionArgs& args, F&& f) {
  if (args.hidden_ranges.data) {
    f(std::integral_constant<MaskKind, kRanges>{});
  } else if (!args.mask.data) {
    f(std::integral_constant<MaskKind, kNoMask>{});
  } else if (args.mask.strides[2] == 0) {
    f(std::integral_constant<MaskKind, kKeyMask>{});
  } else {
    f(std::integral_constant<MaskKind, kFullMask>{});
  }
}

constexpr int64_t kMaxTiledMaskBytes = 4;  // of an element

// Whether the copy engine can read a mask.
inline bool mask_has_tensor_map(const AttentionArgs& args) {
  const Mask& mask = args.mask;
  const int64_t size = size_of(mask.dtype);
  if (size > kMaxTiledMaskBytes || mask.strides[3] != 1 || !is_vector_aligned(mask.data)) return false;
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = mask.strides[i] * size;
    if (bytes < 0 || bytes % 16 != 0 || bytes >= int64_t{1} << 40) return false;
  }
  return true;
}

// Maps it, for copies of 64 queries x 128 bytes of keys; false where it cannot.
inline bool mask_tensor_map(const AttentionArgs& args, CUtensorMap* map) {
  if (!mask_has_tensor_map(args)) return false;
  const Mask& mask = args.mask;
  const int64_t size = size_of(mask.dtype);
  const auto count = [&](int i, int64_t all) { return static_cast<cuuint64_t>(mask.strides[i] ? all : 1); };
  const auto bytes = [&](int i) { return static_cast<cuuint64_t>(mask.strides[i] ? mask.strides[i] * size : 16); };
  const CUtensorMapDataType type = size == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : size == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                               : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  return encode_map(map, type, mask.data,
                    {count(3, args.visibility.keys), count(1, args.layout.num_heads), count(2, args.visibility.queries),
                     count(0, args.batch), 1},
                    {bytes(1), bytes(2), bytes(0), 16}, static_cast<int>(kRowBytes / size));
}

// How a tile of a mask comes to shared memory, of a warpgroup's 64 queries: in 1 or 2 parts, one after the other in 1
// or 2 stages, of so many panels of 128 bytes a query.
struct MaskCopies {
  int log2_parts;
  int log2_stages;
  int panels;
};

constexpr int kMaskTiles = 32;  // tiles of keys whose mask is in shared memory at a time, where it is a key mask

#if PFA_HOPPER_CODE

// Which of some tiles of keys have a mask other than zeros, and the first and the last tile with a key that may be
// seen.
struct KeyTiles {
  uint32_t masked;
  int first;
  int last;
};

// Brings the mask of tiles chunk * kMaskTiles.. below `tiles` to shared memory, in units of log2, a tile per warp at a
// time.
__device__ __forceinline__ void load_key_mask(const AttentionArgs& args, int64_t mask_offset, int chunk, int tiles,
                                              int warp, int warps, float* to, KeyTiles& found) {
  found.masked = 0;
  for (int i = warp; i < kMaskTiles; i += warps) {
    const int tile = chunk * kMaskTiles + i;
    if (tile >= tiles) return;
    constexpr int kLaneKeys = kKeys / 32;
    const int key = tile * kKeys + threadIdx.x % 32;
    float added[kLaneKeys];
    with_mask_elements(args.mask, [&](const auto* elements) {
#pragma unroll
      for (int k = 0; k < kLaneKeys; ++k) {
        const int j = min(key + 32 * k, args.visibility.keys - 1);
        added[k] = mask_log2<float>(elements[mask_offset + j * args.mask.strides[3]]);
      }
    });
    bool masked = false, visible = false;
#pragma unroll
    for (int k = 0; k < kLaneKeys; ++k) {
      if (key + 32 * k >= args.visibility.keys) added[k] = -INFINITY;
      masked |= added[k] != 0.0f;
      visible |= added[k] != -INFINITY;
      to[i * kKeys + threadIdx.x % 32 + 32 * k] = added[k];
    }
    if (__any_sync(0xFFFFFFFFu, masked)) found.masked |= 1u << i;
    if (__any_sync(0xFFFFFFFFu, visible)) {
      found.first = min(found.first, tile);
      found.last = max(found.last, tile);
    }
  }
}

// Scores to units of log2, with the mask of their keys.
__device__ __forceinline__ void add_key_mask(const float* mask, float scale_log2, float (&s)[kKeys / 2]) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const float2 added = *reinterpret_cast<const float2*>(mask + 8 * n + lane_column(0));
#pragma unroll
    for (int e = 0; e < 4; ++e) s[4 * n + e] = fmaf(s[4 * n + e], scale_log2, e % 2 ? added.y : added.x);
  }
}

// What two neighbouring float elements of a mask add, in units of log2.
template <class Element>
__device__ __forceinline__ float2 added_by_pair(uint32_t pair) {
  return make_float2(mask_log2<float>(unpack<Element>(pair, 0)), mask_log2<float>(unpack<Element>(pair, 1)));
}
template <class Element>
__device__ __forceinline__ float2 added_by_pair(uint64_t pair) {
  return make_float2(mask_log2<float>(__uint_as_float(static_cast<uint32_t>(pair))),
                     mask_log2<float>(__uint_as_float(static_cast<uint32_t>(pair >> 32))));
}

// Applies the warp's 16 rows of part kPart of a mask tile, which lies as the copy engine wrote it, and gives the scale
// that scores still need.
template <int kPanels, int kPart>
__device__ __forceinline__ float apply_mask_tile(const Mask& mask, const char* strip, float scale_log2,
                                                 float (&s)[kKeys / 2]) {
  float scale = 1.0f;
  with_mask_elements(mask, [&](const auto* elements) {
    using Element = std::remove_cv_t<std::remove_reference_t<decltype(*elements)>>;
    constexpr int kSize = sizeof(Element);
    using Pair = std::conditional_t<kSize == 1, uint16_t, std::conditional_t<kSize == 2, uint32_t, uint64_t>>;
    constexpr int kColumns = sizeof(Element) > kPanels ? kPanels * kRowBytes / sizeof(Element) : kKeys;
    if constexpr (sizeof(Element) <= kMaxTiledMaskBytes && kPart * kColumns < kKeys) {
      const int lane = threadIdx.x % 32;
      const int place = (lane % 4 * 2 * kSize) ^ (lane / 4 * 16);
      const char* lane_rows = strip + lane / 4 * kRowBytes;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const int byte = 8 * n * kSize;
        const char* from =
            lane_rows + byte / kRowBytes * kCopyBytes + (place ^ (byte % kRowBytes / 16 * 16)) + byte % 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pair pair = *reinterpret_cast<const Pair*>(from + half * 8 * kRowBytes);
          float* scores = &s[kPart * kColumns / 2 + 4 * n + 2 * half];
          if constexpr (std::is_integral<Element>::value) {
            constexpr Pair kFirst = static_cast<Pair>(~Pair{0}) >> 8 * kSize;
            if ((pair & kFirst) == 0) scores[0] = -INFINITY;
            if ((pair & ~kFirst) == 0) scores[1] = -INFINITY;
          } else {
            const auto added = added_by_pair<Element>(pair);
            scores[0] = fmaf(scores[0], scale_log2, added.x);
            scores[1] = fmaf(scores[1], scale_log2, added.y);
          }
        }
      }
    }
    if constexpr (std::is_integral<Element>::value) scale = scale_log2;
  });
  return scale;
}

// Whether any key of a tile may be seen, by a mask that is the same for all queries.
__device__ __forceinline__ bool any_visible(const AttentionArgs& args, int64_t mask_offset, int key0) {
  bool visible = false;
  with_mask_elements(args.mask, [&](const auto* elements) {
    constexpr int kBatch = 8;  // loads in flight
    for (int j = 0; j < kKeys && !visible; j += kBatch) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int key = min(key0 + j + k, args.visibility.keys - 1);
        visible |= mask_log2<float>(elements[mask_offset + key * args.mask.strides[3]]) != -INFINITY;
      }
    }
  });
  return visible;
}

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
