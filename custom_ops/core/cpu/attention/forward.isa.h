// o = dropout(softmax(q k^T + mask)) v, a tile of queries at a time: for each tile of keys the scores are computed, the
// running maximum and sum of every query's softmax are brought up to date, and o is rescaled and added to (online
// softmax: Milakov and Gimelshein, 2018). Of the scores only the log-sum-exp of each query is kept.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct AttentionForward {
  using A = Accumulator<T>;
  using P = Operand<T>;

  // Tiles of one thread.
  struct Tiles {
    P* query;             // [kQueryTile][stride]
    P* query_transposed;  // [depth][kQueryTile]
    P* key;               // [kKeyTile][stride]
    P* value;             // [kKeyTile][stride]
    P* value_rows;        // [operands(kKeyTile)][padded]
    A* scores;            // [kKeyTile][kQueryTile]
    P* probability;       // [operands(kKeyTile)][kQueryTile]
    uint64_t* kept;       // [kKeyTile]
    A* out;               // [kQueryTile][padded]
    A* maximum;           // [kQueryTile]
    A* sum;               // [kQueryTile]
    A* rescale;           // [kQueryTile]

    Tiles(Arena& arena, const Params& p) {
      const HeadShape<T> shape(p);
      const auto take = [&](int64_t count) { return static_cast<A*>(arena.take(count * sizeof(A))); };
      const auto take_operands = [&](int64_t count) { return static_cast<P*>(arena.take(count * sizeof(P))); };
      query = take_operands(kQueryTile * shape.stride);
      query_transposed = take_operands(shape.depth * kQueryTile);
      key = take_operands(kKeyTile * shape.stride);
      value = take_operands(kKeyTile * shape.stride);
      value_rows = kPaired<T> ? take_operands(kKeyTile / 2 * shape.padded) : nullptr;
      scores = take(kKeyTile * kQueryTile);
      if constexpr (kPaired<T>) {
        probability = take_operands(kKeyTile / 2 * kQueryTile);
      } else {
        probability = scores;
      }
      kept = p.attn_dropout.threshold ? static_cast<uint64_t*>(arena.take(kKeyTile * sizeof(uint64_t))) : nullptr;
      out = take(kQueryTile * shape.padded);
      maximum = take(kQueryTile);
      sum = take(kQueryTile);
      rescale = take(kQueryTile);
    }
  };

  static size_t thread_bytes(const Params& p) {
    Arena arena;
    Tiles(arena, p);
    return arena.used();
  }

  static size_t workspace_bytes(const Context& context, const Params& p) { return context.threads * thread_bytes(p); }

  static void run(Context& context, const Params& p) {
    p.random_state[0] = p.seed;
    p.random_state[1] = p.offset;
    const int64_t query_tiles = (p.seq_len + kQueryTile - 1) / kQueryTile;
    const size_t bytes = thread_bytes(p);
    parallel_for(p.batch * p.num_heads * query_tiles, context.threads, [&](int64_t index, int thread) {
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      // The last tiles may have the most keys: they come first, to even out the threads.
      query_tile(p, qkv_layout(p).head(index / query_tiles), (query_tiles - 1 - index % query_tiles) * kQueryTile,
                 Tiles(arena, p));
    });
  }

  static void query_tile(const Params& p, const HeadIndex& h, int64_t i0, const Tiles& tiles) {
    const HeadShape<T> shape(p);
    const int64_t queries = std::min(kQueryTile, p.seq_len - i0);
    const int64_t width = round_up(queries, kLanes<A>);

    pack_along_depth<T>(rows_of<T>(p, h, QkvPart::kQuery), i0, queries, shape, tiles.query);
    transpose_tile(tiles.query, queries, shape.depth, shape.stride, tiles.query_transposed);
    std::fill(tiles.maximum, tiles.maximum + width, -std::numeric_limits<A>::infinity());
    std::fill(tiles.sum, tiles.sum + width, A(0));

    const Range<int64_t> walk = visibility_of<int64_t>(p).keys_of(i0, i0 + queries);
    const int64_t begin = first_of_tile(walk.first, kKeyTile);
    for (int64_t j0 = begin; j0 < walk.end; j0 += kKeyTile) {
      const int64_t keys = std::min(kKeyTile, walk.end - j0);
      pack_along_depth<T>(rows_of<T>(p, h, QkvPart::kKey), j0, keys, shape, tiles.key);
      pack_along_depth<T>(rows_of<T>(p, h, QkvPart::kValue), j0, keys, shape, tiles.value);
      const P* value_rows = pack_along_rows<T>(tiles.value, keys, shape, tiles.value_rows);
      score_tile<T>(p, shape, h, i0, j0, queries, keys, tiles.key, tiles.query_transposed, tiles.scores);
      if (tiles.kept) keep_tile(p, h, i0, j0, queries, keys, tiles.kept);
      online_softmax(keys, width, tiles);
      if (j0 > begin) rescale_out(queries, shape.padded, tiles);
      micro_gemm<A, P>(queries, shape.padded, operands<T>(keys), {tiles.probability, 1, kQueryTile}, value_rows,
                       shape.padded, {tiles.out, shape.padded, A(1), j0 > begin});
    }
    write(p, h, i0, queries, tiles);
  }

  // Scores to probabilities relative to the running maximum, dropped where asked for.
  static void online_softmax(int64_t keys, int64_t width, const Tiles& tiles) {
    constexpr int numbers = kNumbers<T>;
    for (int64_t i = 0; i < width; i += kLanes<A>) {
      const Vec<A> old_maximum = load(tiles.maximum + i);
      Vec<A> maximum = old_maximum;
      for (int64_t j = 0; j < keys; ++j) maximum = vmax<A>(load(tiles.scores + j * kQueryTile + i), maximum);
      const Vec<A> finite = maximum == -std::numeric_limits<A>::infinity() ? Vec<A>{} : maximum;
      Vec<A> sum{};
      for (int64_t j = 0; j < keys; j += numbers) {
        Vec<A> probability[numbers] = {};
        for (int n = 0; n < numbers && j + n < keys; ++n) {
          probability[n] = vexp(load(tiles.scores + (j + n) * kQueryTile + i) - finite);
          sum += probability[n];
          if (tiles.kept) probability[n] = keep_lanes<A>(tiles.kept + j + n, i, probability[n]);
        }
        P* target = tiles.probability + j / numbers * kQueryTile + i;
        if constexpr (kPaired<T>) {
          store(target, narrow_pair(probability[0], probability[1]));
        } else {
          store(target, probability[0]);
        }
      }
      const Vec<A> rescale = vexp(old_maximum - finite);
      store(tiles.maximum + i, maximum);
      store(tiles.sum + i, load(tiles.sum + i) * rescale + sum);
      store(tiles.rescale + i, rescale);
    }
  }

  static void rescale_out(int64_t queries, int64_t padded, const Tiles& tiles) {
    for (int64_t i = 0; i < queries; ++i) {
      const A rescale = tiles.rescale[i];
      if (rescale == A(1)) continue;
      A* row = tiles.out + i * padded;
      for (int64_t d = 0; d < padded; d += kLanes<A>) store(row + d, load(row + d) * rescale);
    }
  }

  static void write(const Params& p, const HeadIndex& h, int64_t i0, int64_t queries, const Tiles& tiles) {
    const int64_t padded = HeadShape<T>(p).padded;
    const A scale = static_cast<A>(p.attn_dropout.scale);
    const HeadRows<T> out = qkv_layout(p).out_rows(static_cast<T*>(p.attn_out), h);
    A* log_sum_exp = p.log_sum_exp ? static_cast<A*>(p.log_sum_exp) + h.flat * p.seq_len + i0 : nullptr;
    A* score_shift = static_cast<A*>(p.score_shift) + h.flat * p.seq_len + i0;
    for (int64_t i = 0; i < queries; ++i) {
      const A sum = tiles.sum[i];
      const A factor = sum == 0 ? A(0) : scale / sum;
      A* row = tiles.out + i * padded;
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] *= factor;
      store_row(row, p.head_dim, out.row(i0 + i));
      if (log_sum_exp) {
        log_sum_exp[i] = sum == 0 ? std::numeric_limits<A>::infinity() : std::log(sum);
        score_shift[i] = sum == 0 ? A(0) : tiles.maximum[i];
      }
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
