// Attention without tensor cores: for float32, float64 and devices before compute capability 8.0, any head dim up to
// 256.
//
// A thread block of 16 x 16 owns a square tile of scores. Head dims are walked in chunks, so shared memory does not
// grow with them; thread (ty, tx) holds rows ty + 16 r and columns tx + 16 c of the tile, and rows ty + 16 r of the
// sums over keys. kGeneral kernels know packed sequences, heads of keys that several heads of queries read, and ranges
// of hidden queries.
#pragma once

#include "core/cuda/attention/hidden_ranges.cuh"
#include "core/cuda/attention/score_gradient.cuh"
#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {
namespace plain {

constexpr int kThreads = 256;

// Devices with tensor cores for T run other kernels: these are left empty, which makes builds shorter.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <class T>
constexpr bool kServes = sizeof(T) != 2;
#else
template <class T>
constexpr bool kServes = true;
#endif

template <class Acc>
struct Tile {
  static constexpr int kPerThread = sizeof(Acc) == 8 ? 2 : 4;
  static constexpr int kRows = 16 * kPerThread;
  static constexpr int kVector = 16 / sizeof(Acc);
  static constexpr int kDotChunk = 32;  // head dims per step of a product over head dims
  static constexpr int kDotStride = kDotChunk + kVector;
  static constexpr int kSumChunk = 64;  // head dims per step of a sum over keys or queries
  static constexpr int kSumStride = kSumChunk + kVector;
  static constexpr int kScoreStride = kRows + kVector;

  alignas(16) Acc operand[2 * kRows * kDotStride > kRows* kSumStride ? 2 * kRows * kDotStride : kRows * kSumStride];
  alignas(16) Acc scores[kRows * kScoreStride];
};

template <class Acc>
using Square = Acc[Tile<Acc>::kPerThread][Tile<Acc>::kPerThread];

// to[row][0..kWidth - 1] = rows row0.. of `from`, head dims d0..; zeros past the last row and head dim.
template <class T, class Acc, int kWidth>
__device__ void load_rows(Acc* to, int to_stride, const HeadRows<const T>& from, int row0, int rows, int d0,
                          int head_dim) {
  for (int i = threadIdx.x; i < Tile<Acc>::kRows * kWidth; i += kThreads) {
    const int row = i / kWidth;
    const int d = d0 + i % kWidth;
    const bool inside = row0 + row < rows && d < head_dim;
    to[row * to_stride + i % kWidth] = inside ? widen(from.row(row0 + row)[d]) : Acc(0);
  }
}

// Some rows of a head: those from `first` on, of `count` in all.
template <class T>
struct RowSpan {
  const HeadRows<const T>& rows;
  int first;
  int count;
};

// result[r][c] = sum over d of a[ty + 16 r][d] * b[tx + 16 c][d]
template <class T, class Acc>
__device__ void dot_rows(Tile<Acc>& tile, Square<Acc>& result, const RowSpan<T>& a, const RowSpan<T>& b, int head_dim) {
  using Shape = Tile<Acc>;
  constexpr int kN = Shape::kPerThread;
  constexpr int kV = Shape::kVector;
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
  Acc* as = tile.operand;
  Acc* bs = tile.operand + Shape::kRows * Shape::kDotStride;
#pragma unroll
  for (int r = 0; r < kN; ++r) {
#pragma unroll
    for (int c = 0; c < kN; ++c) result[r][c] = 0;
  }
  for (int d0 = 0; d0 < head_dim; d0 += Shape::kDotChunk) {
    __syncthreads();
    load_rows<T, Acc, Shape::kDotChunk>(as, Shape::kDotStride, a.rows, a.first, a.count, d0, head_dim);
    load_rows<T, Acc, Shape::kDotChunk>(bs, Shape::kDotStride, b.rows, b.first, b.count, d0, head_dim);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < Shape::kDotChunk; d += kV) {
      Vector<Acc, kV> av[kN], bv[kN];
#pragma unroll
      for (int r = 0; r < kN; ++r) av[r] = load_vector<kV>(&as[(ty + 16 * r) * Shape::kDotStride + d]);
#pragma unroll
      for (int c = 0; c < kN; ++c) bv[c] = load_vector<kV>(&bs[(tx + 16 * c) * Shape::kDotStride + d]);
#pragma unroll
      for (int r = 0; r < kN; ++r) {
#pragma unroll
        for (int c = 0; c < kN; ++c) {
#pragma unroll
          for (int e = 0; e < kV; ++e) result[r][c] += av[r].value[e] * bv[c].value[e];
        }
      }
    }
  }
}

// Head dim that element e of thread tx holds in the sums of a chunk: whole 16-byte vectors, neighbouring threads beside
// each other.
template <class Acc>
__device__ __forceinline__ int sum_column(int e) {
  constexpr int kV = Tile<Acc>::kVector;
  return e / kV * 16 * kV + static_cast<int>(threadIdx.x % 16) * kV + e % kV;
}

// sums[r][4 chunk + e] += sum over j of tile.scores[ty + 16 r][j] * b[j][chunk * 64 + sum_column(e)]
template <class T, class Acc, int kHeadDim>
__device__ void sum_rows(Tile<Acc>& tile, Acc (&sums)[Tile<Acc>::kPerThread][kHeadDim / 16], const RowSpan<T>& b,
                         int head_dim) {
  using Shape = Tile<Acc>;
  constexpr int kN = Shape::kPerThread;
  constexpr int kV = Shape::kVector;
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
#pragma unroll
  for (int chunk = 0; chunk < kHeadDim / Shape::kSumChunk; ++chunk) {
    __syncthreads();
    load_rows<T, Acc, Shape::kSumChunk>(tile.operand, Shape::kSumStride, b.rows, b.first, b.count,
                                        chunk * Shape::kSumChunk, head_dim);
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < Shape::kRows; ++j) {
      Acc p[kN];
#pragma unroll
      for (int r = 0; r < kN; ++r) p[r] = tile.scores[(ty + 16 * r) * Shape::kScoreStride + j];
#pragma unroll
      for (int v = 0; v < 4 / kV; ++v) {
        const Vector<Acc, kV> bv = load_vector<kV>(&tile.operand[j * Shape::kSumStride + (v * 16 + tx) * kV]);
#pragma unroll
        for (int r = 0; r < kN; ++r) {
#pragma unroll
          for (int e = 0; e < kV; ++e) sums[r][4 * chunk + v * kV + e] += p[r] * bv.value[e];
        }
      }
    }
  }
}

// Writes rows row0 + ty + 16 r below `rows` of the sums, times a factor for each.
template <class T, class Acc, int kHeadDim>
__device__ void store_sums(const HeadRows<T>& to, int row0, int rows, int head_dim,
                           const Acc (&sums)[Tile<Acc>::kPerThread][kHeadDim / 16],
                           const Acc (&factor)[Tile<Acc>::kPerThread]) {
#pragma unroll
  for (int r = 0; r < Tile<Acc>::kPerThread; ++r) {
    const int row = row0 + threadIdx.x / 16 + 16 * r;
    if (row >= rows) continue;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const int d = i / 4 * Tile<Acc>::kSumChunk + sum_column<Acc>(i % 4);
      if (d < head_dim) to.row(row)[d] = narrow<T>(sums[r][i] * factor[r]);
    }
  }
}

// The same with one factor.
template <class T, class Acc, int kHeadDim>
__device__ void store_sums(const HeadRows<T>& to, int row0, int rows, int head_dim,
                           const Acc (&sums)[Tile<Acc>::kPerThread][kHeadDim / 16], double factor) {
  Acc factors[Tile<Acc>::kPerThread];
#pragma unroll
  for (int r = 0; r < Tile<Acc>::kPerThread; ++r) factors[r] = static_cast<Acc>(factor);
  store_sums<T, Acc, kHeadDim>(to, row0, rows, head_dim, sums, factors);
}

// What is hidden of a tile by ranges; nothing where there are none.
template <class Acc, bool kGeneral>
__device__ __forceinline__ Hidden hidden_of(const HeadState& head, int row0, int col0) {
  constexpr int kRows = Tile<Acc>::kRows;
  return kGeneral && head.ranges.data ? hidden_of_tile<kRows>(head, row0, row0 + kRows, col0) : Hidden::kNothing;
}

// The score of query i and key j in units of log2, from their product; -inf where j is not to be seen.
template <class Acc, bool kGeneral>
__device__ __forceinline__ Acc score_log2(const AttentionArgs& args, const HeadState& head, Hidden hidden, Acc product,
                                          int i, int j) {
  const Visibility<int>& visibility = head_visibility<kGeneral>(args, head);
  if (i >= visibility.queries || !visibility.sees(i, j)) return -infinity<Acc>();
  if (kGeneral && hidden != Hidden::kNothing && is_hidden(head, i, j)) return -infinity<Acc>();
  const Acc scale = static_cast<Acc>(args.score_scale * kLog2e);
  if (!args.mask.data) return scaled(product, scale);
  const int64_t index = head.mask_offset + i * args.mask.strides[2] + j * args.mask.strides[3];
  Acc score;
  with_mask_elements(args.mask,
                     [&](const auto* elements) { score = fma(product, scale, mask_log2<Acc>(elements[index])); });
  return score;
}

// Whether dropout keeps the element of query i and key j.
__device__ __forceinline__ bool keeps(const AttentionArgs& args, const HeadState& head, int i, int j) {
  return !args.drops || (attention_random(head.philox_key, head.index.dropout_head, i, j) << 16) > args.drop_limit;
}

template <class T, class Acc, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kThreads) attention_forward_plain(ForwardArgs args) {
  if constexpr (kServes<T>) {
    using Shape = Tile<Acc>;
    constexpr int kN = Shape::kPerThread;
    __shared__ Shape tile;
    write_random_state(args);
    const TileIndex index = tile_of_block<Shape::kRows>(args.visibility.queries, true);
    const ForwardHead<T> head = forward_head<T, kGeneral>(args, index.head, args.drops);
    const int queries = head.visibility.queries;
    const int keys = head.visibility.keys;
    const int row0 = index.first;
    const int ty = threadIdx.x / 16;
    const int tx = threadIdx.x % 16;
    if (kGeneral && row0 >= queries) return;

    Acc sums[kN][kHeadDim / 16] = {};
    RowSoftmax<Acc> rows[kN];
    const Range<int> walk = head.visibility.keys_of(row0, row0 + Shape::kRows);
    for (int col0 = walk.first / Shape::kRows * Shape::kRows; col0 < walk.end; col0 += Shape::kRows) {
      const Hidden hidden = hidden_of<Acc, kGeneral>(head, row0, col0);
      if (hidden == Hidden::kAll) continue;
      Square<Acc> s;
      dot_rows<T, Acc>(tile, s, {head.q, row0, queries}, {head.k, col0, keys}, args.head_dim());
#pragma unroll
      for (int r = 0; r < kN; ++r) {
        const int i = row0 + ty + 16 * r;
        Acc highest = -infinity<Acc>();
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          s[r][c] = score_log2<Acc, kGeneral>(args, head, hidden, s[r][c], i, col0 + tx + 16 * c);
          highest = max(highest, s[r][c]);
        }
#pragma unroll
        for (int lane = 8; lane > 0; lane /= 2) highest = max(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, lane));
        Acc correction;
        const Acc base = rows[r].raise(highest, correction);
        rows[r].total *= correction;
#pragma unroll
        for (int e = 0; e < kHeadDim / 16; ++e) sums[r][e] *= correction;
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          const Acc p = exp2_of(s[r][c] - base);
          rows[r].total += p;
          const bool kept = keeps(args, head, i, col0 + tx + 16 * c);
          tile.scores[(ty + 16 * r) * Shape::kScoreStride + tx + 16 * c] = kept ? p : Acc(0);
        }
      }
      sum_rows<T, Acc, kHeadDim>(tile, sums, {head.v, col0, keys}, args.head_dim());
    }

    Acc factor[kN];
#pragma unroll
    for (int r = 0; r < kN; ++r) {
      factor[r] = rows[r].template finish<16>(args, head, row0 + ty + 16 * r);
    }
    store_sums<T, Acc, kHeadDim>(head.out, row0, queries, args.head_dim(), sums, factor);
  }
}

template <class Acc>
struct ElementGradient {
  Acc kept;     // P where dropout keeps it, else 0: what d_out is weighted with in d_v, less drop_scale
  Acc d_score;  // dS
};

// From the products q . k and d_out . v of query i and key j.
template <bool kGeneral, class Acc>
__device__ __forceinline__ ElementGradient<Acc> element_gradient(const BackwardArgs& args, const HeadState& head,
                                                                 Hidden hidden, int i, int j,
                                                                 const RowStatistics<Acc>& row, Acc product,
                                                                 Acc d_product) {
  const Acc score = score_log2<Acc, kGeneral>(args, head, hidden, product, i, j);
  const Acc p = exp2_of(min(score - row.shift2 - row.lse2, Acc(0)));
  const bool kept = keeps(args, head, i, j);
  return {kept ? p : Acc(0),
          score_gradient(p, kept ? d_product : Acc(0), static_cast<Acc>(args.drop_scale), row.delta)};
}

// result[r][c] = the gradient of the weight of the query and the key that row0 + ty + 16 r and col0 + tx + 16 c are.
template <class T, class Acc, bool kRowsAreKeys>
__device__ __forceinline__ void load_weight_gradient(const BackwardArgs& args, const HeadState& head,
                                                     Square<Acc>& result, int row0, int col0) {
  constexpr int kN = Tile<Acc>::kPerThread;
  const int queries = args.visibility.queries;
  const int keys = args.visibility.keys;
  const T* gradients = static_cast<const T*>(args.d_weights) + head.index.flat * queries * int64_t{keys};
#pragma unroll
  for (int r = 0; r < kN; ++r) {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      const int row = row0 + static_cast<int>(threadIdx.x / 16) + 16 * r;
      const int column = col0 + static_cast<int>(threadIdx.x % 16) + 16 * c;
      const int i = kRowsAreKeys ? column : row;
      const int j = kRowsAreKeys ? row : column;
      result[r][c] = i < queries && j < keys ? widen(gradients[i * int64_t{keys} + j]) : Acc(0);
    }
  }
}

// d_k and d_v of a tile of keys, from all heads of queries that read it: rows of the tile are keys, columns are
// queries. kOfWeights: d_k from the gradient of the weights, in any dtype on any device.
template <class T, class Acc, int kHeadDim, bool kGeneral, bool kOfWeights = false>
__global__ void __launch_bounds__(kThreads) attention_backward_kv_plain(BackwardArgs args) {
  if constexpr (kServes<T> || kOfWeights) {
    using Shape = Tile<Acc>;
    constexpr int kN = Shape::kPerThread;
    __shared__ Shape tile;
    const TileIndex index = tile_of_block<Shape::kRows>(args.visibility.keys, false);
    const int key0 = index.first;
    const int ty = threadIdx.x / 16;
    const int tx = threadIdx.x % 16;

    Acc dk[kN][kHeadDim / 16] = {};
    Acc dv[kN][kHeadDim / 16] = {};
    const uint32_t group = kGeneral ? static_cast<uint32_t>(args.layout.group) : 1;
    for (uint32_t member = 0; member < group; ++member) {
      const BackwardHead<T, Acc> head = backward_head<T, Acc, kGeneral>(args, index.head * group + member, args.drops);
      const int queries = head.visibility.queries;
      const int keys = head.visibility.keys;
      if (kGeneral && key0 >= keys) return;
      Range<int> walk = head.visibility.queries_of(key0, key0 + Shape::kRows);
      if (kGeneral && head.ranges.data) walk = seeing_queries<Shape::kRows>(head, walk, key0);
      for (int row0 = walk.first / Shape::kRows * Shape::kRows; row0 < walk.end; row0 += Shape::kRows) {
        const Hidden hidden = hidden_of<Acc, kGeneral>(head, row0, key0);
        if (hidden == Hidden::kAll) continue;
        Square<Acc> s, dp;
        dot_rows<T, Acc>(tile, s, {head.k, key0, keys}, {head.q, row0, queries}, args.head_dim());
        if constexpr (kOfWeights) {
          load_weight_gradient<T, Acc, true>(args, head, dp, key0, row0);
        } else {
          dot_rows<T, Acc>(tile, dp, {head.v, key0, keys}, {head.d_out, row0, queries}, args.head_dim());
        }
#pragma unroll
        for (int r = 0; r < kN; ++r) {
#pragma unroll
          for (int c = 0; c < kN; ++c) {
            const int i = row0 + tx + 16 * c;
            const auto gradient = element_gradient<kGeneral>(args, head, hidden, i, key0 + ty + 16 * r,
                                                             head.statistics(i), s[r][c], dp[r][c]);
            dp[r][c] = gradient.d_score;
            tile.scores[(ty + 16 * r) * Shape::kScoreStride + tx + 16 * c] = gradient.kept;
          }
        }
        if constexpr (!kOfWeights) {
          sum_rows<T, Acc, kHeadDim>(tile, dv, {head.d_out, row0, queries}, args.head_dim());
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kN; ++r) {
#pragma unroll
          for (int c = 0; c < kN; ++c) tile.scores[(ty + 16 * r) * Shape::kScoreStride + tx + 16 * c] = dp[r][c];
        }
        sum_rows<T, Acc, kHeadDim>(tile, dk, {head.q, row0, queries}, args.head_dim());
      }
    }
    const BackwardHead<T, Acc> head = backward_head<T, Acc, kGeneral>(args, index.head * group, false);
    const int keys = head.visibility.keys;
    if (args.d_key.data) store_sums<T, Acc, kHeadDim>(head.d_k, key0, keys, args.head_dim(), dk, args.score_scale);
    if (!kOfWeights && args.d_value.data)
      store_sums<T, Acc, kHeadDim>(head.d_v, key0, keys, args.head_dim(), dv, args.drop_scale);
  }
}

// d_q of a tile of queries.
template <class T, class Acc, int kHeadDim, bool kGeneral, bool kOfWeights = false>
__global__ void __launch_bounds__(kThreads) attention_backward_q_plain(BackwardArgs args) {
  if constexpr (kServes<T> || kOfWeights) {
    using Shape = Tile<Acc>;
    constexpr int kN = Shape::kPerThread;
    __shared__ Shape tile;
    const TileIndex index = tile_of_block<Shape::kRows>(args.visibility.queries, true);
    const BackwardHead<T, Acc> head = backward_head<T, Acc, kGeneral>(args, index.head, args.drops);
    const int queries = head.visibility.queries;
    const int keys = head.visibility.keys;
    const int row0 = index.first;
    const int ty = threadIdx.x / 16;
    const int tx = threadIdx.x % 16;
    if (kGeneral && row0 >= queries) return;

    Acc dq[kN][kHeadDim / 16] = {};
    RowStatistics<Acc> rows[kN];
#pragma unroll
    for (int r = 0; r < kN; ++r) rows[r] = head.statistics(row0 + ty + 16 * r);
    const Range<int> walk = head.visibility.keys_of(row0, row0 + Shape::kRows);
    for (int col0 = walk.first / Shape::kRows * Shape::kRows; col0 < walk.end; col0 += Shape::kRows) {
      const Hidden hidden = hidden_of<Acc, kGeneral>(head, row0, col0);
      if (hidden == Hidden::kAll) continue;
      Square<Acc> s, dp;
      dot_rows<T, Acc>(tile, s, {head.q, row0, queries}, {head.k, col0, keys}, args.head_dim());
      if constexpr (kOfWeights) {
        load_weight_gradient<T, Acc, false>(args, head, dp, row0, col0);
      } else {
        dot_rows<T, Acc>(tile, dp, {head.d_out, row0, queries}, {head.v, col0, keys}, args.head_dim());
      }
#pragma unroll
      for (int r = 0; r < kN; ++r) {
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          tile.scores[(ty + 16 * r) * Shape::kScoreStride + tx + 16 * c] =
              element_gradient<kGeneral>(args, head, hidden, row0 + ty + 16 * r, col0 + tx + 16 * c, rows[r], s[r][c],
                                         dp[r][c])
                  .d_score;
        }
      }
      sum_rows<T, Acc, kHeadDim>(tile, dq, {head.k, col0, keys}, args.head_dim());
    }
    store_sums<T, Acc, kHeadDim>(head.d_q, row0, queries, args.head_dim(), dq, args.score_scale);
  }
}

}  // namespace plain
}  // namespace cuda
}  // namespace pfa
