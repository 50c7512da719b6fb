// Who sees whom, by position: which keys a query may see, and which queries may see a key. What the mask hides beyond
// that is not known here.
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
  bool causal;  // query i sees no key after i

  // The keys that any of the queries first_query..end_query - 1 may see.
  PFA_HOST_DEVICE Range<Index> keys_of(Index /*first_query*/, Index end_query) const {
    return {0, causal && end_query < keys ? end_query : keys};
  }
  PFA_HOST_DEVICE Range<Index> keys_of(Index query) const { return keys_of(query, query + 1); }

  // The queries that may see any of the keys first_key..end_key - 1; nobody sees what lies past the last key.
  PFA_HOST_DEVICE Range<Index> queries_of(Index first_key, Index /*end_key*/) const {
    if (first_key >= keys) return {0, 0};
    return {causal ? first_key : 0, queries};
  }
  PFA_HOST_DEVICE Range<Index> queries_of(Index key) const { return queries_of(key, key + 1); }

  // Whether some query of first_query..end_query - 1 does not see some key of first_key..end_key - 1.
  PFA_HOST_DEVICE bool hides_any(Index first_query, Index end_query, Index first_key, Index end_key) const {
    return first_key < keys_of(end_query - 1).first || end_key > keys_of(first_query).end;
  }

  // Whether walks over keys or queries differ in length.
  PFA_HOST_DEVICE bool is_uneven() const { return causal; }

  PFA_HOST_DEVICE bool sees(Index query, Index key) const { return keys_of(query).contains(key); }
};

template <class Index>
PFA_HOST_DEVICE Visibility<Index> visibility_of(const AttentionParams& p) {
  return {static_cast<Index>(p.seq_len), static_cast<Index>(p.seq_len), p.causal};
}

}  // namespace pfa
