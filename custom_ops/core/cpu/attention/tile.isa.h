// What the attention's two passes share: the tiling, operands packed as tiles, and masked, dropped scores.
//
// A tile of scores is held transposed, [keys][queries], so that vectors run along the queries: the row-wise softmax
// needs no sums across a vector.
//
// An operand P of the products holds kNumbers numbers that follow each other along the sum (simd.h). Where the sum runs
// over head_dim, a tile is packed along the depth, [rows][depth]; where it runs over queries or keys, along the rows,
// [rows / kNumbers][padded]. With one number the two are the same.

namespace pfa::cpu::PFA_ISA {

// Sizes of a head in the tiles.
template <class T>
struct HeadShape {
  int64_t head_dim;
  int64_t depth;   // operands along head_dim
  int64_t stride;  // of operands along head_dim, in whole vectors
  int64_t padded;  // head_dim in whole vectors

  explicit HeadShape(const Params& p)
      : head_dim(p.head_dim),
        depth(operands<T>(p.head_dim)),
        stride(round_up(depth, kLanes<Accumulator<T>>)),
        padded(round_up(p.head_dim, kLanes<Accumulator<T>>)) {}
};

template <class T>
HeadRows<const T> rows_of(const Params& p, const HeadIndex& h, QkvPart part) {
  return qkv_layout(p).rows(static_cast<const T*>(p.qkv), h, part);
}

// Rows [first, first + count) packed along the depth: tile [count][stride], zero beyond head_dim.
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
      Vec<P> square[lanes];
      for (int l = 0; l < lanes; ++l) square[l] = i + l < count ? load(tile + (i + l) * stride + d) : Vec<P>{};
      transpose_square<P>(square);
      const int64_t rows = std::min<int64_t>(lanes, depth - d);
      if (rows == lanes) {
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) store(transposed + (d + l) * kQueryTile + i, square[l]);
      } else {
        for (int64_t l = 0; l < rows; ++l) store(transposed + (d + l) * kQueryTile + i, square[l]);
      }
    }
  }
}

template <class A>
inline A query_scale(const Params& p) {
  return A(1) / std::sqrt(static_cast<A>(p.head_dim));
}

// Where the walk over keys starts whose first is `first`: at the beginning of its tile.
inline int64_t first_of_tile(int64_t first, int64_t tile) { return first / tile * tile; }

// scores [keys][kQueryTile] = scale * k @ q^T + mask; `keys_packed` is [keys][stride], `query_transposed`
// [depth][kQueryTile].
template <class T, class A = Accumulator<T>>
void score_tile(const Params& p, const HeadShape<T>& shape, const HeadIndex& h, int64_t i0, int64_t j0, int64_t queries,
                int64_t keys, const Operand<T>* keys_packed, const Operand<T>* query_transposed, A* scores) {
  const int64_t width = round_up(queries, kLanes<A>);
  micro_gemm<A, Operand<T>>(keys, width, shape.depth, {keys_packed, shape.stride, 1}, query_transposed, kQueryTile,
                            {scores, kQueryTile, query_scale<A>(p), false});
  if (p.mask.data) add_mask(p, h, i0, j0, queries, keys, scores);
  const auto visibility = visibility_of<int64_t>(p);
  if (!visibility.hides_any(i0, i0 + queries, j0, j0 + keys)) return;
  for (int64_t j = 0; j < keys; ++j) {
    const Range<int64_t> seeing = visibility.queries_of(j0 + j);
    const int64_t first = std::min(std::max<int64_t>(seeing.first - i0, 0), width);
    const int64_t end = std::max(std::min(seeing.end - i0, width), first);
    A* row = scores + j * kQueryTile;
    std::fill(row, row + first, -std::numeric_limits<A>::infinity());
    if (end < queries) std::fill(row + end, row + queries, -std::numeric_limits<A>::infinity());
  }
}

// Bit i of kept[j]: whether the element of query i0 + i and key j0 + j is kept. i0 is a multiple of 32 and j0 of 16.
inline void keep_tile(const Params& p, const HeadIndex& h, int64_t i0, int64_t j0, int64_t queries, int64_t keys,
                      uint64_t* kept) {
  static_assert(kQueryTile == 64, "a row of the tile is a word of bits");
  constexpr int lanes = kLanes<uint32_t>;
  constexpr int chunk = lanes < 8 ? lanes : 8;  // lanes of consecutive queries
  const PhiloxState state = philox_state(p.random_state[0], p.random_state[1], DropoutStage::kAttention);
  // A number is at least the threshold when the word that begins with it is greater than this.
  const Vec<uint32_t> below = broadcast((p.attn_dropout.threshold << 16) - 1);
  const int64_t row_groups = round_up(queries, 16) / 2;
  std::fill(kept, kept + round_up(keys, 16), 0);
  for (int64_t j = 0; j < keys; j += 16) {
    for (int t = 0; t < 4; ++t) {
      const uint32_t c0 = static_cast<uint32_t>((j0 + j) / 16 * 4 + t);
      for (int64_t group = 0; group < row_groups; group += lanes) {
        const Vec<uint32_t> c1 = lane_numbers() + static_cast<uint32_t>(i0 / 2 + group);
        const PhiloxVectors words = philox_vector(state, c0, c1, h.dropout_head);
        for (int word = 0; word < 4; ++word) {
          for (int half = 0; half < 2; ++half) {
            const uint64_t bits = greater_bits(half ? words.w[word] : words.w[word] << 16, below);
            uint64_t spread = 0;
            for (int first = 0; first < lanes; first += chunk) {
              const int64_t row = (group + first) / 8 * 16 + (group + first) % 8 + 8 * (word / 2);
              spread |= (bits >> first & ((1u << chunk) - 1)) << row;
            }
            kept[j + 8 * (word % 2) + 2 * t + half] |= spread;
          }
        }
      }
    }
  }
}

}  // namespace pfa::cpu::PFA_ISA
