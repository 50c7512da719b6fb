// The order in which thread blocks add to the sums of d_q where gradients are to have the same bits each time
// (schedule.h): which turn a tile of keys has at a tile of queries.
#pragma once

#include "core/cuda/attention/hopper/schedule.h"
#include "core/cuda/attention/hopper/tile_order.h"

namespace pfa {
namespace cuda {
namespace hopper {

// At a tile of queries.
struct Turn {
  int before;  // so many tiles of keys come before this one
  int all;     // of so many that visit the queries
};

// Of the tile of keys from key0 on, at queries row0..row0 + tile_queries - 1, which it visits. Tiles that a mask hides
// have a turn as well, so that nobody has to know of them.
__host__ __device__ inline Turn turn_of(const Visibility<int>& visibility, int key0, int row0, int tile_queries) {
  const int end = row0 + tile_queries < visibility.queries ? row0 + tile_queries : visibility.queries;
  const Range<int> keys = visibility.keys_of(row0, end);
  const int first = keys.first / kKeys;
  return {key0 / kKeys - first, (keys.end + kKeys - 1) / kKeys - first};
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
