// The kernel that makes hidden_tiles.h's ranges and bits, and sorts the tiles that walk (tile_order.h). A head has a
// cluster of thread blocks. Each warp finds the least and the greatest ends of the ranges of a tile's keys; from these
// the bits follow, 32 at a time, and from the bits the lengths of walks. Backward's bits are of the same tile of keys,
// forward's of all.
#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include <climits>

#include "core/cuda/attention/hopper/hidden_tiles.cuh"
#include "core/cuda/attention/hopper/instructions.cuh"
#include "core/cuda/attention/hopper/tile_order.cuh"
#include "core/cuda/attention/launch.h"

namespace pfa {
namespace cuda {
namespace hopper {
namespace {

constexpr int kCluster = 8;  // thread blocks
constexpr int kThreads = kSortedTiles;

#if PFA_HOPPER_CODE

constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ bool hides_all(const TileRanges& ranges, int first, int end) {
  return ranges.common.first <= first && end <= ranges.common.end;
}
__device__ __forceinline__ bool hides_any(const TileRanges& ranges, int first, int end) {
  return max(ranges.any.first, first) < min(ranges.any.end, end);
}

// Of the ranges that a warp's lanes have four each of.
__device__ __forceinline__ TileRanges ranges_of_tile(const Range<int> (&ranges)[kKeys / 32]) {
  TileRanges tile{{INT_MIN, INT_MAX}, {INT_MAX, INT_MIN}};
#pragma unroll
  for (const Range<int>& range : ranges) {
    const bool empty = range.first >= range.end;
    tile.common.first = max(tile.common.first, empty ? INT_MAX : range.first);
    tile.common.end = min(tile.common.end, range.end);
    tile.any.first = min(tile.any.first, empty ? INT_MAX : range.first);
    tile.any.end = max(tile.any.end, empty ? INT_MIN : range.end);
  }
  tile.common.first = __reduce_max_sync(0xFFFFFFFFu, tile.common.first);
  tile.common.end = __reduce_min_sync(0xFFFFFFFFu, tile.common.end);
  tile.any.first = __reduce_min_sync(0xFFFFFFFFu, tile.any.first);
  tile.any.end = __reduce_max_sync(0xFFFFFFFFu, tile.any.end);
  return tile;
}

// Calls f with the ranges, whose number of columns the compiler then knows, so that loads need not wait for each other.
template <class F>
__device__ __forceinline__ void with_columns(HiddenRanges<int> ranges, F&& f) {
  if (ranges.columns == 1) {
    ranges.columns = 1;
    f(ranges);
  } else if (ranges.columns == 2) {
    ranges.columns = 2;
    f(ranges);
  } else {
    ranges.columns = 4;
    f(ranges);
  }
}

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
__global__ void __launch_bounds__(kThreads)
    hidden_tiles_kernel(const ColumnRanges columns, const Visibility<int> visibility, const HiddenTiles tiles,
                        const TileOrder order, const int tile_queries) {
#if PFA_HOPPER_CODE
  const int head = blockIdx.x / kCluster;
  const int of_cluster = blockIdx.x % kCluster;
  const int warp = of_cluster * kWarps + threadIdx.x / 32;  // of the cluster
  const int lane = threadIdx.x % 32;
  const int batch = head / tiles.heads_of_sequence;
  const int tiles_of_keys = tiles.keys_padded / kKeys;
  const HiddenRanges<int> ranges = hidden_ranges(columns, batch, head % tiles.heads_of_sequence, visibility.queries);
  TileBits* rows = tiles.bits + static_cast<int64_t>(head) * tiles.rows * tiles.words;
  int* lengths = tiles.lengths + static_cast<int64_t>(head) * order.tiles;

  // A bit of each lane, which has a tile of keys and one of queries: whether some of these see some of those, and
  // whether some do not.
  const auto bits_of = [&](const TileSummary& t, int query_tile, bool exists) {
    const int first = query_tile * tile_queries;
    const int end = min(first + tile_queries, visibility.queries);
    exists = exists && first < end;
    const bool seen = exists && !hides_all(t.first, first, end) && !hides_all(t.second, first, end);
    const bool hides = exists && (hides_any(t.first, first, end) || hides_any(t.second, first, end));
    return TileBits{__ballot_sync(0xFFFFFFFFu, seen), __ballot_sync(0xFFFFFFFFu, hides)};
  };

  for (int tile = warp; tile < tiles_of_keys; tile += kCluster * kWarps) {
    Range<int> first[kKeys / 32], second[kKeys / 32];
    with_columns(ranges, [&](const HiddenRanges<int>& of_columns) {
#pragma unroll
      for (int k = 0; k < kKeys / 32; ++k) {
        // Of keys past the last, what the last has: they change nothing of the summary.
        const HiddenQueries<int> hidden = of_columns.of_key(min(tile * kKeys + 32 * k + lane, visibility.keys - 1));
        first[k] = hidden.first;
        second[k] = hidden.second;
      }
    });
#pragma unroll
    for (int k = 0; k < kKeys / 32; ++k) {
      const int64_t key = tile * kKeys + 32 * k + lane;
      uint2* to = tiles.ranges + static_cast<int64_t>(head) * tiles.keys_padded + key;
      if (tiles.ranges_of_key == 2) {
        to[0] = as_length(first[k]);
        to[tiles.heads * tiles.keys_padded] = as_length(second[k]);
      } else {
        to[0] = as_one({first[k], second[k]}, visibility.queries);
      }
    }
    const TileSummary summary{ranges_of_tile(first), ranges_of_tile(second)};
    if constexpr (kRowsAreKeys) {
      const Range<int> walk = walk_over_queries(visibility, tile * kKeys, tile_queries);
      int length = 0;
      for (int w = 0; w < tiles.words; ++w) {
        const TileBits bits = bits_of(summary, w * 32 + lane, true);
        if (lane == 0) rows[static_cast<int64_t>(tile) * tiles.words + w] = bits;
        length += __popc(bits.seen & bits_in(walk, w));
      }
      if (order.places && lane == 0) lengths[tile] = length;
    } else {
      if (lane == 0) tiles.summaries[static_cast<int64_t>(head) * tiles_of_keys + tile] = summary;
    }
  }

  if constexpr (!kRowsAreKeys) {
    cluster_sync();
    const TileSummary* summaries = tiles.summaries + static_cast<int64_t>(head) * tiles_of_keys;
    constexpr int kRows = kQueryTile / kHalfTile;
    for (int tile = warp; tile * kRows < tiles.rows; tile += kCluster * kWarps) {
      const Range<int> walk = walk_over_keys(visibility, tile * kQueryTile);
      int length = 0;
      for (int w = 0; w < tiles.words; ++w) {
        const int of_lane = w * 32 + lane;
        const TileSummary summary = summaries[min(of_lane, tiles_of_keys - 1)];
        uint32_t seen = 0;
#pragma unroll
        for (int row = tile * kRows; row < (tile + 1) * kRows; ++row) {
          const TileBits bits = bits_of(summary, row, of_lane < tiles_of_keys);
          if (lane == 0) rows[static_cast<int64_t>(row) * tiles.words + w] = bits;
          seen |= bits.seen;
        }
        length += __popc(seen & bits_in(walk, w));
      }
      if (order.places && lane == 0) lengths[tile] = length;
    }
  }

  if (!order.places) return;
  cluster_sync();
  for (int segment = of_cluster; segment < sorted_segments(order.tiles); segment += kCluster) {
    sort_tiles(sorted_segment(order.tiles, segment), order.places + static_cast<int64_t>(head) * order.tiles,
               [&](int tile) -> MeasuredTile { return {{batch, tile * kStatisticsMultiple}, lengths[tile]}; });
  }
#endif
}

}  // namespace

void make_hidden_tiles(const Context& context, const AttentionArgs& args, const HiddenTiles& tiles,
                       const TileOrder& order, int backward_queries) {
  if (!tiles.bits) return;
  with_bool(backward_queries > 0, [&](auto rows_are_keys) {
    launch_clusters<kCluster>(context, "attention_hidden_tiles", hidden_tiles_kernel<decltype(rows_are_keys)::value>,
                              tiles.heads, kThreads, args.hidden_ranges, args.visibility, tiles, order,
                              backward_queries ? backward_queries : kHalfTile);
  });
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa

#endif
