// The gradient of attention. With s = scale * q k^T + mask, p the softmax of s, r the dropout factors:
//
//   dv = (r p)^T do,  dp = do v^T,  ds = p (r dp - delta),  delta = sum over d of do o,
//   dq = scale * ds k,  dk = scale * ds^T q
//
// That of the weights w = r p has dp = dw and delta = sum over keys of dw w.
//
// The scores are computed again, tile by tile. A unit of work is a range of query tiles against a range of key tiles of
// one head, for dq, for dk and dv, or for both. With enough heads a head is one unit; else it is split by query tiles
// for dq and by key tiles for dk and dv. Either way every element is summed over the same tiles in the same order, so
// the bits do not depend on the split.

namespace pfa::cpu::PFA_ISA {

// Where the gradient of the scores goes beside the products. Most calls have no mask that wants it.
struct NoMaskGradient {
  static constexpr bool kIsWanted = false;
  template <class A>
  void operator()(const HeadIndex&, const ScoreTile&, const A*) const {}
};

template <class T>
struct AttentionBackward {
  using A = Accumulator<T>;
  using P = Operand<T>;

  struct Unit {
    int64_t batch;
    int64_t kv_head;         // whose keys, and the queries that read them
    Range<int64_t> queries;  // begins a tile, and ends one or the sequence
    Range<int64_t> keys;     // the same
    bool wants_query;
    bool wants_key_value;
  };

  // Of one thread, with its sums for dk and dv. What is named _rows is packed along the rows.
  struct Tiles {
    Scores<T> scores;
    ScoreGradient<T> gradient;
    P* query_rows;        // [operands(kQueryTile)][padded]
    P* d_out;             // [kQueryTile][stride]
    P* d_out_rows;        // [operands(kQueryTile)][padded]
    P* d_out_transposed;  // [depth][kQueryTile]
    P* key_rows;          // [operands(kKeyTile)][padded]
    A* out_row;           // [padded]
    A* d_out_row;         // [padded]
    A* d_query;           // [kQueryTile][padded]
    A* d_key;             // [unit_keys][padded]
    A* d_value;           // [unit_keys][padded]
    // Of the tile of queries.
    int64_t first_query = 0;
    int64_t queries = 0;
    Range<int64_t> keys{0, 0};  // of the unit, in whole tiles but for the last

    Tiles(Arena& arena, const Context& context, const AttentionParams& p)
        : scores(arena, p), gradient(arena, scores.scores) {
      const HeadShape<T> shape(p);
      key_rows = kPaired<T> ? take<P>(arena, kKeyTile / 2 * shape.padded) : scores.key;
      out_row = take<A>(arena, 2 * shape.padded);
      d_out_row = out_row + shape.padded;
      take_queries(arena, shape);
      d_key = take<A>(arena, unit_keys(context, p) * shape.padded);
      d_value = take<A>(arena, unit_keys(context, p) * shape.padded);
    }

    // Those of other queries beside the same keys.
    Tiles with_queries(Arena& arena, const AttentionParams& p) const {
      Tiles result = *this;
      result.scores = scores.with_queries(arena, p);
      result.gradient = gradient.with_queries(arena);
      result.take_queries(arena, HeadShape<T>(p));
      return result;
    }

   private:
    void take_queries(Arena& arena, const HeadShape<T>& shape) {
      d_out = take<P>(arena, kQueryTile * shape.stride);
      d_out_transposed = take<P>(arena, shape.depth * kQueryTile);
      query_rows = kPaired<T> ? take<P>(arena, kQueryTile / 2 * shape.padded) : scores.query;
      d_out_rows = kPaired<T> ? take<P>(arena, kQueryTile / 2 * shape.padded) : d_out;
      d_query = take<A>(arena, kQueryTile * shape.padded);
    }
  };

  // As many tiles of queries as a thread takes at once.
  static std::vector<Tiles> group_of_tiles(Arena& arena, const Context& context, const AttentionParams& p) {
    std::vector<Tiles> tiles(1, Tiles(arena, context, p));
    const int64_t count = std::min(kQueryGroup, ceil_div(p.queries, kQueryTile));
    while (static_cast<int64_t>(tiles.size()) < count) tiles.push_back(tiles[0].with_queries(arena, p));
    return tiles;
  }

  static size_t thread_bytes(const Context& context, const AttentionParams& p) {
    Arena arena;
    group_of_tiles(arena, context, p);
    return arena.used();
  }

  // No more threads than work.
  static int threads(const Context& context, const AttentionParams& p) {
    const int64_t tiles = ceil_div(std::max(p.queries, p.keys), kQueryTile);
    return static_cast<int>(std::min<int64_t>(context.threads, std::max<int64_t>(1, 2 * kv_heads(p) * tiles)));
  }

  static size_t workspace_bytes(const Context& context, const AttentionParams& p) {
    return threads(context, p) * thread_bytes(context, p);
  }

  static void run(Context& context, const AttentionParams& p) {
    const std::vector<Unit> units = split(context, p);
    const size_t bytes = thread_bytes(context, p);
    const auto count = static_cast<int64_t>(units.size());
    const bool on_tiles = has_tile_products<T>(context);
    parallel_for_with_next(count, threads(context, p), [&](int64_t index, int64_t next, int thread) {
      const TileScope scope(on_tiles);
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      std::vector<Tiles> group = group_of_tiles(arena, context, p);
      for (Tiles& tiles : group) tiles.scores.on_tiles = on_tiles;
      run_unit(p, units[index], next < count ? &units[next] : nullptr, group);
    });
  }

  static int64_t kv_heads(const AttentionParams& p) { return p.batch * p.num_kv_heads; }

  static bool splits_heads(const Context& context, const AttentionParams& p) {
    return kv_heads(p) < 2 * context.threads && kv_heads(p) % context.threads != 0;
  }

  // The number of ranges that the tiles of a head that is split are cut into.
  static int64_t parts(const Context& context, const AttentionParams& p) {
    const int64_t tiles = std::max<int64_t>(1, ceil_div(p.keys, kKeyTile));
    return std::min(tiles, ceil_div(4 * context.threads, kv_heads(p)));
  }

  // Range `part` of `parts` of the positions 0..length - 1: at most so many tiles as tiles / parts rounded up.
  static Range<int64_t> part_of(int64_t length, int64_t tile, int64_t part, int64_t parts) {
    const int64_t tiles = ceil_div(length, tile);
    return {tiles * part / parts * tile, std::min(tiles * (part + 1) / parts * tile, length)};
  }

  // The most keys that a unit has sums for.
  static int64_t unit_keys(const Context& context, const AttentionParams& p) {
    if (!splits_heads(context, p) || kv_heads(p) == 0) return p.keys;
    return std::min(p.keys, ceil_div(ceil_div(p.keys, kKeyTile), parts(context, p)) * kKeyTile);
  }

  static std::vector<Unit> split(const Context& context, const AttentionParams& p) {
    const bool wants_query = p.d_query.data;
    const bool wants_key_value = p.d_key.data || p.d_value.data;
    const bool splits = splits_heads(context, p);
    std::vector<Unit> units;
    for (int64_t index = 0; index < kv_heads(p); ++index) {
      const int64_t batch = index / p.num_kv_heads;
      const int64_t kv_head = index % p.num_kv_heads;
      const auto visibility = visibility_of_sequence(p, batch);
      const Range<int64_t> all_queries{0, visibility.queries};
      const Range<int64_t> all_keys{0, visibility.keys};
      if (!splits) {
        units.push_back({batch, kv_head, all_queries, all_keys, wants_query, wants_key_value});
        continue;
      }
      const int64_t ranges = parts(context, p);
      for (int64_t part = 0; part < ranges; ++part) {
        const Range<int64_t> queries = part_of(visibility.queries, kQueryTile, part, ranges);
        const Range<int64_t> keys = part_of(visibility.keys, kKeyTile, part, ranges);
        if (wants_query) units.push_back({batch, kv_head, queries, all_keys, true, false});
        if (wants_key_value) units.push_back({batch, kv_head, all_queries, keys, false, true});
      }
    }
    return units;
  }

  static int64_t first_head(const AttentionParams& p, const Unit& unit) {
    return unit.batch * p.num_heads + unit.kv_head * (p.num_heads / p.num_kv_heads);
  }

  // The unit's queries of one of its heads.
  static Range<int64_t> queries_of(const Head<T>& head, const Unit& unit) {
    if (unit.wants_query) return unit.queries;
    const Range<int64_t> seen = head.visibility.queries_of(unit.keys.first, unit.keys.end);
    return whole_tiles(unit.queries, seen, kQueryTile);
  }

  // `next` comes after that, unless it is null. `of_scores` gets the unrounded gradient of every tile of scores, if it
  // wants that.
  template <class OfScores = NoMaskGradient>
  static void run_unit(const AttentionParams& p, const Unit& unit, const Unit* next, std::vector<Tiles> group,
                       const OfScores& of_scores = {}) {
    const HeadShape<T> shape(p);
    const int64_t unit_keys = unit.keys.end - unit.keys.first;
    A* const d_key = group[0].d_key;
    A* const d_value = group[0].d_value;
    if (unit.wants_key_value) {
      std::fill(d_key, d_key + unit_keys * shape.padded, A(0));
      std::fill(d_value, d_value + unit_keys * shape.padded, A(0));
    }
    const int64_t first = first_head(p, unit);
    const int64_t end = first + p.num_heads / p.num_kv_heads;
    const auto group_queries = static_cast<int64_t>(group.size()) * kQueryTile;
    for (int64_t flat = first; flat < end; ++flat) {
      const Head<T> head(p, flat);
      const Range<int64_t> queries = queries_of(head, unit);
      for (int64_t query = queries.first; query < queries.end; query += group_queries) {
        for (Tiles& tiles : group) start(head, unit, query + (&tiles - group.data()) * kQueryTile, queries.end, tiles);
        const auto expect_next = [&](ComingRows& coming) {
          const int64_t after = query + group_queries;
          if (after < queries.end)
            return expect(head, unit, {after, std::min(after + group_queries, queries.end)}, coming);
          if (flat + 1 == end && !next) return;
          const Unit& unit_after = flat + 1 < end ? unit : *next;
          const Head<T> head_after(p, flat + 1 < end ? flat + 1 : first_head(p, *next));
          const Range<int64_t> all = queries_of(head_after, unit_after);
          expect(head_after, unit_after, {all.first, std::min(all.first + group_queries, all.end)}, coming);
        };
        const bool is_last = unit.wants_key_value && flat + 1 == end && query + group_queries >= queries.end;
        query_tiles(head, unit, group, of_scores, is_last, expect_next);
      }
    }
    if (!unit.wants_key_value) return;
    const Head<T> head(p, first);
    if (p.d_key.data) {
      write(head.layout.template key_rows<T>(p.d_key, head.index), shape, unit.keys.first, unit_keys, d_key);
    }
    if (p.d_value.data) {
      write(head.layout.template key_rows<T>(p.d_value, head.index), shape, unit.keys.first, unit_keys, d_value);
    }
  }

  // Writes gradient [count][padded] to rows first..first + count - 1.
  static void write(const HeadRows<T>& rows, const HeadShape<T>& shape, int64_t first, int64_t count,
                    const A* gradient) {
    for (int64_t r = 0; r < count; ++r) store_row(gradient + r * shape.padded, shape.head_dim, rows.row(first + r));
  }

  // Loads the tile of queries from `first` on, of which none may be left before `end`.
  static void start(const Head<T>& head, const Unit& unit, int64_t first, int64_t end, Tiles& tiles) {
    tiles.first_query = first;
    tiles.queries = std::max<int64_t>(0, std::min(kQueryTile, end - first));
    tiles.keys = {0, 0};
    if (tiles.queries == 0) return;
    tiles.keys = whole_tiles(unit.keys, head.visibility.keys_of(first, first + tiles.queries), kKeyTile);
    load_queries(head, first, tiles.queries, tiles);
    if (unit.wants_query) std::fill(tiles.d_query, tiles.d_query + tiles.queries * head.shape.padded, A(0));
  }

  // What start and the first tile of keys will read for some queries.
  static void expect(const Head<T>& head, const Unit& unit, Range<int64_t> queries, ComingRows& coming) {
    const AttentionParams& p = head.p;
    const int64_t count = queries.end - queries.first;
    coming.add(head.layout.template query_rows<const T>(p.query, head.index), queries.first, count, p.head_dim);
    if (!p.of_weights) {
      coming.add(head.layout.template query_rows<const T>(p.d_out, head.index), queries.first, count, p.head_dim);
      coming.add(head.layout.template query_rows<const T>(p.out, head.index), queries.first, count, p.head_dim);
    }
    const Range<int64_t> keys = whole_tiles(unit.keys, head.visibility.keys_of(queries.first, queries.end), kKeyTile);
    Scores<T>::expect_keys(head, keys.first, std::min(kKeyTile, keys.end - keys.first), coming);
  }

  // What tiles of queries that follow each other give to the unit. `is_last`: no others come after them, so the unit's
  // gradients of keys and values are written next. `expect_next` tells what is read after that.
  template <class OfScores, class ExpectNext>
  static void query_tiles(const Head<T>& head, const Unit& unit, const std::vector<Tiles>& group,
                          const OfScores& of_scores, bool is_last, const ExpectNext& expect_next) {
    const AttentionParams& p = head.p;
    Range<int64_t> keys{unit.keys.end, unit.keys.first};  // of all
    for (const Tiles& tiles : group) {
      if (tiles.keys.first >= tiles.keys.end) continue;
      keys = {std::min(keys.first, tiles.keys.first), std::max(keys.end, tiles.keys.end)};
    }
    ComingRows coming;
    for (int64_t first_key = keys.first; first_key < keys.end; first_key += kKeyTile) {
      const int64_t count = std::min(kKeyTile, keys.end - first_key);
      const int64_t next_key = first_key + kKeyTile;
      coming.clear();
      if (is_last && p.d_key.data) {
        coming.add(head.layout.template key_rows<T>(p.d_key, head.index), first_key, count, p.head_dim);
      }
      if (is_last && p.d_value.data) {
        coming.add(head.layout.template key_rows<T>(p.d_value, head.index), first_key, count, p.head_dim);
      }
      if (next_key < keys.end) {
        Scores<T>::expect_keys(head, next_key, std::min(kKeyTile, keys.end - next_key), coming);
      } else {
        if (unit.wants_query) {
          for (const Tiles& tiles : group) {
            coming.add(head.layout.template query_rows<T>(p.d_query, head.index), tiles.first_query, tiles.queries,
                       p.head_dim);
          }
        }
        expect_next(coming);
      }
      const P* key_rows = nullptr;  // of the tile of keys, once somebody sees one
      for (const Tiles& tiles : group) {
        if (first_key < tiles.keys.first || first_key >= tiles.keys.end) continue;
        const ScoreTile tile{tiles.first_query, tiles.queries, first_key,
                             std::min(kKeyTile, tiles.keys.end - first_key)};
        if (hides_tile(head.ranges, tile)) continue;
        if (!key_rows) {
          load_keys(head, first_key, count, tiles);
          key_rows = pack_along_rows<T>(tiles.scores.key, count, head.shape, tiles.key_rows);
        }
        score_gradient<OfScores::kIsWanted>(head, tile, tiles, coming);
        of_scores(head.index, tile, tiles.gradient.d_probability);
        add_products(head, unit, tile, key_rows, tiles, coming);
      }
    }
    if (!unit.wants_query) return;
    for (const Tiles& tiles : group) {
      write(head.layout.template query_rows<T>(p.d_query, head.index), head.shape, tiles.first_query, tiles.queries,
            tiles.d_query);
    }
  }

  // Adds to the sums what the gradients of a tile of scores give.
  static void add_products(const Head<T>& head, const Unit& unit, const ScoreTile& tile, const P* key_rows,
                           const Tiles& tiles, ComingRows& coming) {
    constexpr int64_t score_stride = kQueryTile / kNumbers<T>;
    const int64_t padded = head.shape.padded;
    const ScoreGradient<T>& gradient = tiles.gradient;
    const bool on_tiles = tiles.scores.on_tiles;
    if (unit.wants_key_value) {
      const int64_t offset = (tile.first_key - unit.keys.first) * padded;
      // dv [keys, padded] += dropout's scale * r p [keys, queries] @ do [queries, padded]
      if (!head.p.of_weights) {
        gemm_in_cache<T>(on_tiles, tile.keys, padded, operands<T>(tile.queries),
                         {gradient.probability, score_stride, 1}, tiles.d_out_rows, padded,
                         {tiles.d_value + offset, padded, static_cast<A>(head.p.dropout.scale), true},
                         coming.fetching());
      }
      // dk [keys, padded] += scale * ds [keys, queries] @ q [queries, padded]
      gemm_in_cache<T>(on_tiles, tile.keys, padded, operands<T>(tile.queries), {gradient.d_score, score_stride, 1},
                       tiles.query_rows, padded, {tiles.d_key + offset, padded, head.score_scale, true},
                       coming.fetching());
    }
    if (unit.wants_query) {
      // dq [queries, padded] += scale * ds^T [queries, keys] @ k [keys, padded]
      gemm_in_cache<T>(on_tiles, tile.queries, padded, operands<T>(tile.keys), {gradient.d_score_rows, 1, kQueryTile},
                       key_rows, padded, {tiles.d_query, padded, head.score_scale, true}, coming.fetching());
    }
  }

  static void load_keys(const Head<T>& head, int64_t first, int64_t count, const Tiles& tiles) {
    tiles.scores.load_keys(head, first, count);
    if (!head.p.of_weights) tiles.scores.load_values(head, first, count);
  }

  // With its queries and keys loaded: r p and ds [keys, queries] of a tile (ScoreGradient::compute).
  template <bool kKeepsExact = false>
  static void score_gradient(const Head<T>& head, const ScoreTile& tile, const Tiles& tiles, ComingRows& coming) {
    const int64_t width = round_up(tile.queries, kLanes<A>);
    const HeadShape<T>& shape = head.shape;
    const ScoreGradient<T>& gradient = tiles.gradient;
    // scale * scores [keys, queries] = scale of scores * k @ q^T + mask
    const A scale = tiles.scores.compute(head, tile, coming);
    if (head.p.of_weights) {
      load_weight_gradient(head, tile, gradient.d_probability);
    } else {
      // dp [keys, queries] = dropout's scale * v [keys, depth] @ do^T [depth, queries]
      gemm_in_cache<T>(tiles.scores.on_tiles, tile.keys, width, shape.depth, {tiles.scores.value, shape.stride, 1},
                       tiles.d_out_transposed, kQueryTile,
                       {gradient.d_probability, kQueryTile, static_cast<A>(head.p.dropout.scale), false},
                       coming.fetching());
    }
    gradient.template compute<kKeepsExact>(tile.keys, width, scale, tiles.scores.scores, tiles.scores.kept);
  }

  // q and do in all the ways that the products read them, and the statistics of every query.
  static void load_queries(const Head<T>& head, int64_t first, int64_t queries, const Tiles& tiles) {
    const AttentionParams& p = head.p;
    const HeadShape<T>& shape = head.shape;
    const HeadRows<const T> d_out = head.layout.template query_rows<const T>(p.d_out, head.index);
    tiles.scores.load_queries(head, first, queries);
    pack_along_rows<T>(tiles.scores.query, queries, shape, tiles.query_rows);
    if (!p.of_weights) {
      pack_along_depth<T>(d_out, first, queries, shape, tiles.d_out);
      transpose_tile(tiles.d_out, queries, shape.depth, shape.stride, tiles.d_out_transposed);
      pack_along_rows<T>(tiles.d_out, queries, shape, tiles.d_out_rows);
    }

    const HeadRows<const T> out = head.layout.template query_rows<const T>(p.out, head.index);
    const A* log_sum_exp = head.statistics(p.log_sum_exp, first);
    const A* score_shift = head.statistics(p.score_shift, first);
    for (int64_t i = 0; i < queries; ++i) {
      tiles.gradient.score_shift[i] = score_shift[i];
      tiles.gradient.log_sum_exp[i] = log_sum_exp[i];
      if (p.of_weights) {
        tiles.gradient.delta[i] = weights_dot(head, first + i, tiles.gradient.d_probability);
        continue;
      }
      load_row(out.row(first + i), p.head_dim, tiles.out_row);
      if constexpr (sizeof(T) == 2) {
        if (p.out_residue) {
          add_residues(RoundingResidue::of(p.dtype), p.head_dim, head.residues(first + i), tiles.out_row);
        }
      }
      load_row(d_out.row(first + i), p.head_dim, tiles.d_out_row);
      tiles.gradient.delta[i] = row_dot<A>(tiles.out_row, tiles.d_out_row, p.head_dim);
    }
    // A query that is only there to fill the vector has no probabilities, like one that sees no key.
    for (int64_t i = queries; i < round_up(queries, kLanes<A>); ++i) {
      tiles.gradient.score_shift[i] = A(0);
      tiles.gradient.log_sum_exp[i] = std::numeric_limits<A>::infinity();
      tiles.gradient.delta[i] = A(0);
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
