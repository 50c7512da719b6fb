// Who sees whom, by position and by ranges of queries that a key is hidden from: which keys a query may see, and which
// queries may see a key. What the mask hides beyond that is not known here.
//
// Positions of queries and keys count from 0. Kernels ask four things: over which keys to walk for a tile of queries,
// over which queries for a tile of keys, whether a tile has to be looked at element by element, and then whether a
// query sees a key. A new kind of visibility changes the answers here and no kernel.
#pragma once

#include <type_traits>

#include "core/host_device.h"
#include "core/params.h"

namespace pfa {

// Positions first..end - 1.
template <class Index>
struct Range {
  Index first;
  Index end;

  PFA_HOST_DEVICE bool contains(Index position) const {
    using Unsigned = std::make_unsigned_t<Index>;
    return static_cast<Unsigned>(position - first) < static_cast<Unsigned>(end - first);
  }
};

// Index: the type that positions are counted in, int64_t on the CPU and int on GPUs.
template <class Index>
struct Visibility {
  Index queries;
  Index keys;
  // Query i sees keys i + first_offset .. i + end_offset - 1, as far as there are such.
  Index first_offset;  // at least -queries
  Index end_offset;    // at most keys

  // The keys that any of the queries first_query..end_query - 1 may see.
  PFA_HOST_DEVICE Range<Index> keys_of(Index first_query, Index end_query) const {
    return clipped(first_query + first_offset, end_query - 1 + end_offset, keys);
  }
  PFA_HOST_DEVICE Range<Index> keys_of(Index query) const { return keys_of(query, query + 1); }

  // The queries that may see any of the keys first_key..end_key - 1; nobody sees what lies past the last key.
  PFA_HOST_DEVICE Range<Index> queries_of(Index first_key, Index end_key) const {
    if (first_key >= keys) return {0, 0};
    return clipped(first_key - end_offset + 1, (end_key < keys ? end_key : keys) - first_offset, queries);
  }
  PFA_HOST_DEVICE Range<Index> queries_of(Index key) const { return queries_of(key, key + 1); }

  // Whether some query of first_query..end_query - 1 does not see some key of first_key..end_key - 1.
  PFA_HOST_DEVICE bool hides_any(Index first_query, Index end_query, Index first_key, Index end_key) const {
    return first_key < end_query - 1 + first_offset || end_key > keys_of(first_query).end;
  }

  // Whether walks over keys or queries differ in length.
  PFA_HOST_DEVICE bool is_uneven() const { return first_offset > 1 - queries || end_offset < keys; }

  PFA_HOST_DEVICE bool sees(Index query, Index key) const { return keys_of(query).contains(key); }

 private:
  // What there is of first..end - 1 among `count` positions.
  PFA_HOST_DEVICE static Range<Index> clipped(Index first, Index end, Index count) {
    first = first > 0 ? first : 0;
    end = end < count ? end : count;
    return {first, end > first ? end : first};
  }
};

// Of the sequences of `queries` and `keys` positions.
template <class Index>
PFA_HOST_DEVICE Visibility<Index> visibility_of(const AttentionParams& p, int64_t queries, int64_t keys) {
  const int64_t aligned = keys - queries;  // the key beside query 0
  int64_t first_offset = -queries;
  int64_t end_offset = keys;
  if (p.window_left >= 0 && aligned - p.window_left > first_offset) first_offset = aligned - p.window_left;
  const int64_t after = p.causal ? 0 : p.window_right;
  if (after >= 0 && after < keys - aligned) end_offset = aligned + after + 1;
  return {static_cast<Index>(queries), static_cast<Index>(keys), static_cast<Index>(first_offset),
          static_cast<Index>(end_offset)};
}

template <class Index>
PFA_HOST_DEVICE Visibility<Index> visibility_of(const AttentionParams& p) {
  return visibility_of<Index>(p, p.queries, p.keys);
}

// The queries that a key is hidden from: two ranges, either of which may be empty.
template <class Index>
struct HiddenQueries {
  Range<Index> first;
  Range<Index> second;

  PFA_HOST_DEVICE bool contains(Index query) const { return first.contains(query) || second.contains(query); }

  // True only if these are all hidden.
  PFA_HOST_DEVICE bool contain(Index first_query, Index end_query) const {
    return (first.first <= first_query && end_query <= first.end) ||
           (second.first <= first_query && end_query <= second.end);
  }
};

// Of the keys that one head reads.
template <class Index>
struct HiddenRanges {
  const int32_t* data;  // [keys][columns], or null: nothing is hidden
  int columns;
  bool between;
  Index queries;

  PFA_HOST_DEVICE HiddenQueries<Index> of_key(Index key) const {
    const int32_t* column = data + static_cast<int64_t>(key) * columns;
    if (columns == 4) return {range(column[0], column[1]), range(column[2], column[3])};
    if (columns == 1) return {range(column[0], queries), {0, 0}};
    if (between) return {range(column[0], column[1]), {0, 0}};
    return {range(column[0], queries), range(0, column[1])};
  }

 private:
  PFA_HOST_DEVICE Range<Index> range(Index first, Index end) const {
    first = first > 0 ? first : 0;
    end = end < queries ? end : queries;
    return {first, end > first ? end : first};
  }
};

template <class Index>
PFA_HOST_DEVICE HiddenRanges<Index> hidden_ranges(const ColumnRanges& ranges, int64_t batch, int64_t kv_head,
                                                  Index queries) {
  const int32_t* data =
      ranges.data ? ranges.data + batch * ranges.batch_stride + kv_head * ranges.head_stride : nullptr;
  return {data, ranges.columns, ranges.between, queries};
}

}  // namespace pfa
