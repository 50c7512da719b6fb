// What a query may not see, in a tile of scores: the mask is added, and what is hidden by position or by ranges of
// queries becomes -inf.

namespace pfa::cpu::PFA_ISA {

template <class A, class M>
inline A mask_term(M value) {
  if constexpr (std::is_integral_v<M>) {
    return value ? A(0) : -std::numeric_limits<A>::infinity();
  } else {
    return static_cast<A>(widen(value));
  }
}

// Those of a vector's numbers from `source` on.
template <class A, class M>
inline Vec<A> mask_terms(const M* source) {
  if constexpr (std::is_same_v<M, A>) {
    return load(source);
  } else {
    A terms[kLanes<A>];
    for (int l = 0; l < kLanes<A>; ++l) terms[l] = mask_term<A>(source[l]);
    return load(terms);
  }
}

template <class M, class A>
void add_mask_typed(const Mask& mask, const HeadIndex& head, const ScoreTile& tile, A* scores) {
  const int64_t query_stride = mask.strides[2];
  const int64_t key_stride = mask.strides[3];
  const int64_t queries = tile.queries;
  const int64_t keys = tile.keys;
  const M* origin = static_cast<const M*>(mask.data) + head.batch * mask.strides[0] + head.head * mask.strides[1] +
                    tile.first_query * query_stride + tile.first_key * key_stride;
  if (query_stride == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      const A term = mask_term<A>(origin[j * key_stride]);
      for (int64_t i = 0; i < queries; ++i) scores[j * kQueryTile + i] += term;
    }
    return;
  }
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t first = 0; first < keys; first += lanes) {
    const int64_t count = std::min(lanes, keys - first);
    if (count == lanes && key_stride == 1) {
      // Squares of rows of the mask, transposed.
      for (int64_t i = 0; i < queries; i += lanes) {
        Vec<A> terms[lanes];
        for (int64_t l = 0; l < lanes; ++l) {
          terms[l] = i + l < queries ? mask_terms<A>(origin + (i + l) * query_stride + first) : Vec<A>{};
        }
        transpose_lanes<A>(terms);
#pragma GCC unroll 16
        for (int64_t l = 0; l < lanes; ++l) {
          A* const row = scores + (first + l) * kQueryTile + i;
          store(row, load(row) + terms[l]);
        }
      }
      continue;
    }
    for (int64_t i = 0; i < queries; ++i) {
      const M* row = origin + i * query_stride + first * key_stride;
      for (int64_t j = 0; j < count; ++j) scores[(first + j) * kQueryTile + i] += mask_term<A>(row[j * key_stride]);
    }
  }
}

// Adds the mask to scores [keys][kQueryTile].
template <class A>
void add_mask(const Mask& mask, const HeadIndex& head, const ScoreTile& tile, A* scores) {
  const auto add = [&](auto type) { add_mask_typed<decltype(type)>(mask, head, tile, scores); };
  switch (mask.dtype) {
    case DType::kFloat32:
      return add(float{});
    case DType::kFloat64:
      return add(double{});
    case DType::kFloat16:
      return add(Float16{});
    case DType::kBFloat16:
      return add(BFloat16{});
    case DType::kBool:
    case DType::kUInt8:
    case DType::kInt8:
      return add(uint8_t{});
    case DType::kInt16:
      return add(int16_t{});
    case DType::kInt32:
      return add(int32_t{});
    case DType::kInt64:
      return add(int64_t{});
  }
}

// Makes scores [keys][kQueryTile] -inf where the query does not see the key.
template <class A>
void hide_unseen(const Visibility<int64_t>& visibility, const HiddenRanges<int64_t>& ranges, const ScoreTile& tile,
                 A* scores) {
  const auto hide = [&](int64_t j, int64_t first_query, int64_t end_query) {
    const int64_t first = std::max<int64_t>(first_query - tile.first_query, 0);
    const int64_t end = std::min(end_query - tile.first_query, tile.queries);
    A* row = scores + j * kQueryTile;
    if (first < end) std::fill(row + first, row + end, -std::numeric_limits<A>::infinity());
  };
  const int64_t end_query = tile.first_query + tile.queries;
  if (visibility.hides_any(tile.first_query, end_query, tile.first_key, tile.first_key + tile.keys)) {
    for (int64_t j = 0; j < tile.keys; ++j) {
      const Range<int64_t> seeing = visibility.queries_of(tile.first_key + j);
      hide(j, tile.first_query, seeing.first);
      hide(j, seeing.end, end_query);
    }
  }
  if (!ranges.data) return;
  for (int64_t j = 0; j < tile.keys; ++j) {
    const HiddenQueries<int64_t> hidden = ranges.of_key(tile.first_key + j);
    hide(j, hidden.first.first, hidden.first.end);
    hide(j, hidden.second.first, hidden.second.end);
  }
}

// Whether the ranges hide every key of the tile from every query.
inline bool hides_tile(const HiddenRanges<int64_t>& ranges, const ScoreTile& tile) {
  if (!ranges.data) return false;
  for (int64_t j = 0; j < tile.keys; ++j) {
    if (!ranges.of_key(tile.first_key + j).contain(tile.first_query, tile.first_query + tile.queries)) return false;
  }
  return true;
}

}  // namespace pfa::cpu::PFA_ISA
