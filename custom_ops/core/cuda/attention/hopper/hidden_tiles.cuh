// What the kernels of both passes do with ranges of hidden queries (hidden_tiles.h).
#pragma once

#include "core/cuda/attention/hopper/hidden_tiles.h"
#include "core/cuda/attention/hopper/instructions.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

#if PFA_HOPPER_CODE

// Walks go over the tiles that someone sees in two phases: first those of which ranges hide nothing, then the others.
// So loops over the former need not ask.
enum Phase : int { kPlainTiles, kHidingTiles };

// The bits of word `w` that stand for tiles in `tiles`.
__device__ __forceinline__ uint32_t bits_in(const Range<int>& tiles, int w) {
  const auto before = [&](int tile) { return __funnelshift_lc(~0u, 0u, min(max(tile - 32 * w, 0), 32)); };
  return before(tiles.end) & ~before(tiles.first);
}

// Word `w` of the bits of kRows neighbouring rows together, as far as it is in `tiles`.
template <int kRows>
__device__ __forceinline__ TileBits bits_of_rows(const TileBits* rows, int words, const Range<int>& tiles, int w) {
  TileBits all{};
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const TileBits bits = rows[row * words + w];
    all.seen |= bits.seen;
    all.hides |= bits.hides;
  }
  all.seen &= bits_in(tiles, w);
  return all;
}

__device__ __forceinline__ uint32_t tiles_of_phase(const TileBits& bits, int phase) {
  return bits.seen & (phase == kPlainTiles ? ~bits.hides : bits.hides);
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
    left = tiles.first < tiles.end ? tiles_of_phase(bits_of_rows<1>(row, 0, tiles, word), phase) : 0;
  }

  __device__ __forceinline__ int count(int of_phase) const {
    int count = 0;
    for (int w = tiles.first / 32; 32 * w < tiles.end; ++w) {
      count += __popc(tiles_of_phase(bits_of_rows<1>(row, 0, tiles, w), of_phase));
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
      left = tiles_of_phase(bits_of_rows<1>(row, 0, tiles, word), phase);
    }
    const int bit = __ffs(left) - 1;
    left &= left - 1;
    return 32 * word + bit;
  }
};

// A tile of forward's walk, in a list: which it is, and which of the thread block's two warpgroups see some of it.
constexpr int kTileOfEntry = (1 << 14) - 1;
__device__ __forceinline__ bool sees_entry(int entry, int group) { return entry >> (14 + group) & 1; }

// Forward's walk written to `list`, by a warp, from the rows of bits of both warpgroups; returns the numbers of tiles
// of either phase.
__device__ __forceinline__ int2 list_tiles(const TileBits* rows, int words, const Range<int>& tiles, uint16_t* list) {
  const int lane = threadIdx.x % 32;
  int counts[2];
  int listed = 0;
#pragma unroll
  for (int phase = 0; phase < 2; ++phase) {
    const int before = listed;
    for (int first = tiles.first / 32; 32 * first < tiles.end; first += 32) {
      const int w = first + lane;
      uint32_t left = 0, seen[2] = {};
      if (32 * w < tiles.end) {
        left = tiles_of_phase(bits_of_rows<2>(rows, words, tiles, w), phase);
        seen[0] = rows[w].seen;
        seen[1] = rows[words + w].seen;
      }
      int place = __popc(left);
#pragma unroll
      for (int other = 1; other < 32; other *= 2) {
        const int of_other = __shfl_up_sync(0xFFFFFFFFu, place, other);
        if (lane >= other) place += of_other;
      }
      const int count = __shfl_sync(0xFFFFFFFFu, place, 31);
      for (place += listed - __popc(left); left != 0; left &= left - 1) {
        const int bit = __ffs(left) - 1;
        list[place++] = static_cast<uint16_t>(32 * w + bit | (seen[0] >> bit & 1) << 14 | (seen[1] >> bit & 1) << 15);
      }
      listed += count;
    }
    counts[phase] = listed - before;
  }
  return make_int2(counts[0], counts[1]);
}

// What a range {first, length} hides of `count` queries from `query` on.
struct HiddenPart {
  bool all;
  bool some;  // but not all
};
__device__ __forceinline__ HiddenPart part_of(const uint2& range, uint32_t query, uint32_t count) {
  const uint32_t place = query - range.x;
  const bool begins = place < range.y;
  const bool all = begins & (range.y - place >= count);
  const bool any = begins | ((range.y != 0) & (range.x - query < count));
  return {all, any && !all};
}

// What ranges hide of a warp's 16 rows of queries and the keys of a tile.
struct HiddenKeys {
  uint32_t from_all[kKeys / 32];  // bits of the keys that are hidden from all rows
  bool from_some;                 // whether there are others that are hidden from some

  // In all lanes of the warp, whose rows begin with query `strip`. ranges: those of the tile's keys, [1 or 2][kKeys].
  __device__ __forceinline__ void find(const uint2* ranges, bool two, int strip) {
    bool some = false;
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) {
      const uint2* of_key = ranges + 32 * i + threadIdx.x % 32;
      HiddenPart part = part_of(of_key[0], strip, 16);
      if (two) {
        const HiddenPart second = part_of(of_key[kKeys], strip, 16);
        part.all = part.all || second.all;
        part.some = (part.some || second.some) && !part.all;
      }
      some |= part.some;
      from_all[i] = __ballot_sync(0xFFFFFFFFu, part.all);
    }
    from_some = __any_sync(0xFFFFFFFFu, some);
  }

  // Makes -inf of their scores.
  __device__ __forceinline__ void hide(const uint2* ranges, bool two, int strip, float (&s)[kKeys / 2]) const {
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
    for (int r = 0; r < 1 + two; ++r) {
      const uint2* of_lane = ranges + r * kKeys + lane_column(0);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const uint4 pair = *reinterpret_cast<const uint4*>(of_lane + 8 * n);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (query + 8 * half - pair.x < pair.y) s[4 * n + 2 * half] = -INFINITY;
          if (query + 8 * half - pair.z < pair.w) s[4 * n + 2 * half + 1] = -INFINITY;
        }
      }
    }
  }
};

// The queries that a range {first, length} hides among those of the lane's columns from row0 on, as bits
// (lane_columns_in).
__device__ __forceinline__ uint32_t hidden_columns(const uint2& range, int row0) {
  const int first = static_cast<int>(range.x);
  const int end = static_cast<int>(range.x + range.y);
  const uint32_t from_first = ~lane_columns_before(first - row0);
  const uint32_t before_end = lane_columns_before(end - row0);
  return first <= end ? from_first & before_end : from_first | before_end;
}

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
