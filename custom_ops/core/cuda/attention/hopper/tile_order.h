// The order in which tiles start: head by head. Where tiles differ in the length of their walk, heads go in groups that
// fit in the L2 cache, and within a group the same tile of every head comes before the next, so that long walks start
// first.
#pragma once

#include <algorithm>

#include "core/cuda/attention/args.h"

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kKeys = 128;  // of a tile, in both passes

struct OrderedTile {
  uint32_t head;  // batch * H + head
  int tile;       // of the head's
};

// The tile that is `index` in the order of all; each head has `tiles`.
__device__ __forceinline__ OrderedTile ordered_tile(const AttentionArgs& args, uint32_t index, int heads_per_group,
                                                    int tiles) {
  const uint32_t heads = static_cast<uint32_t>(args.heads());
  const uint32_t first = index / (heads_per_group * tiles) * heads_per_group;
  const uint32_t size = min(static_cast<uint32_t>(heads_per_group), heads - first);
  const uint32_t place = index - first * tiles;
  return {first + place % size, static_cast<int>(place / size)};
}

// bytes_per_element: of all that a walk reads, for each element of a head's keys.
inline int heads_per_group(const AttentionArgs& args, int bytes_per_element) {
  if (!args.visibility.is_uneven()) return 1;
  constexpr int64_t kCacheBytes = 24 << 20;
  const int64_t head_bytes = int64_t{bytes_per_element} * args.visibility.keys * args.head_dim();
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(args.heads(), kCacheBytes / head_bytes)));
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
