// The gradient of attention. With s = q k^T + mask (q scaled), p = exp(s - score_shift - log_sum_exp), r the dropout factors:
//
//   dv = (r p)^T do,  dp = do v^T,  ds = p (r dp - delta),  delta = sum over d of do o,  dq = ds k,  dk = ds^T q
//
// The scores are computed again, tile by tile. A unit of work is a range of query tiles against a range of key tiles of one head,
// for dq, for dk and dv, or for both. With enough heads a head is one unit; else it is split by query tiles for dq and by key tiles
// for dk and dv. Either way every element is summed over the same tiles in the same order, so the bits do not depend on the split.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct AttentionBackward {
  using A = Accumulator<T>;

  struct Unit {
    int64_t bh;
    int64_t query_begin, query_end;  // in rows, begins are multiples of the tiles
    int64_t key_begin, key_end;
    bool wants_query;
    bool wants_key_value;
  };

  // Tiles of one thread, and its sums for dk and dv.
  struct Tiles {
    A* query;             // [kQueryTile][padded]
    A* query_transposed;  // [head_dim][kQueryTile]
    A* d_out;             // [kQueryTile][padded]
    A* d_out_transposed;  // [head_dim][kQueryTile]
    A* key;               // [kKeyTile][padded]
    A* value;             // [kKeyTile][padded]
    A* probability;       // [kKeyTile][kQueryTile]
    A* d_score;           // [kKeyTile][kQueryTile]
    A* keep;              // [kKeyTile][kQueryTile]
    A* score_shift;       // [kQueryTile]
    A* log_sum_exp;       // [kQueryTile]
    A* delta;             // [kQueryTile]
    A* d_query;           // [kQueryTile][padded]
    A* d_key;             // [seq_len][padded]
    A* d_value;           // [seq_len][padded]

    Tiles(Arena& arena, const Params& p) {
      const int64_t padded = padded_head_dim<T>(p);
      const auto take = [&](int64_t count) { return static_cast<A*>(arena.take(count * sizeof(A))); };
      query = take(kQueryTile * padded);
      query_transposed = take(p.head_dim * kQueryTile);
      d_out = take(kQueryTile * padded);
      d_out_transposed = take(p.head_dim * kQueryTile);
      key = take(kKeyTile * padded);
      value = take(kKeyTile * padded);
      probability = take(kKeyTile * kQueryTile);
      d_score = take(kKeyTile * kQueryTile);
      keep = p.attn_dropout.threshold ? take(kKeyTile * kQueryTile) : nullptr;
      score_shift = take(kQueryTile);
      log_sum_exp = take(kQueryTile);
      delta = take(kQueryTile);
      d_query = take(kQueryTile * padded);
      d_key = take(p.seq_len * padded);
      d_value = take(p.seq_len * padded);
    }
  };

  static size_t thread_bytes(const Params& p) {
    Arena arena;
    Tiles(arena, p);
    return arena.used();
  }

  // No more threads than work: what each needs grows with seq_len.
  static int threads(const Context& context, const Params& p) {
    const int64_t tiles = (p.seq_len + kQueryTile - 1) / kQueryTile;
    return static_cast<int>(std::min<int64_t>(context.threads, 2 * p.batch * p.num_heads * tiles));
  }

  static size_t workspace_bytes(const Context& context, const Params& p) { return threads(context, p) * thread_bytes(p); }

  static void run(Context& context, const Params& p) {
    const std::vector<Unit> units = split(context, p);
    const size_t bytes = thread_bytes(p);
    parallel_for(units.size(), threads(context, p), [&](int64_t index, int thread) {
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      run_unit(p, units[index], Tiles(arena, p));
    });
  }

  static std::vector<Unit> split(const Context& context, const Params& p) {
    const int64_t heads = p.batch * p.num_heads;
    std::vector<Unit> units;
    if (heads >= 2 * context.threads || heads % context.threads == 0) {
      for (int64_t bh = 0; bh < heads; ++bh) units.push_back({bh, 0, p.seq_len, 0, p.seq_len, true, true});
      return units;
    }
    const int64_t tiles = (p.seq_len + kKeyTile - 1) / kKeyTile;
    const int64_t parts = std::min<int64_t>(tiles, (4 * context.threads + heads - 1) / heads);
    for (int64_t bh = 0; bh < heads; ++bh) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = tiles * part / parts * kKeyTile;
        const int64_t end = std::min(tiles * (part + 1) / parts * kKeyTile, p.seq_len);
        units.push_back({bh, begin, end, 0, p.seq_len, true, false});
        units.push_back({bh, 0, p.seq_len, begin, end, false, true});
      }
    }
    return units;
  }

  static void run_unit(const Params& p, const Unit& unit, const Tiles& tiles) {
    const int64_t padded = padded_head_dim<T>(p);
    if (unit.wants_key_value) {
      const int64_t count = (unit.key_end - unit.key_begin) * padded;
      std::fill(tiles.d_key, tiles.d_key + count, A(0));
      std::fill(tiles.d_value, tiles.d_value + count, A(0));
    }
    for (int64_t i0 = unit.query_begin; i0 < unit.query_end; i0 += kQueryTile) query_tile(p, unit, i0, tiles);
    if (unit.wants_key_value) {
      for (int64_t j = unit.key_begin; j < unit.key_end; ++j) {
        const int64_t offset = (j - unit.key_begin) * padded;
        store_row(tiles.d_key + offset, p.head_dim, d_qkv_rows(p, unit.bh, QkvPart::kKey).row(j));
        store_row(tiles.d_value + offset, p.head_dim, d_qkv_rows(p, unit.bh, QkvPart::kValue).row(j));
      }
    }
  }

  static HeadRows<T> d_qkv_rows(const Params& p, int64_t bh, QkvPart part) {
    return HeadRows<T>(static_cast<T*>(p.d_qkv), p, bh, 3, static_cast<int64_t>(part));
  }

  static void query_tile(const Params& p, const Unit& unit, int64_t i0, const Tiles& tiles) {
    const int64_t head_dim = p.head_dim;
    const int64_t padded = padded_head_dim<T>(p);
    const int64_t queries = std::min(kQueryTile, p.seq_len - i0);
    const int64_t width = round_up(queries, kLanes<A>);
    const A query_scale = A(1) / std::sqrt(static_cast<A>(head_dim));
    const PhiloxState random =
        p.attn_dropout.threshold ? philox_state(p.random_state[0], p.random_state[1], DropoutStage::kAttention) : PhiloxState{};

    load_queries(p, unit.bh, i0, queries, query_scale, tiles);
    if (unit.wants_query) std::fill(tiles.d_query, tiles.d_query + queries * padded, A(0));

    const int64_t keys_end = std::min(unit.key_end, visible_keys(p, i0, queries));
    for (int64_t j0 = unit.key_begin; j0 < keys_end; j0 += kKeyTile) {
      const int64_t keys = std::min(kKeyTile, keys_end - j0);
      pack_rows(qkv_rows<T>(p, unit.bh, QkvPart::kKey), j0, keys, head_dim, padded, A(1), tiles.key);
      pack_rows(qkv_rows<T>(p, unit.bh, QkvPart::kValue), j0, keys, head_dim, padded, A(1), tiles.value);
      score_tile(p, unit.bh, i0, j0, queries, keys, tiles.key, padded, tiles.query_transposed, tiles.probability);
      micro_gemm<A>(keys, width, head_dim, {tiles.value, padded, 1}, tiles.d_out_transposed, kQueryTile, tiles.d_score,
                    kQueryTile, false);
      if (tiles.keep) keep_tile(p, random, unit.bh, i0, j0, queries, keys, tiles.keep);
      score_gradients(p, keys, width, tiles);
      if (unit.wants_key_value) {
        const int64_t offset = (j0 - unit.key_begin) * padded;
        micro_gemm<A>(keys, padded, queries, {tiles.probability, kQueryTile, 1}, tiles.d_out, padded, tiles.d_value + offset,
                      padded, true);
        micro_gemm<A>(keys, padded, queries, {tiles.d_score, kQueryTile, 1}, tiles.query, padded, tiles.d_key + offset, padded,
                      true);
      }
      if (unit.wants_query) {
        micro_gemm<A>(queries, padded, keys, {tiles.d_score, 1, kQueryTile}, tiles.key, padded, tiles.d_query, padded, true);
      }
    }
    if (unit.wants_query) {
      const HeadRows<T> target = d_qkv_rows(p, unit.bh, QkvPart::kQuery);
      for (int64_t i = 0; i < queries; ++i) {
        A* row = tiles.d_query + i * padded;
        for (int64_t d = 0; d < head_dim; ++d) row[d] *= query_scale;
        store_row(row, head_dim, target.row(i0 + i));
      }
    }
  }

  static void load_queries(const Params& p, int64_t bh, int64_t i0, int64_t queries, A query_scale, const Tiles& tiles) {
    const int64_t head_dim = p.head_dim;
    const int64_t padded = padded_head_dim<T>(p);
    const HeadRows<const T> out(static_cast<const T*>(p.attn_out), p, bh, 1, 0);
    const HeadRows<const T> d_out(static_cast<const T*>(p.d_attn_out), p, bh, 1, 0);
    const A* log_sum_exp = static_cast<const A*>(p.log_sum_exp) + bh * p.seq_len + i0;
    const A* score_shift = p.score_shift ? static_cast<const A*>(p.score_shift) + bh * p.seq_len + i0 : nullptr;
    pack_rows(qkv_rows<T>(p, bh, QkvPart::kQuery), i0, queries, head_dim, padded, query_scale, tiles.query);
    pack_rows(d_out, i0, queries, head_dim, padded, A(1), tiles.d_out);
    transpose_tile(tiles.query, queries, head_dim, padded, tiles.query_transposed);
    transpose_tile(tiles.d_out, queries, head_dim, padded, tiles.d_out_transposed);
    for (int64_t i = 0; i < round_up(queries, kLanes<A>); ++i) {
      // A query that is only there to fill the vector has no probabilities, like one that sees no key.
      tiles.score_shift[i] = score_shift && i < queries ? score_shift[i] : A(0);
      tiles.log_sum_exp[i] = i < queries ? log_sum_exp[i] : std::numeric_limits<A>::infinity();
      A delta = 0;
      if (i < queries) {
        const T* out_row = out.row(i0 + i);
        const A* d_out_row = tiles.d_out + i * padded;
        for (int64_t d = 0; d < head_dim; ++d) delta += to_float(out_row[d]) * d_out_row[d];
      }
      tiles.delta[i] = delta;
    }
  }

  // From scores and dp: what dv is made of, r p, and ds.
  static void score_gradients(const Params& p, int64_t keys, int64_t width, const Tiles& tiles) {
    const Vec<A> plain_scale = broadcast(static_cast<A>(p.attn_dropout.scale));
    for (int64_t i = 0; i < width; i += kLanes<A>) {
      const Vec<A> score_shift = load(tiles.score_shift + i);
      const Vec<A> log_sum_exp = load(tiles.log_sum_exp + i);
      const Vec<A> delta = load(tiles.delta + i);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * kQueryTile + i;
        const Vec<A> probability = vexp(load(tiles.probability + at) - score_shift - log_sum_exp);
        const Vec<A> factor = tiles.keep ? load(tiles.keep + at) : plain_scale;
        store(tiles.probability + at, probability * factor);
        store(tiles.d_score + at, probability * (load(tiles.d_score + at) * factor - delta));
      }
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
