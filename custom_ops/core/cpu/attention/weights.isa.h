// The weights of the values, w = r p: the probabilities computed again of the scores and of what forward saved, times
// the dropout factors r. And their gradient, as backward reads it.

namespace pfa::cpu::PFA_ISA {

// From query `query` of the head on, of weights or their gradient [batch, H, queries, keys].
template <class E>
E* weights_row(const AttentionParams& p, const HeadIndex& head, E* weights, int64_t query) {
  return weights + (head.flat * p.queries + query) * p.keys;
}

// The sum over the keys of dw w of a query; `scratch` has room for two rows of kKeyTile.
template <class T, class A>
A weights_dot(const Head<T>& head, int64_t query, A* scratch) {
  const AttentionParams& p = head.p;
  const T* weights = weights_row(p, head.index, static_cast<const T*>(p.weights), query);
  const T* d_weights = weights_row(p, head.index, static_cast<const T*>(p.d_weights), query);
  A sum = 0;
  for (int64_t first = 0; first < p.keys; first += kKeyTile) {
    const int64_t count = std::min(kKeyTile, p.keys - first);
    load_row(weights + first, count, scratch);
    load_row(d_weights + first, count, scratch + kKeyTile);
    sum += row_dot<A>(scratch, scratch + kKeyTile, count);
  }
  return sum;
}

// d_probability [keys][kQueryTile] = dropout's scale * dw^T, zero from the last query up to the next whole vector.
template <class T, class A>
void load_weight_gradient(const Head<T>& head, const ScoreTile& tile, A* d_probability) {
  const AttentionParams& p = head.p;
  const A scale = static_cast<A>(p.dropout.scale);
  A row[kKeyTile];
  for (int64_t i = 0; i < round_up(tile.queries, kLanes<A>); ++i) {
    if (i < tile.queries) {
      const T* source = weights_row(p, head.index, static_cast<const T*>(p.d_weights), tile.first_query + i);
      load_row(source + tile.first_key, tile.keys, row);
    } else {
      std::fill(row, row + tile.keys, A(0));
    }
    for (int64_t j = 0; j < tile.keys; ++j) d_probability[j * kQueryTile + i] = scale * row[j];
  }
}

template <class T>
struct AttentionWeights {
  using A = Accumulator<T>;

  // The workspace is that of forward, of which each thread has more than these tiles.
  static size_t thread_bytes(const AttentionParams& p) {
    Arena arena;
    Scores<T>(arena, p);
    return arena.used();
  }

  static void run(Context& context, const AttentionParams& p) {
    const int64_t query_tiles = ceil_div(p.queries, kQueryTile);
    const size_t bytes = thread_bytes(p);
    parallel_for(p.batch * p.num_heads * query_tiles, context.threads, [&](int64_t index, int thread) {
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      const Head<T> head(p, index / query_tiles);
      query_tile(head, index % query_tiles * kQueryTile, Scores<T>(arena, p));
    });
  }

  static void query_tile(const Head<T>& head, int64_t first_query, const Scores<T>& scores) {
    const AttentionParams& p = head.p;
    const int64_t queries = std::min(kQueryTile, p.queries - first_query);
    const Range<int64_t> seen = head.visibility.keys_of(first_query, first_query + queries);
    const Range<int64_t> keys = whole_tiles({0, p.keys}, seen, kKeyTile);
    T* const rows = weights_row(p, head.index, static_cast<T*>(p.weights), first_query);
    const auto clear = [&](int64_t first, int64_t end) {
      for (int64_t i = 0; i < queries && first < end; ++i)
        std::fill(rows + i * p.keys + first, rows + i * p.keys + end, T{});
    };

    // Beyond the last query there is none with probabilities.
    alignas(64) A score_shift[kQueryTile] = {};
    alignas(64) A log_sum_exp[kQueryTile];
    std::fill(log_sum_exp, log_sum_exp + kQueryTile, std::numeric_limits<A>::infinity());
    std::copy_n(head.statistics(p.score_shift, first_query), queries, score_shift);
    std::copy_n(head.statistics(p.log_sum_exp, first_query), queries, log_sum_exp);

    scores.load_queries(head, first_query, queries);
    clear(0, std::min(keys.first, p.keys));
    clear(std::max(keys.first, keys.end), p.keys);
    for (int64_t first_key = keys.first; first_key < keys.end; first_key += kKeyTile) {
      const ScoreTile tile{first_query, queries, first_key, std::min(kKeyTile, keys.end - first_key)};
      if (hides_tile(head.ranges, tile)) {
        clear(first_key, first_key + tile.keys);
        continue;
      }
      // scale * scores [keys, queries] = scale of scores * k @ q^T + mask
      scores.load_keys(head, first_key, tile.keys);
      ComingRows none;
      const A scale = scores.compute(head, tile, none);
      const A factor = static_cast<A>(p.dropout.scale);
      for (int64_t i = 0; i < round_up(queries, kLanes<A>); i += kLanes<A>) {
        for (int64_t j = 0; j < tile.keys; ++j) {
          A* const score = scores.scores + j * kQueryTile + i;
          Vec<A> weight = vexp(load(score) * scale - load(score_shift + i) - load(log_sum_exp + i)) * factor;
          if (scores.kept) weight = keep_lanes<A>(scores.kept + j, i, weight);
          store(score, weight);
        }
      }
      A row[kKeyTile];
      for (int64_t i = 0; i < queries; ++i) {
        for (int64_t j = 0; j < tile.keys; ++j) row[j] = scores.scores[j * kQueryTile + i];
        store_row(row, tile.keys, rows + i * p.keys + first_key);
      }
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
