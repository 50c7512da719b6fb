// Ranges of hidden queries (visibility.h) on Hopper: what a kernel before the others makes of them.
//
// Of each key, its one or two ranges as {first, length}: hidden is query i if i - first < length, unsigned. All but the
// first and last queries are one range so, which runs over the end of the numbers.
//
// Of each tile of scores, two bits: whether some query may see some key, and whether some query may not see some key.
// The former is never clear where one does, the latter never where one does not: both are found from the least and the
// greatest ends of the ranges of a tile's keys. A row of bits has a tile of queries and all keys in forward, where it
// stands for 64 queries; in backward a tile of keys and all queries.
#pragma once

#include "core/arena.h"
#include "core/cuda/attention/args.h"
#include "core/cuda/attention/hopper/tile_order.h"
#include "core/cuda/context.h"

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kHalfTile = 64;  // queries of a row of bits in forward

// 32 tiles of a row.
struct TileBits {
  uint32_t seen;
  uint32_t hides;
};

// What is known of the first or second ranges of a tile's keys.
struct TileRanges {
  Range<int> common;  // hidden from all keys; empty if one has an empty range
  Range<int> any;     // beyond this nothing is hidden
};
struct alignas(16) TileSummary {
  TileRanges first;
  TileRanges second;
};

// All zero where there are no ranges.
struct HiddenTiles {
  int heads_of_sequence;   // that have ranges of their own: 1 or num_kv_heads
  int ranges_of_key;       // 1 or 2
  int64_t heads;           // of all sequences
  int keys_padded;         // to whole tiles
  int rows;                // of bits, of a head
  int words;               // of a row
  uint2* ranges;           // [ranges_of_key, heads, keys_padded]
  TileBits* bits;          // [heads, rows, words]
  TileSummary* summaries;  // [heads, tiles of keys]: what forward's bits are made of
  int* lengths;            // [heads, tiles that walk]: of these walks

#if defined(__CUDACC__)
  __device__ __forceinline__ int64_t head_of(const HeadIndex& h) const {
    return h.batch * heads_of_sequence + (heads_of_sequence > 1 ? h.kv_head : 0);
  }
  __device__ __forceinline__ const TileBits* row(const HeadIndex& h, int row) const {
    return bits + (head_of(h) * rows + row) * words;
  }
  // Range `r` of a head's key 0.
  __device__ __forceinline__ const uint2* ranges_of(const HeadIndex& h, int r) const {
    return ranges + (r * heads + head_of(h)) * keys_padded;
  }
#endif
};

// Places them in `arena`, for forward if backward_queries is 0, else for backward with tiles of so many queries;
// nothing where there are no ranges.
inline HiddenTiles place_hidden_tiles(Arena& arena, const AttentionArgs& args, int backward_queries) {
  HiddenTiles tiles{};
  if (!args.hidden_ranges.data) return tiles;
  const int tiles_of_keys = key_tiles(args);
  tiles.heads_of_sequence =
      args.hidden_ranges.head_stride ? static_cast<int>(args.layout.num_heads / args.layout.group) : 1;
  tiles.ranges_of_key = args.hidden_ranges.columns == 4 ? 2 : 1;
  tiles.heads = args.batch * tiles.heads_of_sequence;
  tiles.keys_padded = tiles_of_keys * kKeys;
  tiles.rows = backward_queries ? tiles_of_keys : query_tiles(args) * (kQueryTile / kHalfTile);
  tiles.words = static_cast<int>(
      ceil_div(backward_queries ? ceil_div(args.visibility.queries, backward_queries) : tiles_of_keys, 32));
  tiles.ranges = static_cast<uint2*>(arena.take(sizeof(uint2) * tiles.ranges_of_key * tiles.heads * tiles.keys_padded));
  tiles.bits = static_cast<TileBits*>(arena.take(sizeof(TileBits) * tiles.heads * tiles.rows * tiles.words));
  if (!backward_queries) {
    tiles.summaries = static_cast<TileSummary*>(arena.take(sizeof(TileSummary) * tiles.heads * tiles_of_keys));
  }
  tiles.lengths =
      static_cast<int*>(arena.take(sizeof(int) * tiles.heads * (backward_queries ? tiles_of_keys : query_tiles(args))));
  return tiles;
}

// Queues the kernel that fills them, as they were placed, and the order of the tiles that walk.
void make_hidden_tiles(const Context& context, const AttentionArgs& args, const HiddenTiles& tiles,
                       const TileOrder& order, int backward_queries);

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
