// How a thread block sorts the tiles of a head by the length of their walks (tile_order.h): each thread has a tile, and
// counts those that come before it. Lengths are told apart by their first two binary digits, for that is enough to end
// with short walks, and neighbours, which read the same, stay together where their lengths are much alike.
#pragma once

#include "core/cuda/attention/hopper/tile_order.h"

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kSortedTiles = 512;  // of a segment at most, and threads at least

__host__ __device__ inline int sorted_segments(int tiles) { return (tiles + kSortedTiles - 1) / kSortedTiles; }

// Segments are of like size, so that none has too little to do.
__device__ __forceinline__ Range<int> sorted_segment(int tiles, int index) {
  const int segments = sorted_segments(tiles);
  const int size = (tiles + segments - 1) / segments;
  return {min(index * size, tiles), min((index + 1) * size, tiles)};
}

struct MeasuredTile {
  PlacedTile tile;
  int length;  // of its walk
};

// Writes the tiles of a segment to their places in `order`, a head's; measured(i) is the i-th of the head's.
template <class Measured>
__device__ __forceinline__ void sort_tiles(const Range<int>& segment, PlacedTile* order, Measured&& measured) {
  __shared__ uint4 keys[kSortedTiles / 4];  // of each tile: greater is earlier
  const int i = segment.first + static_cast<int>(threadIdx.x);
  uint32_t key = 0;
  PlacedTile tile;
  if (i < segment.end) {
    const MeasuredTile mine = measured(i);
    tile = mine.tile;
    const uint32_t digits = __float_as_uint(static_cast<float>(mine.length)) >> 22;  // a float's exponent, and one more
    key = (digits + 1) * kSortedTiles - threadIdx.x;
  }
  if (threadIdx.x < kSortedTiles) reinterpret_cast<uint32_t*>(keys)[threadIdx.x] = key;
  __syncthreads();
  if (i < segment.end) {
    int place = segment.first;
    for (int j = 0; j < segment.end - segment.first; j += 4) {
      const uint4 others = keys[j / 4];
      place += (others.x > key) + (others.y > key) + (others.z > key) + (others.w > key);
    }
    order[place] = tile;
  }
  __syncthreads();
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
