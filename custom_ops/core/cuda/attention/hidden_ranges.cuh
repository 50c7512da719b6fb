// What ranges of queries (visibility.h) hide in a tile of scores, and walks that leave out tiles that are hidden as a
// whole.
#pragma once

#include "core/cuda/attention/heads.cuh"

namespace pfa {
namespace cuda {

enum class Hidden { kNothing, kSome, kAll };

// What is hidden of the kKeys keys from first_key on from the queries first_query..end_query - 1. The lanes of a warp
// share out the keys, and all get the answer; so do all warps that ask the same.
template <int kKeys>
__device__ __forceinline__ Hidden hidden_of_tile(const HeadState& head, int first_query, int end_query, int first_key) {
  end_query = min(end_query, head.visibility.queries);
  const auto overlaps = [&](const Range<int>& range) {
    return max(range.first, first_query) < min(range.end, end_query);
  };
  bool all = true;
  bool any = false;
#pragma unroll
  for (int k = 0; k < kKeys; k += 32) {
    const int key = first_key + k + static_cast<int>(threadIdx.x % 32) % kKeys;
    if (key >= head.visibility.keys) continue;
    const HiddenQueries<int> hidden = head.ranges.of_key(key);
    all = all && hidden.contain(first_query, end_query);
    any = any || overlaps(hidden.first) || overlaps(hidden.second);
  }
  if (__all_sync(0xFFFFFFFFu, all)) return Hidden::kAll;
  return __any_sync(0xFFFFFFFFu, any) ? Hidden::kSome : Hidden::kNothing;
}

// What ranges leave of `walk`, the queries that may see the kKeys keys from first_key on: from the first to the last
// that sees one of them.
template <int kKeys>
__device__ __forceinline__ Range<int> seeing_queries(const HeadState& head, const Range<int>& walk, int first_key) {
  int first = walk.end;
  int end = walk.first;
#pragma unroll
  for (int k = 0; k < kKeys; k += 32) {
    const int key = first_key + k + static_cast<int>(threadIdx.x % 32) % kKeys;
    if (key >= head.visibility.keys) continue;
    const HiddenQueries<int> hidden = head.ranges.of_key(key);
    Range<int> seeing = walk;
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // the end of one range may lie in the other
      if (hidden.first.contains(seeing.first)) seeing.first = hidden.first.end;
      if (hidden.second.contains(seeing.first)) seeing.first = hidden.second.end;
      if (hidden.first.contains(seeing.end - 1)) seeing.end = hidden.first.first;
      if (hidden.second.contains(seeing.end - 1)) seeing.end = hidden.second.first;
    }
    first = min(first, seeing.first);
    end = max(end, seeing.end);
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    first = min(first, __shfl_xor_sync(0xFFFFFFFFu, first, lane));
    end = max(end, __shfl_xor_sync(0xFFFFFFFFu, end, lane));
  }
  return {first, max(first, end)};
}

__device__ __forceinline__ bool is_hidden(const HeadState& head, int query, int key) {
  return head.ranges.of_key(min(key, head.visibility.keys - 1)).contains(query);
}

// A tile of a walk.
struct WalkTile {
  int first;   // its first query or key
  bool hides;  // ranges hide some of it
};

// The first tile from `first` on, in steps of kStep, that is not hidden as a whole; at or past `end` if there is none.
// hidden_at: what is hidden of the tile that begins there; it is asked only where there are ranges.
template <int kStep, bool kRanges, class HiddenAt>
__device__ __forceinline__ WalkTile next_tile(const HeadState& head, int first, int end, HiddenAt&& hidden_at) {
  if constexpr (kRanges) {
    if (head.ranges.data) {
      for (; first < end; first += kStep) {
        const Hidden hidden = hidden_at(first);
        if (hidden != Hidden::kAll) return {first, hidden == Hidden::kSome};
      }
    }
  }
  return {first, false};
}

}  // namespace cuda
}  // namespace pfa
