// The gradient of a float mask: that of the scores (backward.isa.h), summed over what the mask broadcasts over.
//
// Where the mask has heads, queries and keys, and its heads are work enough for all threads, the pass that makes the
// other gradients takes all sequences of a head in turn and adds up the mask's on the way, in tiles of that head. Else
// it is a pass of its own, with the same sums in the same order.
//
// A unit of work is a tile of the mask's own queries and keys, of which there is one where the mask broadcasts, of one
// of its sequences and heads. It goes through all scores that the tile is added to, always in the same order, and
// computes them again: nothing larger than the mask is kept, and the bits do not depend on the number of threads.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct MaskGradient {
  using A = Accumulator<T>;
  using P = Operand<T>;
  using Tiles = typename AttentionBackward<T>::Tiles;

  struct Unit {
    Range<int64_t> batches;
    Range<int64_t> heads;
    Range<int64_t> queries;
    Range<int64_t> keys;
  };

  static size_t thread_bytes(const Context& context, const AttentionParams& p) {
    Arena arena;
    Tiles(arena, context, p);
    take<double>(arena, kKeyTile * kQueryTile);
    return arena.used();
  }

  static size_t workspace_bytes(const Context& context, const AttentionParams& p) {
    if (!goes_along(context, p)) return context.threads * thread_bytes(context, p);
    const size_t sums = sums_of_head(p) * sizeof(double) + kSumsAlignment;
    return context.threads * (AttentionBackward<T>::thread_bytes(context, p) + sums);
  }

  // The most memory for the sums of one thread that takes whole heads.
  static constexpr size_t kMostSumsBytes = size_t{32} << 20;
  static constexpr size_t kSumsAlignment = 64;
  static constexpr int64_t kTile = kKeyTile * kQueryTile;

  // The numbers of all tiles of the query heads that read one head of keys.
  static size_t sums_of_head(const AttentionParams& p) {
    const int64_t tiles = ceil_div(p.queries, kQueryTile) * ceil_div(p.keys, kKeyTile);
    return static_cast<size_t>(p.num_heads / p.num_kv_heads * tiles * kTile);
  }

  static int64_t whole_heads(const AttentionParams& p) { return p.num_kv_heads * (p.mask.strides[0] ? p.batch : 1); }

  // Whether the other gradients' pass makes this one.
  static bool goes_along(const Context& context, const AttentionParams& p) {
    const int64_t* strides = p.mask.strides;
    const int64_t heads = whole_heads(p);
    return strides[1] && strides[2] && strides[3] && (heads >= 2 * context.threads || heads % context.threads == 0) &&
           sums_of_head(p) * sizeof(double) <= kMostSumsBytes;
  }

  // All gradients.
  static void run_along(Context& context, const AttentionParams& p) {
    using Backward = AttentionBackward<T>;
    const int64_t group = p.num_heads / p.num_kv_heads;
    const int64_t key_tiles = ceil_div(p.keys, kKeyTile);
    const int64_t tiles_of_head = ceil_div(p.queries, kQueryTile) * key_tiles;
    const size_t bytes = workspace_bytes(context, p) / context.threads;
    parallel_for(whole_heads(p), context.threads, [&](int64_t index, int thread) {
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      const std::vector<Tiles> tiles = AttentionBackward<T>::group_of_tiles(arena, context, p);
      double* const sums = take<double>(arena, sums_of_head(p));
      std::fill(sums, sums + sums_of_head(p), 0.0);
      const int64_t kv_head = index % p.num_kv_heads;
      const Range<int64_t> batches = one_or_all(p.mask.strides[0], index / p.num_kv_heads, 1, p.batch);
      const auto tile_at = [&](int64_t in_group, int64_t query, int64_t key) {
        return sums + (in_group * tiles_of_head + query / kQueryTile * key_tiles + key / kKeyTile) * kTile;
      };
      for (int64_t batch = batches.first; batch < batches.end; ++batch) {
        const typename Backward::Unit unit{
            batch, kv_head, {0, p.queries}, {0, p.keys}, p.d_query.data != nullptr, p.d_key.data || p.d_value.data};
        const auto add = [&](const HeadIndex& head, const ScoreTile& tile, const A* gradients) {
          add_tile(p.mask, tile, gradients, tile_at(head.head - kv_head * group, tile.first_query, tile.first_key));
        };
        Backward::run_unit(p, unit, nullptr, tiles, Adds<decltype(add)>{add});
      }
      for (int64_t in_group = 0; in_group < group; ++in_group) {
        const int64_t head = kv_head * group + in_group;
        for (int64_t query = 0; query < p.queries; query += kQueryTile) {
          for (int64_t key = 0; key < p.keys; key += kKeyTile) {
            const Unit unit{batches,
                            {head, head + 1},
                            {query, std::min(query + kQueryTile, p.queries)},
                            {key, std::min(key + kKeyTile, p.keys)}};
            write(p, unit, tile_at(in_group, query, key));
          }
        }
      }
    });
  }

  template <class Add>
  struct Adds {
    static constexpr bool kIsWanted = true;
    const Add& add;
    void operator()(const HeadIndex& head, const ScoreTile& tile, const A* gradients) const {
      add(head, tile, gradients);
    }
  };

  static void run(Context& context, const AttentionParams& p) {
    const int64_t* strides = p.mask.strides;
    const int64_t batches = strides[0] ? p.batch : 1;
    const int64_t heads = strides[1] ? p.num_heads : 1;
    const int64_t query_tiles = strides[2] ? ceil_div(p.queries, kQueryTile) : 1;
    const int64_t key_tiles = strides[3] ? ceil_div(p.keys, kKeyTile) : 1;
    const size_t bytes = thread_bytes(context, p);
    parallel_for(batches * heads * query_tiles * key_tiles, context.threads, [&](int64_t index, int thread) {
      Arena arena(static_cast<char*>(p.stage_workspace) + thread * bytes);
      const Tiles tiles(arena, context, p);
      double* sums = take<double>(arena, kKeyTile * kQueryTile);
      const int64_t key_tile = index % key_tiles;
      index /= key_tiles;
      const int64_t query_tile = index % query_tiles;
      index /= query_tiles;
      const Unit unit{one_or_all(strides[0], index / heads, 1, p.batch),
                      one_or_all(strides[1], index % heads, 1, p.num_heads),
                      one_or_all(strides[2], query_tile, kQueryTile, p.queries),
                      one_or_all(strides[3], key_tile, kKeyTile, p.keys)};
      std::fill(sums, sums + kKeyTile * kQueryTile, 0.0);
      add_scores(p, unit, tiles, sums);
      write(p, unit, sums);
    });
  }

  // Positions of tile `index`, or all where the mask broadcasts over them.
  static Range<int64_t> one_or_all(int64_t stride, int64_t index, int64_t tile, int64_t count) {
    if (stride == 0) return {0, count};
    return {index * tile, std::min((index + 1) * tile, count)};
  }

  // sums [kKeyTile][kQueryTile] += the gradients of all scores that the unit's tile is added to.
  static void add_scores(const AttentionParams& p, const Unit& unit, const Tiles& tiles, double* sums) {
    for (int64_t batch = unit.batches.first; batch < unit.batches.end; ++batch) {
      for (int64_t number = unit.heads.first; number < unit.heads.end; ++number) {
        const Head<T> head(p, batch * p.num_heads + number);
        for (int64_t query = unit.queries.first; query < unit.queries.end; query += kQueryTile) {
          const int64_t queries = std::min(kQueryTile, unit.queries.end - query);
          const Range<int64_t> keys = whole_tiles(unit.keys, head.visibility.keys_of(query, query + queries), kKeyTile);
          if (keys.first >= keys.end) continue;
          AttentionBackward<T>::load_queries(head, query, queries, tiles);
          for (int64_t key = keys.first; key < keys.end; key += kKeyTile) {
            const ScoreTile tile{query, queries, key, std::min(kKeyTile, keys.end - key)};
            if (hides_tile(head.ranges, tile)) continue;
            AttentionBackward<T>::load_keys(head, key, tile.keys, tiles);
            ComingRows none;
            AttentionBackward<T>::template score_gradient<true>(head, tile, tiles, none);
            add_tile(p.mask, tile, tiles.gradient.d_probability, sums);
          }
        }
      }
    }
  }

  // sums += gradients [keys][kQueryTile], of queries or keys in the first row or column where the mask broadcasts.
  static void add_tile(const Mask& mask, const ScoreTile& tile, const A* gradients, double* sums) {
    for (int64_t j = 0; j < tile.keys; ++j) {
      const A* row = gradients + j * kQueryTile;
      double* target = sums + (mask.strides[3] ? j * kQueryTile : 0);
      if (mask.strides[2]) {
        for (int64_t i = 0; i < tile.queries; ++i) target[i] += row[i];
      } else {
        double sum = 0;
        for (int64_t i = 0; i < tile.queries; ++i) sum += row[i];
        target[0] += sum;
      }
    }
  }

  static void write(const AttentionParams& p, const Unit& unit, const double* sums) {
    switch (p.mask.dtype) {
      case DType::kFloat32:
        return write_as<float>(p, unit, sums);
      case DType::kFloat64:
        return write_as<double>(p, unit, sums);
      case DType::kFloat16:
        return write_as<Float16>(p, unit, sums);
      case DType::kBFloat16:
        return write_as<BFloat16>(p, unit, sums);
      default:
        return;  // no others have a gradient
    }
  }

  template <class M>
  static void write_as(const AttentionParams& p, const Unit& unit, const double* sums) {
    const int64_t* strides = p.mask.strides;
    M* origin = static_cast<M*>(p.d_mask) + unit.batches.first * strides[0] + unit.heads.first * strides[1];
    const int64_t queries = strides[2] ? unit.queries.end : unit.queries.first + 1;
    const int64_t keys = strides[3] ? unit.keys.end : unit.keys.first + 1;
    for (int64_t i = unit.queries.first; i < queries; ++i) {
      for (int64_t j = unit.keys.first; j < keys; ++j) {
        const double sum = sums[(j - unit.keys.first) * kQueryTile + i - unit.queries.first];
        origin[i * strides[2] + j * strides[3]] = narrow<M>(static_cast<Accumulator<M>>(sum));
      }
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
