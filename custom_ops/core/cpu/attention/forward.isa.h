// o = dropout(softmax(scale * q k^T + mask)) v, a few tiles of queries at a time. For each tile of keys the scores are
// computed, the softmax is brought up to date, and o is rescaled and added to. Of the scores only two numbers of each
// query are kept for backward: the highest score, and the log of the sum of exponentials without it.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct AttentionForward {
  using A = Accumulator<T>;
  using P = Operand<T>;

  static constexpr int64_t kTransposed = kLanes<A>;  // queries whose result is transposed at once

  // Of one thread.
  struct Tiles {
    Scores<T> scores;
    OnlineSoftmax<T> softmax;
    P* value_rows;               // [operands(kKeyTile)][padded]
    P* probability;              // [operands(kKeyTile)][kQueryTile]
    A* out;                      // [kQueryTile][padded], on tiles [padded][kQueryTile]
    P* value_columns = nullptr;  // on tiles: [padded][operands(kKeyTile)]
    A* out_rows = nullptr;       // on tiles: [kTransposed][padded]
    typename OneQuery<T>::Memory one_query;
    // Of the tile of queries.
    int64_t first_query = 0;
    int64_t queries = 0;
    Range<int64_t> keys{0, 0};  // in whole tiles but for the last
    bool continues = false;     // whether `out` has sums already

    Tiles(Arena& arena, const AttentionParams& p)
        : scores(arena, p), softmax(arena), one_query(arena, p, p.queries == 1 ? p.num_heads : 1) {
      const HeadShape<T> shape(p);
      if constexpr (kPaired<T>) {
        value_rows = take<P>(arena, kKeyTile / 2 * shape.padded);
        probability = take<P>(arena, kKeyTile / 2 * kQueryTile);
      } else {
        value_rows = scores.value;
        probability = scores.scores;
      }
      out = take<A>(arena, kQueryTile * shape.padded);
      if constexpr (kHasTileProducts<T>) {
        value_columns = take<P>(arena, kKeyTile / 2 * shape.padded);
        out_rows = take<A>(arena, kTransposed * shape.padded);
      }
    }

    // Those of other queries beside the same keys.
    Tiles with_queries(Arena& arena, const AttentionParams& p) const {
      Tiles result = *this;
      result.scores = scores.with_queries(arena, p);
      result.softmax = OnlineSoftmax<T>(arena);
      result.out = take<A>(arena, kQueryTile * HeadShape<T>(p).padded);
      return result;
    }
  };

  // As many tiles of queries as a thread takes at once.
  static std::vector<Tiles> group_of_tiles(Arena& arena, const AttentionParams& p, int64_t count) {
    std::vector<Tiles> tiles(1, Tiles(arena, p));
    while (static_cast<int64_t>(tiles.size()) < count) tiles.push_back(tiles[0].with_queries(arena, p));
    return tiles;
  }

  static int64_t group(const Context& context, const AttentionParams& p) {
    const int64_t query_tiles = ceil_div(p.queries, kQueryTile);
    return query_group(query_tiles, p.batch * p.num_heads * query_tiles, context.threads);
  }

  static size_t thread_bytes(const Context& context, const AttentionParams& p) {
    Arena arena;
    group_of_tiles(arena, p, group(context, p));
    return arena.used();
  }

  static size_t workspace_bytes(const Context& context, const AttentionParams& p) {
    return context.threads * thread_bytes(context, p);
  }

  static void run(Context& context, const AttentionParams& p) {
    if (p.random_state) {
      p.random_state[0] = p.seed;
      p.random_state[1] = p.offset;
    }
    if (p.queries == 1) return run_one_query(context, p);
    const int64_t count = group(context, p);
    const int64_t groups = ceil_div(ceil_div(p.queries, kQueryTile), count);
    const size_t bytes = thread_bytes(context, p);
    const int64_t units = p.batch * p.num_heads * groups;
    // The last tiles have the most keys under a causal mask: they come first, to even out the threads.
    const auto first_query = [&](int64_t index) { return (groups - 1 - index % groups) * count * kQueryTile; };
    const bool on_tiles = has_tile_products<T>(context);
    parallel_for_with_next(units, context.threads, [&](int64_t index, int64_t next, int thread) {
      const TileScope scope(on_tiles);
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      const Head<T> head(p, index / groups);
      std::vector<Tiles> tiles = group_of_tiles(arena, p, count);
      for (Tiles& tile : tiles) {
        tile.scores.on_tiles = on_tiles;
        start(head, first_query(index) + (&tile - tiles.data()) * kQueryTile, tile);
      }
      query_tiles(head, tiles, [&](ComingRows& coming) {
        if (next < units) expect(Head<T>(p, next / groups), first_query(next), count * kQueryTile, coming);
      });
    });
  }

  // Loads the tile of queries from `first` on, of which none may be left.
  static void start(const Head<T>& head, int64_t first, Tiles& tiles) {
    tiles.first_query = first;
    tiles.queries = std::max<int64_t>(0, std::min(kQueryTile, head.visibility.queries - first));
    if (tiles.queries <= 1) return;
    const Range<int64_t> seen = head.visibility.keys_of(first, first + tiles.queries);
    tiles.keys = whole_tiles({0, head.visibility.keys}, seen, kKeyTile);
    tiles.scores.load_queries(head, first, tiles.queries);
    tiles.softmax.start(round_up(tiles.queries, kLanes<A>));
  }

  // What start and the first tile of keys will read for queries first..first + count - 1, of which none may be there.
  static void expect(const Head<T>& head, int64_t first, int64_t count, ComingRows& coming) {
    count = std::min(count, head.visibility.queries - first);
    if (count <= 0) return;
    coming.add(head.layout.template query_rows<const T>(head.p.query, head.index), first, count, head.p.head_dim);
    const Range<int64_t> seen = head.visibility.keys_of(first, first + count);
    const Range<int64_t> keys = whole_tiles({0, head.visibility.keys}, seen, kKeyTile);
    Scores<T>::expect_keys(head, keys.first, std::min(kKeyTile, keys.end - keys.first), coming);
  }

  // The results of tiles of queries that follow each other. `expect_next` tells what is read after that.
  template <class ExpectNext>
  static void query_tiles(const Head<T>& head, std::vector<Tiles>& group, const ExpectNext& expect_next) {
    Range<int64_t> keys{head.visibility.keys, 0};  // of all
    for (const Tiles& tiles : group) {
      if (tiles.keys.first >= tiles.keys.end) continue;
      keys = {std::min(keys.first, tiles.keys.first), std::max(keys.end, tiles.keys.end)};
    }
    ComingRows coming;
    for (int64_t first_key = keys.first; first_key < keys.end; first_key += kKeyTile) {
      const int64_t count = std::min(kKeyTile, keys.end - first_key);
      const int64_t next_key = first_key + kKeyTile;
      coming.clear();
      if (next_key < keys.end) {
        Scores<T>::expect_keys(head, next_key, std::min(kKeyTile, keys.end - next_key), coming);
      } else {
        expect_next(coming);
      }
      const P* value_rows = nullptr;  // of the tile of keys, once somebody sees one
      for (Tiles& tiles : group) {
        if (first_key < tiles.keys.first || first_key >= tiles.keys.end) continue;
        const ScoreTile tile{tiles.first_query, tiles.queries, first_key,
                             std::min(kKeyTile, tiles.keys.end - first_key)};
        if (hides_tile(head.ranges, tile)) continue;
        if (!value_rows) {
          tiles.scores.load_keys(head, first_key, count);
          tiles.scores.load_values(head, first_key, count);
          value_rows = pack_along_rows<T>(tiles.scores.value, count, head.shape, tiles.value_rows);
          if (tiles.scores.on_tiles) {
            constexpr int64_t pairs = kKeyTile / 2;
            const int64_t padded = head.shape.padded;
            transpose_squares<P>(pairs, padded, value_rows, padded, tiles.value_columns, pairs);
            value_rows = tiles.value_columns;
          }
        }
        add_keys(head, tile, value_rows, tiles, coming);
      }
    }
    for (const Tiles& tiles : group) {
      if (tiles.queries == 1) one_query(head.p, head.index.flat, 1, tiles.first_query, tiles);
      if (tiles.queries <= 1) continue;
      if (!tiles.continues) std::fill(tiles.out, tiles.out + kQueryTile * head.shape.padded, A(0));
      if (!tiles.scores.on_tiles) {
        write(head, tiles.first_query, tiles.queries, tiles.out, 0, tiles);
        continue;
      }
      for (int64_t i = 0; i < tiles.queries; i += kTransposed) {
        const int64_t padded = head.shape.padded;
        transpose_squares<A>(padded, kTransposed, tiles.out + i, kQueryTile, tiles.out_rows, padded);
        write(head, tiles.first_query, std::min(kTransposed, tiles.queries - i), tiles.out_rows, i, tiles);
      }
    }
  }

  // Brings the results of a tile of queries up to date with a tile of keys, which is loaded.
  static void add_keys(const Head<T>& head, const ScoreTile& tile, const P* value_rows, Tiles& tiles,
                       ComingRows& coming) {
    const int64_t padded = head.shape.padded;
    // scale * scores [keys, queries] = scale of scores * k @ q^T + mask
    const A scale = tiles.scores.compute(head, tile, coming);
    // p [keys, queries] = exp(scale * scores - maximum)
    const int64_t width = round_up(tile.queries, kLanes<A>);
    tiles.softmax.add_tile(tile.keys, width, scale, tiles.scores.scores, tiles.scores.kept, tiles.probability);
    if (tiles.scores.on_tiles) {
      // o^T [padded, queries] = o^T * rescale + v^T [padded, keys] @ p [keys, queries]
      if (tiles.continues) rescale_columns_of_out(width, padded, tiles);
      gemm_in_cache<T>(true, padded, width, operands<T>(tile.keys), {value_rows, kKeyTile / 2, 1}, tiles.probability,
                       kQueryTile, {tiles.out, kQueryTile, A(1), tiles.continues}, coming.fetching());
      tiles.continues = true;
      return;
    }
    // o [queries, padded] = o * rescale + p^T [queries, keys] @ v [keys, padded]
    if (tiles.continues) rescale_out(tile.queries, padded, tiles);
    micro_gemm<A, P>(tile.queries, padded, operands<T>(tile.keys), {tiles.probability, 1, kQueryTile}, value_rows,
                     padded, {tiles.out, padded, A(1), tiles.continues}, coming.fetching());
    tiles.continues = true;
  }

  // Where every sequence has one query: of as many heads of a sequence at once as leave work for all threads.
  static void run_one_query(Context& context, const AttentionParams& p) {
    const int64_t wanted = ceil_div(p.batch * p.num_heads, 4 * context.threads);
    const int64_t parts = std::max<int64_t>(1, p.num_heads / std::max<int64_t>(1, wanted));
    const size_t bytes = thread_bytes(context, p);
    parallel_for(p.batch * parts, context.threads, [&](int64_t index, int thread) {
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      const int64_t batch = index / parts;
      const int64_t first = index % parts * p.num_heads / parts;
      const int64_t end = (index % parts + 1) * p.num_heads / parts;
      if (first == end || visibility_of_sequence(p, batch).queries == 0) return;
      one_query(p, batch * p.num_heads + first, end - first, 0, Tiles(arena, p));
    });
  }

  // One query of `count` heads of a sequence, from head `flat` on.
  static void one_query(const AttentionParams& p, int64_t flat, int64_t count, int64_t query, const Tiles& tiles) {
    std::vector<Head<T>> heads;
    for (int64_t h = 0; h < count; ++h) heads.emplace_back(p, flat + h);
    const OneQuery<T> attention{heads, query, tiles.scores.scores, tiles.scores.kept, tiles.one_query};
    attention.run();
    for (int64_t h = 0; h < count; ++h) {
      attention.result(h, tiles.softmax.maximum, tiles.softmax.sum, tiles.out);
      write(heads[h], query, 1, tiles.out, 0, tiles);
    }
  }

  static void rescale_columns_of_out(int64_t width, int64_t padded, const Tiles& tiles) {
    for (int64_t i = 0; i < width; i += kLanes<A>) {
      const A* const factors = tiles.softmax.rescale + i;
      if (std::all_of(factors, factors + kLanes<A>, [](A factor) { return factor == A(1); })) continue;
      const Vec<A> rescale = load(factors);
      for (int64_t d = 0; d < padded; ++d) {
        A* const target = tiles.out + d * kQueryTile + i;
        store(target, load(target) * rescale);
      }
    }
  }

  static void rescale_out(int64_t queries, int64_t padded, const Tiles& tiles) {
    for (int64_t i = 0; i < queries; ++i) {
      const A rescale = tiles.softmax.rescale[i];
      if (rescale == A(1)) continue;
      A* row = tiles.out + i * padded;
      for (int64_t d = 0; d < padded; d += kLanes<A>) store(row + d, load(row + d) * rescale);
    }
  }

  // Divides rows of o, queries `first`.. of the tile, by their sums and writes them, with what backward needs of the
  // softmax.
  static void write(const Head<T>& head, int64_t tile_query, int64_t queries, A* rows, int64_t first,
                    const Tiles& tiles) {
    const int64_t first_query = tile_query + first;
    const AttentionParams& p = head.p;
    const A scale = static_cast<A>(p.dropout.scale);
    const HeadRows<T> out = head.layout.template query_rows<T>(p.out, head.index);
    A* log_sum_exp = p.log_sum_exp ? head.statistics(p.log_sum_exp, first_query) : nullptr;
    A* score_shift = p.log_sum_exp ? head.statistics(p.score_shift, first_query) : nullptr;
    for (int64_t i = 0; i < queries; ++i) {
      const A sum = tiles.softmax.sum[first + i];
      const A factor = sum == 0 ? A(0) : scale / sum;
      A* row = rows + i * head.shape.padded;
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] *= factor;
      store_row(row, p.head_dim, out.row(first_query + i));
      if constexpr (sizeof(T) == 2) {
        if (p.out_residue) {
          encode_residues(RoundingResidue::of(p.dtype), p.head_dim, row, out.row(first_query + i),
                          head.residues(first_query + i));
        }
      }
      if (log_sum_exp) {
        log_sum_exp[i] = sum == 0 ? std::numeric_limits<A>::infinity() : std::log(sum);
        score_shift[i] = sum == 0 ? A(0) : tiles.softmax.maximum[first + i];
      }
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
