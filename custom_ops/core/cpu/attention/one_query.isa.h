// Attention of one query, as in decoding with a cache of keys: keys and values are read where they lie, once for all
// the query's heads. Vectors run along the keys for the scores, and along head_dim for the result. All heads take a few
// keys and then the next few, for a token's rows lie beside each other: the memory is read nearly in its order.
//
// A score is summed in the order that Scores has, so that backward computes the same bits again.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct OneQuery {
  using A = Accumulator<T>;
  using P = Operand<T>;

  static constexpr int64_t kKeys = 16;  // at once; of dropout's random numbers so many belong together
  static constexpr int kTogether = 4;   // heads that share keys, at most
  static constexpr size_t kCacheLine = 64;

  struct Memory {
    P* queries;  // [heads][stride]
    A* weights;  // [heads][kKeys]: scores, then what dropout leaves of exp(score - maximum)
    A* maximum;  // [heads][lanes]: the highest score so far, in every lane
    A* sum;      // [heads][lanes]: of exp(score - maximum), in parts
    A* out;      // [heads][padded]: not yet divided by the sum

    Memory(Arena& arena, const AttentionParams& p, int64_t heads) {
      const HeadShape<T> shape(p);
      queries = take<P>(arena, heads * shape.stride);
      weights = take<A>(arena, heads * kKeys);
      maximum = take<A>(arena, heads * kLanes<A>);
      sum = take<A>(arena, heads * kLanes<A>);
      out = take<A>(arena, heads * shape.padded);
    }
  };

  const std::vector<Head<T>>& heads;  // of one sequence, one after the other
  int64_t query;
  A* scores;       // [kKeys][kQueryTile], of which the mask takes the first column
  uint64_t* kept;  // [kKeys] or null
  Memory memory;

  void run() const {
    const int64_t count = heads.size();
    const HeadShape<T>& shape = heads[0].shape;
    for (int64_t h = 0; h < count; ++h) {
      const Head<T>& head = heads[h];
      pack_along_depth<T>(head.layout.template query_rows<const T>(head.p.query, head.index), query, 1, shape,
                          memory.queries + h * shape.stride);
    }
    std::fill(memory.maximum, memory.maximum + count * kLanes<A>, -std::numeric_limits<A>::infinity());
    std::fill(memory.sum, memory.sum + count * kLanes<A>, A(0));
    std::fill(memory.out, memory.out + count * shape.padded, A(0));
    const Visibility<int64_t>& visibility = heads[0].visibility;
    const Range<int64_t> keys = whole_tiles({0, visibility.keys}, visibility.keys_of(query), kKeys);
    for (int64_t first = keys.first; first < keys.end; first += kKeys) {
      const ScoreTile tile{query, 1, first, std::min(kKeys, keys.end - first)};
      for_groups(tile, [&](int64_t h, auto together) { compute_scores<together()>(h, tile); });
      for (int64_t h = 0; h < count; ++h) {
        if (!hides_tile(heads[h].ranges, tile)) compute_weights(h, tile);
      }
      for_groups(tile, [&](int64_t h, auto together) { add_values<together()>(h, tile); });
    }
  }

  // Of head h: the highest score, the sum without it, and the result that is to be divided by it.
  void result(int64_t h, A* highest, A* whole_sum, A* row) const {
    const int64_t padded = heads[h].shape.padded;
    *highest = memory.maximum[h * kLanes<A>];
    *whole_sum = horizontal_sum<A>(load(memory.sum + h * kLanes<A>));
    std::copy(memory.out + h * padded, memory.out + (h + 1) * padded, row);
  }

 private:
  // Calls work(first head, how many) for heads that share keys of which they see any.
  template <class Work>
  void for_groups(const ScoreTile& tile, const Work& work) const {
    const int64_t count = heads.size();
    for (int64_t h = 0, together; h < count; h += together) {
      const int64_t group = heads[h].layout.group;
      together = std::min({int64_t{kTogether}, group - heads[h].index.head % group, count - h});
      if (hides_tile(heads[h].ranges, tile)) continue;
      switch (together) {
        case 1:
          work(h, std::integral_constant<int, 1>{});
          break;
        case 2:
          work(h, std::integral_constant<int, 2>{});
          break;
        case 3:
          work(h, std::integral_constant<int, 3>{});
          break;
        default:
          work(h, std::integral_constant<int, kTogether>{});
      }
    }
  }

  // weights = scale * query @ k^T, -inf beyond the last key
  template <int kHeads>
  void compute_scores(int64_t h, const ScoreTile& tile) const {
    constexpr int lanes = kLanes<A>;
    constexpr int vectors = kKeys / lanes;
    const Head<T>& head = heads[h];
    const HeadRows<const T> keys = head.layout.template key_rows<const T>(head.p.key, head.index);
    Vec<A> products[kHeads][vectors] = {};
    for (int64_t d = 0; d < head.shape.depth; d += lanes) {
      const P* numbers = memory.queries + h * head.shape.stride + d;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if (v * lanes >= tile.keys) break;
        const int64_t count = std::min<int64_t>(lanes, tile.keys - v * lanes);
        Vec<P> rows[lanes];  // [depths][keys]
        load_keys(keys, tile.first_key + v * lanes, count, d * kNumbers<T>, head.p.head_dim, rows);
        const auto add = [&](int l) {
#pragma GCC unroll 4
          for (int i = 0; i < kHeads; ++i) {
            products[i][v] = multiply_add(rows[l], broadcast(numbers[i * head.shape.stride + l]), products[i][v]);
          }
        };
        if (head.shape.depth - d >= lanes) {
#pragma GCC unroll 16
          for (int l = 0; l < lanes; ++l) add(l);
        } else {
          for (int64_t l = 0; l < head.shape.depth - d; ++l) add(l);
        }
      }
    }
    for (int i = 0; i < kHeads; ++i) {
      A* target = memory.weights + (h + i) * kKeys;
      for (int v = 0; v < vectors; ++v) store(target + v * lanes, products[i][v] * head.score_scale);
      std::fill(target + tile.keys, target + kKeys, -std::numeric_limits<A>::infinity());
    }
  }

  // rows [depths][keys]: a vector's numbers of head_dim, from `number` on, of `count` keys.
  static void load_keys(const HeadRows<const T>& keys, int64_t first, int64_t count, int64_t number, int64_t head_dim,
                        Vec<P> (&rows)[kLanes<P>]) {
    constexpr int lanes = kLanes<P>;
    constexpr int64_t at_once = lanes * kNumbers<T>;
    const int64_t left = head_dim - number;
    if (count == lanes && left >= at_once) {
      const T* source = keys.row(first) + number;
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) {
        rows[l] = load_operands<T>(source);
        prefetch_ahead(source, keys.stride);
        source += keys.stride;
      }
    } else {
      for (int64_t l = 0; l < lanes; ++l) {
        T numbers[at_once] = {};
        if (l < count) std::memcpy(numbers, keys.row(first + l) + number, std::min(left, at_once) * sizeof(T));
        rows[l] = load_operands<T>(numbers);
      }
    }
    transpose_lanes<P>(rows);
  }

  // The same numbers of the next keys: processors that look ahead by themselves stop at the end of a page.
  static void prefetch_ahead(const T* source, int64_t stride) { __builtin_prefetch(source + kKeys * stride, 0, 2); }

  // Brings the softmax of a head up to date with its scores, and rescales its result.
  void compute_weights(int64_t h, const ScoreTile& tile) const {
    constexpr int lanes = kLanes<A>;
    A* row = memory.weights + h * kKeys;
    add_masks(heads[h], tile, row);
    const Vec<A> old = load(memory.maximum + h * lanes);
    Vec<A> highest = old;
    for (int64_t j = 0; j < kKeys; j += lanes) highest = vmax<A>(load(row + j), highest);
    highest = highest_of_lanes<A>(highest);
    const Vec<A> finite = highest == -std::numeric_limits<A>::infinity() ? Vec<A>{} : highest;
    Vec<A> tile_sum{};
    for (int64_t j = 0; j < kKeys; j += lanes) {
      const Vec<A> weight = vexp(load(row + j) - finite);
      tile_sum += weight;
      store(row + j, weight);
    }
    const Vec<A> factor = vexp(old - finite);
    store(memory.maximum + h * lanes, highest);
    store(memory.sum + h * lanes, load(memory.sum + h * lanes) * factor + tile_sum);
    if (factor[0] != A(1)) {
      const int64_t padded = heads[h].shape.padded;
      A* target = memory.out + h * padded;
      for (int64_t d = 0; d < padded; d += lanes) store(target + d, load(target + d) * factor);
    }
    if (kept) {
      for (int64_t j = 0; j < tile.keys; ++j) row[j] = kept[j] & 1 ? row[j] : A(0);
    }
  }

  // Adds the mask, hides what is not seen, and draws what dropout keeps.
  void add_masks(const Head<T>& head, const ScoreTile& tile, A* row) const {
    const int64_t end_key = tile.first_key + tile.keys;
    const bool hides = head.ranges.data || head.visibility.hides_any(query, query + 1, tile.first_key, end_key);
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

  // out += weights @ v
  template <int kHeads>
  void add_values(int64_t h, const ScoreTile& tile) const {
    constexpr int lanes = kLanes<A>;
    constexpr int vectors = kHeads > 2 && PFA_VECTOR_BYTES < 64 ? 2 : 4;  // of which the registers hold all heads'
    const Head<T>& head = heads[h];
    const HeadRows<const T> values = head.layout.template key_rows<const T>(head.p.value, head.index);
    const int64_t whole = round_down(head.p.head_dim, int64_t{lanes});
    int64_t d = 0;
    for (; d + vectors * lanes <= whole; d += vectors * lanes) add_columns<kHeads, vectors>(h, values, tile, d);
    for (; d < whole; d += lanes) add_columns<kHeads, 1>(h, values, tile, d);
    if (d == head.p.head_dim) return;
    for (int i = 0; i < kHeads; ++i) {
      A* target = memory.out + (h + i) * head.shape.padded;
      for (int64_t j = 0; j < tile.keys; ++j) {
        const T* row = values.row(tile.first_key + j);
        const A weight = memory.weights[(h + i) * kKeys + j];
        for (int64_t n = d; n < head.p.head_dim; ++n) target[n] += weight * static_cast<A>(widen(row[n]));
      }
    }
  }

  template <int kHeads, int kVectors>
  void add_columns(int64_t h, const HeadRows<const T>& values, const ScoreTile& tile, int64_t d) const {
    constexpr int lanes = kLanes<A>;
    const int64_t padded = heads[h].shape.padded;
    A* target = memory.out + h * padded + d;
    const A* weight = memory.weights + h * kKeys;
    Vec<A> sums[kHeads][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kHeads; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = load(target + i * padded + v * lanes);
    }
    for (int64_t j = 0; j < tile.keys; ++j) {
      const T* row = values.row(tile.first_key + j) + d;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> numbers = load_numbers(row + v * lanes);
        if (v * lanes * sizeof(T) % kCacheLine == 0) prefetch_ahead(row + v * lanes, values.stride);
#pragma GCC unroll 4
        for (int i = 0; i < kHeads; ++i) {
          sums[i][v] = multiply_add(broadcast(weight[i * kKeys + j]), numbers, sums[i][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kHeads; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(target + i * padded + v * lanes, sums[i][v]);
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
