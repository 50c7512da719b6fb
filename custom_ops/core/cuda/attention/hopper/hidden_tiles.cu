// The kernel that makes hidden_tiles.h's ranges and bits. A thread block has 32 tiles of keys of a head. Each warp
// finds the least and the greatest ends of the ranges of a tile's keys; from these the bits follow, 32 at a time.
#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include <climits>

#include "core/cuda/attention/hopper/hidden_tiles.h"
#include "core/cuda/attention/hopper/instructions.cuh"
#include "core/cuda/attention/launch.h"

namespace pfa {
namespace cuda {
namespace hopper {
namespace {

constexpr int kTiles = 32;  // of keys, of a thread block

#if PFA_HOPPER_CODE

// What is known of a tile's first or second ranges.
struct TileRanges {
  Range<int> common;  // hidden from all keys; empty if one has an empty range
  Range<int> any;     // beyond this nothing is hidden

  __device__ __forceinline__ bool hides_all(int first, int end) const {
    return common.first <= first && end <= common.end;
  }
  __device__ __forceinline__ bool hides_any(int first, int end) const {
    return max(any.first, first) < min(any.end, end);
  }

  __device__ __forceinline__ void add(const Range<int>& range) {
    const bool empty = range.first >= range.end;
    common.first = max(common.first, empty ? INT_MAX : range.first);
    common.end = min(common.end, range.end);
    any.first = min(any.first, empty ? INT_MAX : range.first);
    any.end = max(any.end, empty ? INT_MIN : range.end);
  }

  __device__ __forceinline__ void reduce() {
    common.first = __reduce_max_sync(0xFFFFFFFFu, common.first);
    common.end = __reduce_min_sync(0xFFFFFFFFu, common.end);
    any.first = __reduce_min_sync(0xFFFFFFFFu, any.first);
    any.end = __reduce_max_sync(0xFFFFFFFFu, any.end);
  }
};

struct TileSummary {
  TileRanges first;
  TileRanges second;

  static __device__ __forceinline__ TileSummary of_no_keys() {
    const TileRanges none{{INT_MIN, INT_MAX}, {INT_MAX, INT_MIN}};
    return {none, none};
  }
};

// A key's ranges as {first, length}.
__device__ __forceinline__ uint2 as_length(const Range<int>& range) {
  return make_uint2(range.first, range.end - range.first);
}

// The same of [first.first, queries) and [0, second.end), as one.
__device__ __forceinline__ uint2 as_one(const HiddenQueries<int>& hidden, int queries) {
  if (hidden.second.first >= hidden.second.end) return as_length(hidden.first);
  if (hidden.second.end >= hidden.first.first) return make_uint2(0, queries);
  return make_uint2(hidden.first.first, hidden.second.end - hidden.first.first);
}

#endif

// kRowsAreKeys: as backward reads the bits.
template <bool kRowsAreKeys>
__global__ void __launch_bounds__(kTiles * 32)
    hidden_tiles_kernel(const ColumnRanges columns, const HiddenTiles tiles, const int queries, const int keys,
                        const int tile_queries) {
#if PFA_HOPPER_CODE
  __shared__ TileSummary summaries[kTiles];
  const int chunks = (tiles.keys_padded / kKeys + kTiles - 1) / kTiles;
  const int head = blockIdx.x / chunks;
  const int chunk = blockIdx.x % chunks;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int tile = chunk * kTiles + warp;
  const HiddenRanges<int> ranges =
      hidden_ranges(columns, head / tiles.heads_of_sequence, head % tiles.heads_of_sequence, queries);

  TileSummary mine = TileSummary::of_no_keys();
  if (tile * kKeys < tiles.keys_padded) {
#pragma unroll
    for (int k = 0; k < kKeys; k += 32) {
      const int key = tile * kKeys + k + lane;
      uint2 packed[2] = {};
      if (key < keys) {
        const HiddenQueries<int> hidden = ranges.of_key(key);
        mine.first.add(hidden.first);
        mine.second.add(hidden.second);
        packed[0] = tiles.ranges_of_key == 2 ? as_length(hidden.first) : as_one(hidden, queries);
        packed[1] = as_length(hidden.second);
      }
      for (int r = 0; r < tiles.ranges_of_key; ++r) {
        tiles.ranges[(r * tiles.heads + head) * tiles.keys_padded + key] = packed[r];
      }
    }
  }
  mine.first.reduce();
  mine.second.reduce();

  const auto bits_of = [&](const TileSummary& t, int query_tile, bool exists) {
    const int first = query_tile * tile_queries;
    const int end = min(first + tile_queries, queries);
    exists = exists && first < end;
    const bool seen = exists && !t.first.hides_all(first, end) && !t.second.hides_all(first, end);
    const bool hides = exists && (t.first.hides_any(first, end) || t.second.hides_any(first, end));
    return TileBits{__ballot_sync(0xFFFFFFFFu, seen), __ballot_sync(0xFFFFFFFFu, hides)};
  };
  TileBits* rows = tiles.bits + static_cast<int64_t>(head) * tiles.rows * tiles.words;
  if constexpr (kRowsAreKeys) {
    if (tile >= tiles.rows) return;
    for (int word = 0; word < tiles.words; ++word) {
      const TileBits bits = bits_of(mine, word * 32 + lane, true);
      if (lane == 0) rows[static_cast<int64_t>(tile) * tiles.words + word] = bits;
    }
  } else {
    if (lane == 0) summaries[warp] = mine;
    __syncthreads();
    const TileSummary of_lane = summaries[lane];
    const bool exists = (chunk * kTiles + lane) * kKeys < tiles.keys_padded;
    for (int row = warp; row < tiles.rows; row += kTiles) {
      const TileBits bits = bits_of(of_lane, row, exists);
      if (lane == 0) rows[static_cast<int64_t>(row) * tiles.words + chunk] = bits;
    }
  }
#endif
}

}  // namespace

void make_hidden_tiles(const Context& context, const AttentionArgs& args, const HiddenTiles& tiles,
                       int backward_queries) {
  if (!tiles.bits) return;
  with_bool(backward_queries > 0, [&](auto rows_are_keys) {
    launch(context, "attention_hidden_tiles", hidden_tiles_kernel<decltype(rows_are_keys)::value>,
           tiles.heads * ceil_div(tiles.keys_padded / kKeys, kTiles), kTiles * 32, 0, args.hidden_ranges, tiles,
           args.visibility.queries, args.visibility.keys, backward_queries ? backward_queries : kHalfTile);
  });
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa

#endif
