// What the kernels of both passes do with ranges of hidden queries (hidden_tiles.h).
#pragma once

#include "core/cuda/attention/hidden_ranges.cuh"
#include "core/cuda/attention/hopper/hidden_tiles.h"
#include "core/cuda/attention/hopper/instructions.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

#if PFA_HOPPER_CODE

// Walks go over the tiles that someone sees in two phases: first those of which ranges hide nothing, then the others.
// So loops over the former need not ask.
enum Phase : int { kPlainTiles, kHidingTiles };

// Word `w` of a phase, of kRows neighbouring rows of bits, as far as it is in `tiles`.
template <int kRows>
__device__ __forceinline__ uint32_t tiles_of_phase(const TileBits* rows, int words, const Range<int>& tiles, int w,
                                                   int phase) {
  uint32_t seen = 0, hides = 0;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const TileBits bits = rows[row * words + w];
    seen |= bits.seen;
    hides |= bits.hides;
  }
  if (32 * w < tiles.first) seen &= ~0u << tiles.first % 32;
  if (32 * w + 32 > tiles.end) seen &= ~(~0u << tiles.end % 32);
  return phase == kPlainTiles ? seen & ~hides : seen & hides;
}

// The walk, by one thread, over a row.
struct SeenTiles {
  const TileBits* row;
  Range<int> tiles;
  int phase;
  int word;
  uint32_t left;  // in this word

  __device__ __forceinline__ void begin(const TileBits* of_row, const Range<int>& walk) {
    row = of_row;
    tiles = walk;
    phase = kPlainTiles;
    word = tiles.first / 32;
    left = tiles.first < tiles.end ? tiles_of_phase<1>(row, 0, tiles, word, phase) : 0;
  }

  __device__ __forceinline__ int count(int of_phase) const {
    int count = 0;
    for (int w = tiles.first / 32; 32 * w < tiles.end; ++w) {
      count += __popc(tiles_of_phase<1>(row, 0, tiles, w, of_phase));
    }
    return count;
  }

  // The next tile, where there is one.
  __device__ __forceinline__ int next() {
    while (left == 0) {
      if (32 * ++word >= tiles.end) {
        word = tiles.first / 32;
        ++phase;
      }
      left = tiles_of_phase<1>(row, 0, tiles, word, phase);
    }
    const int bit = __ffs(left) - 1;
    left &= left - 1;
    return 32 * word + bit;
  }
};

// The walk written to `list`, by a warp; returns the numbers of tiles of either phase.
template <int kRows>
__device__ __forceinline__ int2 list_tiles(const TileBits* rows, int words, const Range<int>& tiles, uint16_t* list) {
  const int lane = threadIdx.x % 32;
  int counts[2];
  int listed = 0;
#pragma unroll
  for (int phase = 0; phase < 2; ++phase) {
    const int before = listed;
    for (int first = tiles.first / 32; 32 * first < tiles.end; first += 32) {
      const int w = first + lane;
      uint32_t left = 32 * w < tiles.end ? tiles_of_phase<kRows>(rows, words, tiles, w, phase) : 0;
      int place = __popc(left);
#pragma unroll
      for (int other = 1; other < 32; other *= 2) {
        const int of_other = __shfl_up_sync(0xFFFFFFFFu, place, other);
        if (lane >= other) place += of_other;
      }
      const int count = __shfl_sync(0xFFFFFFFFu, place, 31);
      for (place += listed - __popc(left); left != 0; left &= left - 1) {
        list[place++] = static_cast<uint16_t>(32 * w + __ffs(left) - 1);
      }
      listed += count;
    }
    counts[phase] = listed - before;
  }
  return make_int2(counts[0], counts[1]);
}

// What a range {first, length} holds of `count` queries from `query` on.
__device__ __forceinline__ Hidden part_of(const uint2& range, uint32_t query, uint32_t count) {
  const uint32_t place = query - range.x;
  if (place < range.y) return range.y - place >= count ? Hidden::kAll : Hidden::kSome;
  return range.y == 0 || range.x - query >= count ? Hidden::kNothing : Hidden::kSome;
}

// What ranges hide of a warp's 16 rows of queries and the keys of a tile.
struct HiddenKeys {
  uint32_t from_all[kKeys / 32];  // bits of the keys that are hidden from all rows
  bool from_some;                 // whether there are others that are hidden from some

  // In all lanes of the warp, whose rows begin with query `strip`.
  __device__ __forceinline__ void find(const HiddenTiles& tiles, const HeadIndex& h, int strip, int key0) {
    bool some = false;
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) {
      Hidden hidden = Hidden::kNothing;  // the most that one range hides
      for (int r = 0; r < tiles.ranges_of_key; ++r) {
        const uint2 range = tiles.ranges_of(h, r)[key0 + 32 * i + threadIdx.x % 32];
        const Hidden by_range = part_of(range, strip, 16);
        if (by_range > hidden) hidden = by_range;
      }
      some |= hidden == Hidden::kSome;
      from_all[i] = __ballot_sync(0xFFFFFFFFu, hidden == Hidden::kAll);
    }
    from_some = __any_sync(0xFFFFFFFFu, some);
  }

  // Makes -inf of their scores.
  __device__ __forceinline__ void hide(const HiddenTiles& tiles, const HeadIndex& h, int strip, int key0,
                                       float (&s)[kKeys / 2]) const {
    if (!from_some) {
#pragma unroll
      for (int i = 0; i < kKeys / 32; ++i) {
        if (from_all[i] == 0) continue;
        const uint32_t bits = from_all[i] >> lane_column(0);
#pragma unroll
        for (int e = 0; e < 16; ++e) {
          if (bits & 1u << (e / 4 * 8 + e % 2)) s[16 * i + e] = -INFINITY;
        }
      }
      return;
    }
    const uint32_t query = strip + lane_row(0);
    for (int r = 0; r < tiles.ranges_of_key; ++r) {
      const uint2* ranges = tiles.ranges_of(h, r) + key0 + lane_column(0);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const uint4 pair = *reinterpret_cast<const uint4*>(ranges + 8 * n);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (query + 8 * half - pair.x < pair.y) s[4 * n + 2 * half] = -INFINITY;
          if (query + 8 * half - pair.z < pair.w) s[4 * n + 2 * half + 1] = -INFINITY;
        }
      }
    }
  }
};

// Makes -inf of the scores that ranges hide where rows are keys: a warp's 16 from `strip` on, and 2 * kCount queries
// from row0 on.
template <int kCount>
__device__ __forceinline__ void hide_by_key(const HiddenTiles& tiles, const HeadIndex& h, int strip, int row0,
                                            float (&s)[kCount]) {
  for (int r = 0; r < tiles.ranges_of_key; ++r) {
    const uint2* ranges = tiles.ranges_of(h, r) + strip;
    const uint2 of_key[2] = {ranges[lane_row(0)], ranges[lane_row(2)]};
    const Hidden hidden[2] = {part_of(of_key[0], row0, 2 * kCount), part_of(of_key[1], row0, 2 * kCount)};
    if (__all_sync(0xFFFFFFFFu, hidden[0] == Hidden::kNothing && hidden[1] == Hidden::kNothing)) continue;
    if (__all_sync(0xFFFFFFFFu, hidden[0] == Hidden::kAll && hidden[1] == Hidden::kAll)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) s[i] = -INFINITY;
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t query = row0 + lane_column(0) - of_key[half].x;
#pragma unroll
      for (int n = 0; n < kCount / 4; ++n) {
        if (query + 8 * n < of_key[half].y) s[4 * n + 2 * half] = -INFINITY;
        if (query + 8 * n + 1 < of_key[half].y) s[4 * n + 2 * half + 1] = -INFINITY;
      }
    }
  }
}

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
