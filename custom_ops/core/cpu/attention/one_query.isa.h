// Attention of one query, as in decoding with a cache of keys: keys and values are read where they lie. Vectors run
// along the keys for the scores, and along head_dim for the result. The heads of a sequence take turns at a tile of
// keys, for their rows lie beside each other: those of one head alone may be a page of memory apart.
//
// A score is summed in the order that Scores has, so that backward computes the same bits again.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct OneQuery {
  using A = Accumulator<T>;
  using P = Operand<T>;

  static constexpr int64_t kNumbersAtOnce = kLanes<P> * kNumbers<T>;

  const Head<T>& head;
  const P* query;  // [stride]
  A* scores;       // [kKeyTile][kQueryTile], of which the mask takes the first column
  uint64_t* kept;  // [kKeyTile] or null
  A& maximum;      // the highest score so far
  A& sum;          // of exp(score - maximum)
  A* out;          // [padded]: not yet divided by it

  // Brings the result up to date with a tile of keys.
  void add_tile(const ScoreTile& tile) const {
    constexpr int lanes = kLanes<A>;
    const HeadRows<const T> keys = head.layout.template key_rows<const T>(head.p.key, head.index);
    const HeadRows<const T> values = head.layout.template key_rows<const T>(head.p.value, head.index);
    A weights[kKeyTile];
    std::fill(weights, weights + kKeyTile, -std::numeric_limits<A>::infinity());
    for (int64_t j = 0; j < tile.keys; j += lanes) {
      const int64_t count = std::min<int64_t>(lanes, tile.keys - j);
      A lane_scores[lanes];
      store(lane_scores, score(keys, tile.first_key + j, count) * head.score_scale);
      std::copy(lane_scores, lane_scores + count, weights + j);
    }
    hide(tile, weights);

    Vec<A> highest = broadcast(maximum);
    for (int64_t j = 0; j < kKeyTile; j += lanes) highest = vmax<A>(load(weights + j), highest);
    A highest_lanes[lanes];
    store(highest_lanes, highest);
    const A new_maximum = *std::max_element(highest_lanes, highest_lanes + lanes);
    const A finite = new_maximum == -std::numeric_limits<A>::infinity() ? A(0) : new_maximum;
    Vec<A> tile_sum{};
    for (int64_t j = 0; j < kKeyTile; j += lanes) {
      const Vec<A> weight = vexp(load(weights + j) - broadcast(finite));
      tile_sum += weight;
      store(weights + j, weight);
    }
    A old[lanes];
    store(old, vexp(broadcast(maximum - finite)));
    sum = sum * old[0] + horizontal_sum<A>(tile_sum);
    maximum = new_maximum;
    if (kept) {
      for (int64_t j = 0; j < tile.keys; ++j) weights[j] = kept[j] & 1 ? weights[j] : A(0);
    }
    add_values(values, tile, weights, old[0]);
  }

 private:
  // query @ k^T of `count` keys, at most a vector.
  Vec<A> score(const HeadRows<const T>& keys, int64_t first, int64_t count) const {
    constexpr int lanes = kLanes<P>;
    Vec<A> result{};
    for (int64_t d = 0; d < head.shape.depth; d += lanes) {
      const int64_t number = d * kNumbers<T>;
      const int64_t left = head.p.head_dim - number;
      Vec<P> rows[lanes];
      if (count == lanes && left >= kNumbersAtOnce) {
        const T* source = keys.row(first) + number;
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) {
          rows[l] = load_operands<T>(source);
          __builtin_prefetch(source + head.p.key.head_stride);
          source += keys.stride;
        }
      } else {
        for (int64_t l = 0; l < lanes; ++l) {
          T numbers[kNumbersAtOnce] = {};
          if (l < count) {
            std::memcpy(numbers, keys.row(first + l) + number, std::min(left, kNumbersAtOnce) * sizeof(T));
          }
          rows[l] = load_operands<T>(numbers);
        }
      }
      transpose_lanes<P>(rows);
      const int64_t depths = std::min<int64_t>(lanes, head.shape.depth - d);
      if (depths == lanes) {
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) result = multiply_add(rows[l], broadcast(query[d + l]), result);
      } else {
        for (int64_t l = 0; l < depths; ++l) result = multiply_add(rows[l], broadcast(query[d + l]), result);
      }
    }
    return result;
  }

  // Adds the mask, and hides what is not seen.
  void hide(const ScoreTile& tile, A* row) const {
    const int64_t end_key = tile.first_key + tile.keys;
    const bool hides =
        head.ranges.data || head.visibility.hides_any(tile.first_query, tile.first_query + 1, tile.first_key, end_key);
    if (kept) keep_tile(head.p, head.index, tile, kept);
    if (!hides && !head.p.mask.data) return;
    for (int64_t j = 0; j < tile.keys; ++j) scores[j * kQueryTile] = row[j];
    if (head.p.mask.data) add_mask(head.p.mask, head.index, tile, scores);
    if (hides) hide_unseen(head.visibility, head.ranges, tile, scores);
    for (int64_t j = 0; j < tile.keys; ++j) row[j] = scores[j * kQueryTile];
  }

  static Vec<A> load_numbers(const T* source) {
    if constexpr (std::is_same_v<T, A>) {
      return load(source);
    } else {
      return load_widened(source);
    }
  }

  // out = out * rescale + weights @ v
  void add_values(const HeadRows<const T>& values, const ScoreTile& tile, const A* weights, A rescale) const {
    constexpr int lanes = kLanes<A>;
    const int64_t whole = round_down(head.p.head_dim, int64_t{lanes});
    int64_t d = 0;
    for (; d + 4 * lanes <= whole; d += 4 * lanes) add_columns<4>(values, tile, weights, rescale, d);
    for (; d < whole; d += lanes) add_columns<1>(values, tile, weights, rescale, d);
    if (d == head.p.head_dim) return;
    for (int64_t i = d; i < head.p.head_dim; ++i) out[i] *= rescale;
    for (int64_t j = 0; j < tile.keys; ++j) {
      const T* row = values.row(tile.first_key + j);
      for (int64_t i = d; i < head.p.head_dim; ++i) out[i] += weights[j] * static_cast<A>(widen(row[i]));
    }
  }

  template <int kVectors>
  void add_columns(const HeadRows<const T>& values, const ScoreTile& tile, const A* weights, A rescale,
                   int64_t d) const {
    constexpr int lanes = kLanes<A>;
    Vec<A> sums[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v] = load(out + d + v * lanes) * rescale;
    for (int64_t j = 0; j < tile.keys; ++j) {
      const T* row = values.row(tile.first_key + j) + d;
      const T* ahead = row + head.p.value.head_stride;
      const Vec<A> weight = broadcast(weights[j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(ahead + v * lanes);
        sums[v] = multiply_add(weight, load_numbers(row + v * lanes), sums[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + d + v * lanes, sums[v]);
  }
};

}  // namespace pfa::cpu::PFA_ISA
