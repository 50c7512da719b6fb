// What the attention's two passes share: the tiling, operands packed as float tiles, and masked, dropped scores.
//
// A tile of scores is held transposed, [keys][queries], so that vectors run along the queries: the row-wise softmax needs no sums
// across a vector, and keys and values are operands that are only broadcast.

namespace pfa::cpu::PFA_ISA {

constexpr int64_t kQueryTile = 64;
constexpr int64_t kKeyTile = 64;

template <class T>
inline int64_t padded_head_dim(const Params& p) {
  return round_up(p.head_dim, kLanes<Accumulator<T>>);
}

enum class QkvPart : int64_t { kQuery = 0, kKey = 1, kValue = 2 };

// One head's rows of qkv [batch, seq_len, 3, H, D] or, with parts = 1, of attn_out [batch, seq_len, H, D].
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;

  HeadRows(T* base, const Params& p, int64_t bh, int64_t parts, int64_t part)
      : data(base + (bh / p.num_heads) * p.seq_len * parts * p.heads_dim() + part * p.heads_dim() +
             (bh % p.num_heads) * p.head_dim),
        stride(parts * p.heads_dim()) {}

  T* row(int64_t i) const { return data + i * stride; }
};

template <class T>
HeadRows<const T> qkv_rows(const Params& p, int64_t bh, QkvPart part) {
  return HeadRows<const T>(static_cast<const T*>(p.qkv), p, bh, 3, static_cast<int64_t>(part));
}

// Rows [first, first + count) as tile [count][padded_head_dim] times `scale`, zero beyond head_dim.
template <class T, class A = Accumulator<std::remove_const_t<T>>>
void pack_rows(const HeadRows<T>& rows, int64_t first, int64_t count, int64_t head_dim, int64_t padded, A scale, A* tile) {
  for (int64_t r = 0; r < count; ++r) {
    const T* source = rows.row(first + r);
    A* target = tile + r * padded;
    for (int64_t d = 0; d < head_dim; ++d) target[d] = to_float(source[d]) * scale;
    for (int64_t d = head_dim; d < padded; ++d) target[d] = 0;
  }
}

// tile [count][padded] transposed to [head_dim][kQueryTile], zero from `count` up to the next whole vector.
template <class A>
void transpose_tile(const A* tile, int64_t count, int64_t head_dim, int64_t padded, A* transposed) {
  const int64_t width = round_up(count, kLanes<A>);
  for (int64_t d = 0; d < head_dim; ++d) {
    A* target = transposed + d * kQueryTile;
    for (int64_t i = 0; i < count; ++i) target[i] = tile[i * padded + d];
    for (int64_t i = count; i < width; ++i) target[i] = 0;
  }
}

template <class A, class M>
inline A mask_term(M value) {
  if constexpr (std::is_integral_v<M>) {
    return value ? A(0) : -std::numeric_limits<A>::infinity();
  } else {
    return static_cast<A>(to_float(value));
  }
}

// Adds the mask to scores [keys][kQueryTile].
template <class A, class M>
void add_mask_typed(const Mask& mask, int64_t b, int64_t h, int64_t i0, int64_t j0, int64_t queries, int64_t keys, A* scores) {
  const M* origin = static_cast<const M*>(mask.data) + b * mask.strides[0] + h * mask.strides[1] + i0 * mask.strides[2] +
                    j0 * mask.strides[3];
  const int64_t i_stride = mask.strides[2];
  const int64_t j_stride = mask.strides[3];
  if (i_stride == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      const A term = mask_term<A>(origin[j * j_stride]);
      for (int64_t i = 0; i < queries; ++i) scores[j * kQueryTile + i] += term;
    }
    return;
  }
  constexpr int64_t block = 16;
  for (int64_t jb = 0; jb < keys; jb += block) {
    const int64_t j_end = std::min(jb + block, keys);
    for (int64_t i = 0; i < queries; ++i) {
      const M* row = origin + i * i_stride;
      for (int64_t j = jb; j < j_end; ++j) scores[j * kQueryTile + i] += mask_term<A>(row[j * j_stride]);
    }
  }
}

template <class A>
void add_mask(const Params& p, int64_t bh, int64_t i0, int64_t j0, int64_t queries, int64_t keys, A* scores) {
  const int64_t b = bh / p.num_heads;
  const int64_t h = bh % p.num_heads;
  const auto add = [&](auto type) { add_mask_typed<A, decltype(type)>(p.mask, b, h, i0, j0, queries, keys, scores); };
  switch (p.mask.dtype) {
    case DType::kFloat32:
      return add(float{});
    case DType::kFloat64:
      return add(double{});
    case DType::kFloat16:
      return add(Float16{});
    case DType::kBFloat16:
      return add(BFloat16{});
    case DType::kBool:
    case DType::kUInt8:
    case DType::kInt8:
      return add(uint8_t{});
    case DType::kInt16:
      return add(int16_t{});
    case DType::kInt32:
      return add(int32_t{});
    case DType::kInt64:
      return add(int64_t{});
  }
}

// The keys that queries [i0, i0 + queries) may see.
inline int64_t visible_keys(const Params& p, int64_t i0, int64_t queries) {
  return p.causal ? std::min(p.seq_len, i0 + queries) : p.seq_len;
}

// scores [keys][kQueryTile] = k @ q^T + mask; `key_tile` is [keys][padded], `query_transposed` [head_dim][kQueryTile], scaled.
template <class A>
void score_tile(const Params& p, int64_t bh, int64_t i0, int64_t j0, int64_t queries, int64_t keys, const A* key_tile,
                int64_t padded, const A* query_transposed, A* scores) {
  const int64_t width = round_up(queries, kLanes<A>);
  micro_gemm<A>(keys, width, p.head_dim, {key_tile, padded, 1}, query_transposed, kQueryTile, scores, kQueryTile, false);
  if (p.mask.data) add_mask(p, bh, i0, j0, queries, keys, scores);
  if (p.causal && j0 + keys - 1 > i0) {
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t hidden = std::min(std::max<int64_t>(j0 + j - i0, 0), width);
      for (int64_t i = 0; i < hidden; ++i) scores[j * kQueryTile + i] = -std::numeric_limits<A>::infinity();
    }
  }
}

// keep [keys][kQueryTile] = scale where the element is kept, else 0. i0 is a multiple of 32 and j0 of 16.
template <class A>
void keep_tile(const Params& p, PhiloxState state, int64_t bh, int64_t i0, int64_t j0, int64_t queries, int64_t keys, A* keep) {
  constexpr int lanes = kLanes<uint32_t>;
  constexpr int chunk = lanes < 8 ? lanes : 8;  // lanes of consecutive queries
  const uint32_t threshold = p.attn_dropout.threshold;
  const A scale = static_cast<A>(p.attn_dropout.scale);
  const auto head = static_cast<uint32_t>(bh / p.num_heads * p.heads_in_all() + p.first_head + bh % p.num_heads);
  const int64_t row_groups = round_up(queries, 16) / 2;
  for (int64_t j = 0; j < keys; j += 16) {
    for (int t = 0; t < 4; ++t) {
      const uint32_t c0 = static_cast<uint32_t>((j0 + j) / 16 * 4 + t);
      for (int64_t group = 0; group < row_groups; group += lanes) {
        const Vec<uint32_t> c1 = lane_numbers() + static_cast<uint32_t>(i0 / 2 + group);
        const PhiloxVectors words = philox_vector(state, broadcast(c0), c1, head);
        for (int word = 0; word < 4; ++word) {
          for (int half = 0; half < 2; ++half) {
            const int64_t column = j + 8 * (word % 2) + 2 * t + half;
            if (column >= keys) continue;
            A factors[lanes];
            store_keep(words.w[word], half, threshold, scale, factors);
            for (int first = 0; first < lanes; first += chunk) {
              const int64_t row = (group + first) / 8 * 16 + (group + first) % 8 + 8 * (word / 2);
              std::memcpy(keep + column * kQueryTile + row, factors + first, chunk * sizeof(A));
            }
          }
        }
      }
    }
  }
}

}  // namespace pfa::cpu::PFA_ISA
