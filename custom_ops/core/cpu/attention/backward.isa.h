// The gradient of attention. With s = q k^T + mask (q scaled), p = exp(s - score_shift - log_sum_exp), r the dropout
// factors:
//
//   dv = (r p)^T do,  dp = do v^T,  ds = p (r dp - delta),  delta = sum over d of do o,  dq = ds k,  dk = ds^T q
//
// The scores are computed again, tile by tile. A unit of work is a range of query tiles against a range of key tiles of
// one head, for dq, for dk and dv, or for both. With enough heads a head is one unit; else it is split by query tiles
// for dq and by key tiles for dk and dv. Either way every element is summed over the same tiles in the same order, so
// the bits do not depend on the split.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct AttentionBackward {
  using A = Accumulator<T>;
  using P = Operand<T>;

  struct Unit {
    int64_t head;                    // batch * H + head
    int64_t query_begin, query_end;  // in rows, begins are multiples of the tiles
    int64_t key_begin, key_end;
    bool wants_query;
    bool wants_key_value;
  };

  // Tiles of one thread, and its sums for dk and dv. What is named _rows is packed along the rows.
  struct Tiles {
    P* query;             // [kQueryTile][stride]
    P* query_rows;        // [operands(kQueryTile)][padded]
    P* query_transposed;  // [depth][kQueryTile]
    P* d_out;             // [kQueryTile][stride]
    P* d_out_rows;        // [operands(kQueryTile)][padded]
    P* d_out_transposed;  // [depth][kQueryTile]
    P* key;               // [kKeyTile][stride]
    P* key_rows;          // [operands(kKeyTile)][padded]
    P* value;             // [kKeyTile][stride]
    A* scores;            // [kKeyTile][kQueryTile]
    A* d_probability;     // [kKeyTile][kQueryTile]
    P* probability;       // [kKeyTile][operands(kQueryTile)]: along the queries
    P* d_score;           // [kKeyTile][operands(kQueryTile)]: along the queries
    P* d_score_rows;      // [operands(kKeyTile)][kQueryTile]: along the keys
    uint64_t* kept;       // [kKeyTile]
    A* score_shift;       // [kQueryTile]
    A* log_sum_exp;       // [kQueryTile]
    A* delta;             // [kQueryTile]
    A* rows;              // [2][padded]
    A* d_query;           // [kQueryTile][padded]
    A* d_key;             // [unit_keys][padded]
    A* d_value;           // [unit_keys][padded]

    Tiles(Arena& arena, const Context& context, const Params& p) {
      const HeadShape<T> shape(p);
      const auto take = [&](int64_t count) { return static_cast<A*>(arena.take(count * sizeof(A))); };
      const auto take_operands = [&](int64_t count) { return static_cast<P*>(arena.take(count * sizeof(P))); };
      query = take_operands(kQueryTile * shape.stride);
      query_transposed = take_operands(shape.depth * kQueryTile);
      d_out = take_operands(kQueryTile * shape.stride);
      d_out_transposed = take_operands(shape.depth * kQueryTile);
      key = take_operands(kKeyTile * shape.stride);
      value = take_operands(kKeyTile * shape.stride);
      scores = take(kKeyTile * kQueryTile);
      d_probability = take(kKeyTile * kQueryTile);
      if constexpr (kPaired<T>) {
        query_rows = take_operands(kQueryTile / 2 * shape.padded);
        d_out_rows = take_operands(kQueryTile / 2 * shape.padded);
        key_rows = take_operands(kKeyTile / 2 * shape.padded);
        probability = take_operands(kKeyTile * kQueryTile / 2);
        d_score = take_operands(kKeyTile * kQueryTile / 2);
        d_score_rows = take_operands(kKeyTile / 2 * kQueryTile);
      } else {
        query_rows = query;
        d_out_rows = d_out;
        key_rows = key;
        probability = scores;
        d_score = d_score_rows = d_probability;
      }
      kept = p.attn_dropout.threshold ? static_cast<uint64_t*>(arena.take(kKeyTile * sizeof(uint64_t))) : nullptr;
      score_shift = take(kQueryTile);
      log_sum_exp = take(kQueryTile);
      delta = take(kQueryTile);
      rows = take(2 * shape.padded);
      d_query = take(kQueryTile * shape.padded);
      d_key = take(unit_keys(context, p) * shape.padded);
      d_value = take(unit_keys(context, p) * shape.padded);
    }
  };

  static size_t thread_bytes(const Context& context, const Params& p) {
    Arena arena;
    Tiles(arena, context, p);
    return arena.used();
  }

  // No more threads than work.
  static int threads(const Context& context, const Params& p) {
    const int64_t tiles = (p.seq_len + kQueryTile - 1) / kQueryTile;
    return static_cast<int>(std::min<int64_t>(context.threads, 2 * p.batch * p.num_heads * tiles));
  }

  static size_t workspace_bytes(const Context& context, const Params& p) {
    return threads(context, p) * thread_bytes(context, p);
  }

  static void run(Context& context, const Params& p) {
    const std::vector<Unit> units = split(context, p);
    const size_t bytes = thread_bytes(context, p);
    parallel_for(units.size(), threads(context, p), [&](int64_t index, int thread) {
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      run_unit(p, units[index], Tiles(arena, context, p));
    });
  }

  static bool splits_heads(const Context& context, const Params& p) {
    const int64_t heads = p.batch * p.num_heads;
    return heads < 2 * context.threads && heads % context.threads != 0;
  }

  // The number of ranges that the tiles of a head that is split are cut into; a range has at most tiles / parts tiles,
  // rounded up.
  static int64_t parts(const Context& context, const Params& p) {
    const int64_t heads = p.batch * p.num_heads;
    return std::min<int64_t>(key_tiles(p), (4 * context.threads + heads - 1) / heads);
  }

  static int64_t key_tiles(const Params& p) { return (p.seq_len + kKeyTile - 1) / kKeyTile; }

  // The most keys that a unit has sums for.
  static int64_t unit_keys(const Context& context, const Params& p) {
    if (!splits_heads(context, p) || p.seq_len == 0) return p.seq_len;
    const int64_t ranges = parts(context, p);
    return std::min(p.seq_len, (key_tiles(p) + ranges - 1) / ranges * kKeyTile);
  }

  static std::vector<Unit> split(const Context& context, const Params& p) {
    const int64_t heads = p.batch * p.num_heads;
    std::vector<Unit> units;
    if (!splits_heads(context, p)) {
      for (int64_t head = 0; head < heads; ++head) units.push_back({head, 0, p.seq_len, 0, p.seq_len, true, true});
      return units;
    }
    const int64_t tiles = key_tiles(p);
    const int64_t ranges = parts(context, p);
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t part = 0; part < ranges; ++part) {
        const int64_t begin = tiles * part / ranges * kKeyTile;
        const int64_t end = std::min(tiles * (part + 1) / ranges * kKeyTile, p.seq_len);
        units.push_back({head, begin, end, 0, p.seq_len, true, false});
        units.push_back({head, 0, p.seq_len, begin, end, false, true});
      }
    }
    return units;
  }

  static void run_unit(const Params& p, const Unit& unit, const Tiles& tiles) {
    const int64_t padded = HeadShape<T>(p).padded;
    const HeadIndex h = qkv_layout(p).head(unit.head);
    if (unit.wants_key_value) {
      const int64_t count = (unit.key_end - unit.key_begin) * padded;
      std::fill(tiles.d_key, tiles.d_key + count, A(0));
      std::fill(tiles.d_value, tiles.d_value + count, A(0));
    }
    Range<int64_t> walk{unit.query_begin, unit.query_end};
    if (!unit.wants_query) {
      const Range<int64_t> seeing = visibility_of<int64_t>(p).queries_of(unit.key_begin, unit.key_end);
      walk = {std::max(walk.first, first_of_tile(seeing.first, kQueryTile)), std::min(walk.end, seeing.end)};
    }
    for (int64_t i0 = walk.first; i0 < walk.end; i0 += kQueryTile) query_tile(p, h, unit, i0, tiles);
    if (unit.wants_key_value) {
      for (int64_t j = unit.key_begin; j < unit.key_end; ++j) {
        const int64_t offset = (j - unit.key_begin) * padded;
        store_row(tiles.d_key + offset, p.head_dim, d_rows_of(p, h, QkvPart::kKey).row(j));
        store_row(tiles.d_value + offset, p.head_dim, d_rows_of(p, h, QkvPart::kValue).row(j));
      }
    }
  }

  static HeadRows<T> d_rows_of(const Params& p, const HeadIndex& h, QkvPart part) {
    return qkv_layout(p).rows(static_cast<T*>(p.d_qkv), h, part);
  }

  static void query_tile(const Params& p, const HeadIndex& h, const Unit& unit, int64_t i0, const Tiles& tiles) {
    constexpr int64_t score_stride = kQueryTile / kNumbers<T>;
    const HeadShape<T> shape(p);
    const int64_t padded = shape.padded;
    const int64_t queries = std::min(kQueryTile, p.seq_len - i0);
    const int64_t width = round_up(queries, kLanes<A>);
    const A dropout_scale = static_cast<A>(p.attn_dropout.scale);

    load_queries(p, shape, h, i0, queries, tiles);
    if (unit.wants_query) std::fill(tiles.d_query, tiles.d_query + queries * padded, A(0));

    const Range<int64_t> walk = visibility_of<int64_t>(p).keys_of(i0, i0 + queries);
    const int64_t keys_end = std::min(unit.key_end, walk.end);
    for (int64_t j0 = std::max(unit.key_begin, first_of_tile(walk.first, kKeyTile)); j0 < keys_end; j0 += kKeyTile) {
      const int64_t keys = std::min(kKeyTile, keys_end - j0);
      pack_along_depth<T>(rows_of<T>(p, h, QkvPart::kKey), j0, keys, shape, tiles.key);
      pack_along_depth<T>(rows_of<T>(p, h, QkvPart::kValue), j0, keys, shape, tiles.value);
      score_tile<T>(p, shape, h, i0, j0, queries, keys, tiles.key, tiles.query_transposed, tiles.scores);
      micro_gemm<A, P>(keys, width, shape.depth, {tiles.value, shape.stride, 1}, tiles.d_out_transposed, kQueryTile,
                       {tiles.d_probability, kQueryTile, dropout_scale, false});
      if (tiles.kept) keep_tile(p, h, i0, j0, queries, keys, tiles.kept);
      score_gradients(keys, width, tiles);
      if (unit.wants_key_value) {
        const int64_t offset = (j0 - unit.key_begin) * padded;
        micro_gemm<A, P>(keys, padded, operands<T>(queries), {tiles.probability, score_stride, 1}, tiles.d_out_rows,
                         padded, {tiles.d_value + offset, padded, dropout_scale, true});
        micro_gemm<A, P>(keys, padded, operands<T>(queries), {tiles.d_score, score_stride, 1}, tiles.query_rows, padded,
                         {tiles.d_key + offset, padded, query_scale<A>(p), true});
      }
      if (unit.wants_query) {
        const P* key_rows = pack_along_rows<T>(tiles.key, keys, shape, tiles.key_rows);
        micro_gemm<A, P>(queries, padded, operands<T>(keys), {tiles.d_score_rows, 1, kQueryTile}, key_rows, padded,
                         {tiles.d_query, padded, query_scale<A>(p), true});
      }
    }
    if (unit.wants_query) {
      const HeadRows<T> target = d_rows_of(p, h, QkvPart::kQuery);
      for (int64_t i = 0; i < queries; ++i) store_row(tiles.d_query + i * padded, p.head_dim, target.row(i0 + i));
    }
  }

  static void load_queries(const Params& p, const HeadShape<T>& shape, const HeadIndex& h, int64_t i0, int64_t queries,
                           const Tiles& tiles) {
    const QkvLayout layout = qkv_layout(p);
    const HeadRows<const T> out = layout.out_rows(static_cast<const T*>(p.attn_out), h);
    const HeadRows<const T> d_out = layout.out_rows(static_cast<const T*>(p.d_attn_out), h);
    const A* log_sum_exp = static_cast<const A*>(p.log_sum_exp) + h.flat * p.seq_len + i0;
    const A* score_shift = static_cast<const A*>(p.score_shift) + h.flat * p.seq_len + i0;
    pack_along_depth<T>(rows_of<T>(p, h, QkvPart::kQuery), i0, queries, shape, tiles.query);
    pack_along_depth<T>(d_out, i0, queries, shape, tiles.d_out);
    transpose_tile(tiles.query, queries, shape.depth, shape.stride, tiles.query_transposed);
    transpose_tile(tiles.d_out, queries, shape.depth, shape.stride, tiles.d_out_transposed);
    pack_along_rows<T>(tiles.query, queries, shape, tiles.query_rows);
    pack_along_rows<T>(tiles.d_out, queries, shape, tiles.d_out_rows);
    for (int64_t i = 0; i < round_up(queries, kLanes<A>); ++i) {
      // A query that is only there to fill the vector has no probabilities, like one that sees no key.
      tiles.score_shift[i] = i < queries ? score_shift[i] : A(0);
      tiles.log_sum_exp[i] = i < queries ? log_sum_exp[i] : std::numeric_limits<A>::infinity();
      tiles.delta[i] = A(0);
      if (i >= queries) continue;
      load_row(out.row(i0 + i), p.head_dim, tiles.rows);
      load_row(d_out.row(i0 + i), p.head_dim, tiles.rows + shape.padded);
      tiles.delta[i] = row_dot<A>(tiles.rows, tiles.rows + shape.padded, p.head_dim);
    }
  }

  // From scores and the gradient of what is kept of p, times the scale of dropout: what dv is made of, r p without that
  // scale, and ds.
  static void score_gradients(int64_t keys, int64_t width, const Tiles& tiles) {
    constexpr int numbers = kNumbers<T>;
    constexpr int64_t score_stride = kQueryTile / numbers;
    for (int64_t i = 0; i < width; i += kLanes<A>) {
      const Vec<A> score_shift = load(tiles.score_shift + i);
      const Vec<A> log_sum_exp = load(tiles.log_sum_exp + i);
      const Vec<A> delta = load(tiles.delta + i);
      for (int64_t j = 0; j < keys; j += numbers) {
        Vec<A> d_score[numbers] = {};
        for (int n = 0; n < numbers && j + n < keys; ++n) {
          const int64_t at = (j + n) * kQueryTile + i;
          const Vec<A> probability = vexp(load(tiles.scores + at) - score_shift - log_sum_exp);
          Vec<A> kept = probability;
          Vec<A> d_probability = load(tiles.d_probability + at);
          if (tiles.kept) {
            kept = keep_lanes<A>(tiles.kept + j + n, i, kept);
            d_probability = keep_lanes<A>(tiles.kept + j + n, i, d_probability);
          }
          d_score[n] = probability * (d_probability - delta);
          store_operands(tiles.probability + (j + n) * score_stride + i / numbers, kept);
          store_operands(tiles.d_score + (j + n) * score_stride + i / numbers, d_score[n]);
        }
        if constexpr (kPaired<T>)
          store(tiles.d_score_rows + j / 2 * kQueryTile + i, narrow_pair(d_score[0], d_score[1]));
      }
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
