// How attention is cut into tiles, and how the rows of a head are packed into them.
//
// A tile of scores is held transposed, [keys][queries], so that vectors run along the queries: the softmax over keys
// needs no sums across a vector.
//
// An operand P of the products holds kNumbers numbers that follow each other along the sum (numbers.isa.h). Where the
// sum runs over head_dim, a tile is packed along the depth, [rows][depth]; where it runs over queries or keys, along
// the rows, [rows / kNumbers][padded]. With one number the two are the same.

namespace pfa::cpu::PFA_ISA {

constexpr int64_t kQueryTile = 64;
constexpr int64_t kKeyTile = 64;
static_assert(kQueryTile <= kMostTransposedRows && kKeyTile / 2 <= kMostTransposedPairs, "backward's d_q, on tiles");
// A thread takes so many tiles of queries of a head at once, at most: keys and values are packed once for all of them.
constexpr int64_t kQueryGroup = 4;

// The scores of some queries with some keys: at most kQueryTile, at most kKeyTile.
struct ScoreTile {
  int64_t first_query;
  int64_t queries;
  int64_t first_key;
  int64_t keys;
};

// What `seen` leaves of `positions`, begun with a whole tile, as `positions` is.
inline Range<int64_t> whole_tiles(Range<int64_t> positions, Range<int64_t> seen, int64_t tile) {
  return {std::max(positions.first, round_down(seen.first, tile)), std::min(positions.end, seen.end)};
}

// How many tiles of queries a thread takes at once where a head has so many tiles and all heads give `work` tiles.
inline int64_t query_group(int64_t tiles, int64_t work, int threads) {
  return std::max<int64_t>(1, std::min({kQueryGroup, tiles, work / (4 * threads)}));
}

inline Visibility<int64_t> visibility_of_sequence(const AttentionParams& p, int64_t batch) {
  if (!p.query_starts) return visibility_of<int64_t>(p);
  return visibility_of<int64_t>(p, p.query_starts[batch + 1] - p.query_starts[batch],
                                p.key_starts[batch + 1] - p.key_starts[batch]);
}

// Sizes of a head in the tiles.
template <class T>
struct HeadShape {
  int64_t head_dim;
  int64_t depth;   // operands along head_dim
  int64_t stride;  // of operands along head_dim, in whole vectors
  int64_t padded;  // head_dim in whole vectors

  explicit HeadShape(const AttentionParams& p)
      : head_dim(p.head_dim),
        depth(operands<T>(p.head_dim)),
        stride(round_up(depth, kLanes<Accumulator<T>>)),
        padded(round_up(p.head_dim, kLanes<Accumulator<T>>)) {}
};

// One head of queries of one sequence, as both passes see it.
template <class T>
struct Head {
  using A = Accumulator<T>;

  const AttentionParams& p;
  QkvLayout layout;
  HeadIndex index;
  HeadShape<T> shape;
  Visibility<int64_t> visibility;
  HiddenRanges<int64_t> ranges;
  A score_scale;

  Head(const AttentionParams& p, int64_t flat)
      : p(p),
        layout(qkv_layout(p)),
        index(layout.head(flat)),
        shape(p),
        visibility(visibility_of_sequence(p, index.batch)),
        ranges(hidden_ranges(p.hidden_ranges, index.batch, index.kv_head, visibility.queries)),
        score_scale(static_cast<A>(p.scale)) {}

  // From `query` on, of what has a number for every query of every head.
  A* statistics(void* data, int64_t query) const { return static_cast<A*>(data) + layout.statistics(index) + query; }

  // Of the query's result.
  uint32_t* residues(int64_t query) const {
    return p.out_residue + (layout.statistics(index) + query) * residue_words(p.head_dim);
  }
};

// Packs rows first..first + count - 1 along the depth: tile [count][stride], zero beyond head_dim.
template <class T>
void pack_along_depth(const HeadRows<const T>& rows, int64_t first, int64_t count, const HeadShape<T>& shape,
                      Operand<T>* tile) {
  for (int64_t r = 0; r < count; ++r) {
    const T* source = rows.row(first + r);
    Operand<T>* target = tile + r * shape.stride;
    if constexpr (kPaired<T>) {
      target[shape.depth - 1] = 0;
      std::memcpy(target, source, shape.head_dim * sizeof(T));
    } else {
      load_row(source, shape.head_dim, target);
    }
    if (shape.depth < shape.stride) std::fill(target + shape.depth, target + shape.stride, Operand<T>(0));
  }
}

// The tile [count][stride] of pack_along_depth packed along the rows: [operands(count)][padded]. With one number it is
// that tile.
template <class T>
Operand<T>* pack_along_rows(Operand<T>* tile, int64_t count, const HeadShape<T>& shape, Operand<T>* packed) {
  if constexpr (kPaired<T>) {
    for (int64_t r = 0; r < count; r += 2) {
      const Operand<T>* low_row = tile + r * shape.stride;
      const Operand<T>* high_row = low_row + shape.stride;
      Operand<T>* target = packed + r / 2 * shape.padded;
      for (int64_t d = 0; d < shape.padded; d += kLanes<uint32_t>) {
        const Vec<uint32_t> high = r + 1 < count ? load_halves(high_row + d / 2) : Vec<uint32_t>{};
        store(target + d, load_halves(low_row + d / 2) | high << 16);
      }
    }
    return packed;
  } else {
    return tile;
  }
}

// tile [count][stride] transposed to [depth][kQueryTile], zero from `count` up to the next whole vector.
template <class P>
void transpose_tile(const P* tile, int64_t count, int64_t depth, int64_t stride, P* transposed) {
  constexpr int lanes = kLanes<P>;
  for (int64_t i = 0; i < count; i += lanes) {
    for (int64_t d = 0; d < depth; d += lanes) {
      Vec<P> vectors[lanes];
      for (int l = 0; l < lanes; ++l) vectors[l] = i + l < count ? load(tile + (i + l) * stride + d) : Vec<P>{};
      transpose_lanes<P>(vectors);
      const int64_t rows = std::min<int64_t>(lanes, depth - d);
      if (rows == lanes) {
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) store(transposed + (d + l) * kQueryTile + i, vectors[l]);
      } else {
        for (int64_t l = 0; l < rows; ++l) store(transposed + (d + l) * kQueryTile + i, vectors[l]);
      }
    }
  }
}

}  // namespace pfa::cpu::PFA_ISA
