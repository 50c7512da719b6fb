// A tile of scores, scale * k @ q^T + mask, and what it is made of: the same in both passes.

namespace pfa::cpu::PFA_ISA {

// exp of scores less the highest of their row, or the log of their sum; rougher where probabilities are rounded to
// pairs.
template <class T, int kCount>
[[gnu::always_inline]] inline Vectors<Accumulator<T>, kCount> exp_of_score(const Vectors<Accumulator<T>, kCount>& x) {
  if constexpr (kPaired<T>) {
    return vexp_16bit(x);
  } else {
    return vexp(x);
  }
}

template <class T>
struct Scores {
  using A = Accumulator<T>;
  using P = Operand<T>;

  P* query;               // [kQueryTile][stride]
  P* query_transposed;    // [depth][kQueryTile]
  P* key;                 // [kKeyTile][stride]
  P* value;               // [kKeyTile][stride]
  A* scores;              // [kKeyTile][kQueryTile]
  uint64_t* kept;         // [kKeyTile] of bits (dropout.isa.h), or null: all are kept
  bool on_tiles = false;  // products: the thread's AMX tiles are set up

  Scores(Arena& arena, const AttentionParams& p) {
    const HeadShape<T> shape(p);
    query = take<P>(arena, kQueryTile * shape.stride);
    query_transposed = take<P>(arena, shape.depth * kQueryTile);
    key = take<P>(arena, kKeyTile * shape.stride);
    value = take<P>(arena, kKeyTile * shape.stride);
    scores = take<A>(arena, kKeyTile * kQueryTile);
    kept = p.dropout.threshold ? take<uint64_t>(arena, kKeyTile) : nullptr;
  }

  // With memory for other queries beside the same keys.
  Scores with_queries(Arena& arena, const AttentionParams& p) const {
    const HeadShape<T> shape(p);
    Scores result = *this;
    result.query = take<P>(arena, kQueryTile * shape.stride);
    result.query_transposed = take<P>(arena, shape.depth * kQueryTile);
    return result;
  }

  void load_queries(const Head<T>& head, int64_t first, int64_t count) const {
    pack_along_depth<T>(head.layout.template query_rows<const T>(head.p.query, head.index), first, count, head.shape,
                        query);
    transpose_tile(query, count, head.shape.depth, head.shape.stride, query_transposed);
  }

  // Keys first..first + count - 1.
  void load_keys(const Head<T>& head, int64_t first, int64_t count) const {
    pack_along_depth<T>(head.layout.template key_rows<const T>(head.p.key, head.index), first, count, head.shape, key);
  }

  void load_values(const Head<T>& head, int64_t first, int64_t count) const {
    pack_along_depth<T>(head.layout.template key_rows<const T>(head.p.value, head.index), first, count, head.shape,
                        value);
  }

  // What load_keys and load_values will read.
  static void expect_keys(const Head<T>& head, int64_t first, int64_t count, ComingRows& coming) {
    coming.add(head.layout.template key_rows<const T>(head.p.key, head.index), first, count, head.p.head_dim);
    if (head.p.of_weights) return;
    coming.add(head.layout.template key_rows<const T>(head.p.value, head.index), first, count, head.p.head_dim);
  }

  // With the tile's queries and keys loaded: their scores, and what is kept of the probabilities. Returns the scale
  // that the scores still need: products of pairs are so fast that a pass over their results counts.
  A compute(const Head<T>& head, const ScoreTile& tile, ComingRows& coming) const {
    const bool leaves_scale = kPaired<T> && !head.p.mask.data && head.score_scale > 0;
    // scores [keys, queries] = scale * k [keys, depth] @ q^T [depth, queries], queries in whole vectors
    gemm_in_cache<T>(on_tiles, tile.keys, round_up(tile.queries, kLanes<A>), head.shape.depth,
                     {key, head.shape.stride, 1}, query_transposed, kQueryTile,
                     {scores, kQueryTile, leaves_scale ? A(1) : head.score_scale, false}, coming.fetching());
    if (head.p.mask.data) add_mask(head.p.mask, head.index, tile, scores);
    hide_unseen(head.visibility, head.ranges, tile, scores);
    if (kept) keep_tile(head.p, head.index, tile, kept);
    return leaves_scale ? head.score_scale : A(1);
  }
};

}  // namespace pfa::cpu::PFA_ISA
