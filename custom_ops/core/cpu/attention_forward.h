// o = dropout(softmax(q k^T + mask)) v, a tile of queries at a time: for each tile of keys the scores are computed, the running
// maximum and sum of every query's softmax are brought up to date, and o is rescaled and added to (online softmax: Milakov and
// Gimelshein, 2018). Of the scores only the log-sum-exp of each query is kept.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct AttentionForward {
  using A = Accumulator<T>;

  // Tiles of one thread.
  struct Tiles {
    A* query;             // [kQueryTile][padded]
    A* query_transposed;  // [head_dim][kQueryTile]
    A* key;               // [kKeyTile][padded]
    A* value;             // [kKeyTile][padded]
    A* scores;            // [kKeyTile][kQueryTile]
    A* keep;              // [kKeyTile][kQueryTile]
    A* out_transposed;    // [head_dim][kQueryTile]
    A* maximum;           // [kQueryTile]
    A* sum;               // [kQueryTile]

    Tiles(Arena& arena, const Params& p) {
      const int64_t padded = padded_head_dim<T>(p);
      const auto take = [&](int64_t count) { return static_cast<A*>(arena.take(count * sizeof(A))); };
      query = take(kQueryTile * padded);
      query_transposed = take(p.head_dim * kQueryTile);
      key = take(kKeyTile * padded);
      value = take(kKeyTile * padded);
      scores = take(kKeyTile * kQueryTile);
      keep = p.attn_dropout.threshold ? take(kKeyTile * kQueryTile) : nullptr;
      out_transposed = take(p.head_dim * kQueryTile);
      maximum = take(kQueryTile);
      sum = take(kQueryTile);
    }
  };

  static size_t thread_bytes(const Params& p) {
    Arena arena;
    Tiles(arena, p);
    return arena.used();
  }

  static size_t workspace_bytes(const Context& context, const Params& p) { return context.threads * thread_bytes(p); }

  static void run(Context& context, const Params& p) {
    const int64_t query_tiles = (p.seq_len + kQueryTile - 1) / kQueryTile;
    const size_t bytes = thread_bytes(p);
    parallel_for(p.batch * p.num_heads * query_tiles, context.threads, [&](int64_t index, int thread) {
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      // The last tiles have the most keys under a causal mask: they come first, to even out the threads.
      query_tile(p, index / query_tiles, (query_tiles - 1 - index % query_tiles) * kQueryTile, Tiles(arena, p));
    });
  }

  static void query_tile(const Params& p, int64_t bh, int64_t i0, const Tiles& tiles) {
    const int64_t head_dim = p.head_dim;
    const int64_t padded = padded_head_dim<T>(p);
    const int64_t queries = std::min(kQueryTile, p.seq_len - i0);
    const int64_t width = round_up(queries, kLanes<A>);
    const A infinity = std::numeric_limits<A>::infinity();
    const A query_scale = A(1) / std::sqrt(static_cast<A>(head_dim));
    const PhiloxState random =
        p.attn_dropout.threshold ? philox_state(p.random_state[0], p.random_state[1], DropoutStage::kAttention) : PhiloxState{};

    pack_rows(qkv_rows<T>(p, bh, QkvPart::kQuery), i0, queries, head_dim, padded, query_scale, tiles.query);
    transpose_tile(tiles.query, queries, head_dim, padded, tiles.query_transposed);
    std::fill(tiles.maximum, tiles.maximum + width, -infinity);
    std::fill(tiles.sum, tiles.sum + width, A(0));
    std::fill(tiles.out_transposed, tiles.out_transposed + head_dim * kQueryTile, A(0));

    const int64_t keys_end = visible_keys(p, i0, queries);
    for (int64_t j0 = 0; j0 < keys_end; j0 += kKeyTile) {
      const int64_t keys = std::min(kKeyTile, keys_end - j0);
      pack_rows(qkv_rows<T>(p, bh, QkvPart::kKey), j0, keys, head_dim, padded, A(1), tiles.key);
      pack_rows(qkv_rows<T>(p, bh, QkvPart::kValue), j0, keys, head_dim, padded, A(1), tiles.value);
      score_tile(p, bh, i0, j0, queries, keys, tiles.key, padded, tiles.query_transposed, tiles.scores);
      if (tiles.keep) keep_tile(p, random, bh, i0, j0, queries, keys, tiles.keep);
      online_softmax(keys, width, head_dim, tiles);
      micro_gemm<A>(head_dim, width, keys, {tiles.value, 1, padded}, tiles.scores, kQueryTile, tiles.out_transposed, kQueryTile,
                    true);
    }
    write(p, bh, i0, queries, tiles);
  }

  // Scores to probabilities relative to the running maximum, dropped where asked for.
  static void online_softmax(int64_t keys, int64_t width, int64_t head_dim, const Tiles& tiles) {
    for (int64_t i = 0; i < width; i += kLanes<A>) {
      const Vec<A> old_maximum = load(tiles.maximum + i);
      Vec<A> maximum = old_maximum;
      for (int64_t j = 0; j < keys; ++j) maximum = vmax<A>(load(tiles.scores + j * kQueryTile + i), maximum);
      const Vec<A> finite = maximum == -std::numeric_limits<A>::infinity() ? Vec<A>{} : maximum;
      Vec<A> sum{};
      for (int64_t j = 0; j < keys; ++j) {
        A* score = tiles.scores + j * kQueryTile + i;
        const Vec<A> probability = vexp(load(score) - finite);
        sum += probability;
        store(score, tiles.keep ? probability * load(tiles.keep + j * kQueryTile + i) : probability);
      }
      const Vec<A> rescale = vexp(old_maximum - finite);
      store(tiles.maximum + i, maximum);
      store(tiles.sum + i, load(tiles.sum + i) * rescale + sum);
      for (int64_t d = 0; d < head_dim; ++d) {
        A* out = tiles.out_transposed + d * kQueryTile + i;
        store(out, load(out) * rescale);
      }
    }
  }

  static void write(const Params& p, int64_t bh, int64_t i0, int64_t queries, const Tiles& tiles) {
    const int64_t padded = padded_head_dim<T>(p);
    // Without dropped elements the scale of downscale_in_infer is all that is left of dropout.
    const A scale = tiles.keep ? A(1) : static_cast<A>(p.attn_dropout.scale);
    const HeadRows<T> out(static_cast<T*>(p.attn_out), p, bh, 1, 0);
    A* log_sum_exp = p.log_sum_exp ? static_cast<A*>(p.log_sum_exp) + bh * p.seq_len + i0 : nullptr;
    A* score_shift = p.score_shift ? static_cast<A*>(p.score_shift) + bh * p.seq_len + i0 : nullptr;
    for (int64_t i = 0; i < queries; ++i) {
      const A sum = tiles.sum[i];
      const A factor = sum == 0 ? A(0) : scale / sum;
      A* row = tiles.query + i * padded;
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] = tiles.out_transposed[d * kQueryTile + i] * factor;
      store_row(row, p.head_dim, out.row(i0 + i));
      if (log_sum_exp) {
        const A shift = sum == 0 ? A(0) : tiles.maximum[i];
        log_sum_exp[i] = sum == 0 ? std::numeric_limits<A>::infinity() : (score_shift ? A(0) : shift) + std::log(sum);
        if (score_shift) score_shift[i] = shift;
      }
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
