// Tiles of 128 queries or keys: how they are counted, and the order in which they start.
//
// Each head has its tiles; of packed sequences, a head's tiles are those of all sequences, one after the other.
// Tiles start head by head. Where they differ in the length of their walk, heads go in groups that fit in the L2 cache,
// and within a group the same tile of every head comes before the next, so that long walks start first.
//
// Under a causal mask or a window a tile's place says how long its walk is. How long those of packed sequences are, and
// what ranges of hidden queries leave, is known on the device only: there a kernel before the others sorts the tiles of
// a head, in segments so that neighbours stay together, and writes where they are. It does so where thread blocks get a
// few tiles each, of which the last should be short; of many tiles neighbours had better stay together.
#pragma once

#include <algorithm>

#include "core/arena.h"
#include "core/cuda/attention/args.h"
#include "core/cuda/context.h"

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kKeys = 128;       // of a tile, in both passes
constexpr int kQueryTile = 128;  // of forward's tiles, and of those by which d_q leaves its sums
static_assert(kKeys == kStatisticsMultiple && kQueryTile == kStatisticsMultiple, "tiles are counted alike");

// Of the rows of a sequence, or of all that are packed.
template <bool kPacked>
__host__ __device__ inline int tiles_of_rows(const AttentionArgs& args, int of_sequence, int64_t of_all) {
  constexpr int kRows = kStatisticsMultiple;
  return kPacked ? static_cast<int>((of_all + kRows - 1) / kRows + args.batch) : (of_sequence + kRows - 1) / kRows;
}
template <bool kPacked>
__host__ __device__ inline int query_tiles(const AttentionArgs& args) {
  return tiles_of_rows<kPacked>(args, args.visibility.queries, args.layout.queries);
}
template <bool kPacked>
__host__ __device__ inline int key_tiles(const AttentionArgs& args) {
  return tiles_of_rows<kPacked>(args, args.visibility.keys, args.layout.keys);
}
inline int query_tiles(const AttentionArgs& args) {
  return args.is_packed() ? query_tiles<true>(args) : query_tiles<false>(args);
}
inline int key_tiles(const AttentionArgs& args) {
  return args.is_packed() ? key_tiles<true>(args) : key_tiles<false>(args);
}

// The heads that have tiles of queries, and of keys.
template <bool kPacked>
__device__ __forceinline__ uint32_t query_heads(const AttentionArgs& args) {
  const auto heads = static_cast<uint32_t>(args.layout.num_heads);
  return kPacked ? heads : static_cast<uint32_t>(args.batch) * heads;
}
inline int64_t query_heads(const AttentionArgs& args) {
  return args.is_packed() ? args.layout.num_heads : args.heads();
}
template <bool kPacked>
__device__ __forceinline__ uint32_t key_heads(const AttentionArgs& args) {
  return query_heads<kPacked>(args) / static_cast<uint32_t>(args.layout.group);
}
inline int64_t key_heads(const AttentionArgs& args) { return query_heads(args) / args.layout.group; }

// Of the backward pass, which take tiles of keys one after the other.
inline int64_t thread_blocks(const Context& context, const AttentionArgs& args) {
  return std::min<int64_t>(context.num_sms, key_tiles(args) * key_heads(args));
}

// Whether the lengths of walks are known on the device only.
inline bool has_unknown_walks(const AttentionArgs& args) { return args.is_packed() || args.hidden_ranges.data; }
// Whether walks may differ in length.
inline bool has_uneven_walks(const AttentionArgs& args) {
  return has_unknown_walks(args) || args.visibility.is_uneven();
}

struct OrderedTile {
  uint32_t head;  // of those that are counted
  int tile;       // of the head's
};

// The tile that is `index` in the order of all; each of `heads` has `tiles`.
__device__ __forceinline__ OrderedTile ordered_tile(uint32_t heads, uint32_t index, int heads_per_group, int tiles) {
  const uint32_t first = index / (heads_per_group * tiles) * heads_per_group;
  const uint32_t size = min(static_cast<uint32_t>(heads_per_group), heads - first);
  const uint32_t place = index - first * tiles;
  return {first + place % size, static_cast<int>(place / size)};
}

// head_bytes: of all that the walks of a head's tiles read; where their lengths are unknown, neighbours read a small
// part of that. Groups are of like size, so that none has too little to do.
inline int heads_per_group(const AttentionArgs& args, int64_t heads, int64_t head_bytes) {
  if (!has_uneven_walks(args)) return 1;
  const int64_t cache_bytes = (has_unknown_walks(args) ? 96 : 24) << 20;
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(heads, cache_bytes / head_bytes));
  return static_cast<int>(ceil_div(heads, ceil_div(heads, most)));
}

// A tile of one sequence.
struct SequenceTile {
  uint32_t head;  // batch * H + head
  int first;      // its first query or key; past the sequence's end where it is between two sequences
};

// Tile `tile` of a head; `starts` are those of its queries or of its keys. That of packed sequence b are from tile
// starts[b] / 128 + b on, as its row statistics are.
template <bool kPacked>
__device__ __forceinline__ SequenceTile sequence_tile(const AttentionArgs& args, const int32_t* starts, uint32_t head,
                                                      int tile) {
  if constexpr (!kPacked) {
    return {head, tile * kStatisticsMultiple};
  } else {
    const auto first_tile = [&](int batch) { return starts[batch] / kStatisticsMultiple + batch; };
    int sequence = 0;
    for (int end = static_cast<int>(args.batch); end - sequence > 1;) {
      const int middle = sequence + (end - sequence) / 2;
      (first_tile(middle) <= tile ? sequence : end) = middle;
    }
    return {static_cast<uint32_t>(sequence) * static_cast<uint32_t>(args.layout.num_heads) + head,
            max(tile - first_tile(sequence), 0) * kStatisticsMultiple};
  }
}

#if defined(__CUDACC__)
// The tiles of keys that the queries of a tile may see. Queries that see no key walk over one tile of hidden keys.
__device__ __forceinline__ Range<int> walk_over_keys(const Visibility<int>& visibility, int row0) {
  const Range<int> keys = visibility.keys_of(row0, min(row0 + kQueryTile, visibility.queries));
  const int first = keys.first / kKeys;
  return {first, max((keys.end + kKeys - 1) / kKeys, first + 1)};
}

// The tiles of `tile_queries` queries that may see the keys of a tile.
__device__ __forceinline__ Range<int> walk_over_queries(const Visibility<int>& visibility, int key0, int tile_queries) {
  const Range<int> queries = visibility.queries_of(key0, key0 + kKeys);
  if (queries.first >= queries.end) return {0, 0};
  return {queries.first / tile_queries, (queries.end + tile_queries - 1) / tile_queries};
}
#endif

// A tile at its place in the order.
struct PlacedTile {
  int sequence;
  int first;  // as SequenceTile's
};

// The order of sorted tiles; null where tiles are not sorted.
struct TileOrder {
  int tiles;           // of a head
  PlacedTile* places;  // [heads that differ, tiles]: longest walks first

#if defined(__CUDACC__)
  // What begins at a place of the tiles of `head`, whose order is the `of_head`-th.
  template <bool kPacked>
  __device__ __forceinline__ SequenceTile at(const AttentionArgs& args, int64_t of_head, uint32_t head,
                                             int place) const {
    const PlacedTile tile = places[of_head * tiles + place];
    const auto heads = static_cast<uint32_t>(args.layout.num_heads);
    return {kPacked ? static_cast<uint32_t>(tile.sequence) * heads + head : head, tile.first};
  }
#endif
};

// Places it in `arena`, if `heads` with so many tiles are worth sorting for `at_once` thread blocks that run at once;
// heads_that_differ: those of which the order differs.
inline TileOrder place_tile_order(Arena& arena, const AttentionArgs& args, int tiles, int64_t heads, int64_t at_once,
                                  int64_t heads_that_differ) {
  constexpr int64_t kFewTiles = 16;  // of a thread block
  if (!has_unknown_walks(args) || tiles * heads <= at_once || tiles * heads > kFewTiles * at_once) return {};
  return {tiles, static_cast<PlacedTile*>(arena.take(sizeof(PlacedTile) * heads_that_differ * tiles))};
}

// Queues the kernel that fills it for packed sequences: of tiles of queries if backward_queries is 0, else of tiles of
// keys that walk over tiles of so many queries.
void sort_packed_tiles(const Context& context, const AttentionArgs& args, const TileOrder& order, int backward_queries);

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
