// Attention without tensor cores: for float32, float64 and devices before compute capability 8.0, any head dim up to
// 256.
//
// A block of 16 x 16 threads owns a square tile of scores. Head dims are walked in chunks, so shared memory does not
// grow with them; thread (ty, tx) holds rows ty + 16 r and columns tx + 16 c of the tile, and rows ty + 16 r of the
// sums over keys.
#pragma once

#include "core/cuda/attention/common.cuh"

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

template <class T, class Acc, int kWidth>
__device__ void load_rows(Acc* to, int to_stride, const T* from, int64_t from_stride, int row0, int rows, int d0,
                          int head_dim) {
  for (int i = threadIdx.x; i < Tile<Acc>::kRows * kWidth; i += kThreads) {
    const int row = i / kWidth;
    const int d = d0 + i % kWidth;
    const bool inside = row0 + row < rows && d < head_dim;
    to[row * to_stride + i % kWidth] = inside ? widen(from[(row0 + row) * from_stride + d]) : Acc(0);
  }
}

// result[r][c] = sum over d of a[a0 + ty + 16 r][d] * b[b0 + tx + 16 c][d]
template <class T, class Acc>
__device__ void dot_rows(Tile<Acc>& tile, Square<Acc>& result, const T* a, int64_t a_stride, int a0, const T* b,
                         int64_t b_stride, int b0, const AttentionArgs& args) {
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
  for (int d0 = 0; d0 < args.head_dim; d0 += Shape::kDotChunk) {
    __syncthreads();
    load_rows<T, Acc, Shape::kDotChunk>(as, Shape::kDotStride, a, a_stride, a0, args.seq_len, d0, args.head_dim);
    load_rows<T, Acc, Shape::kDotChunk>(bs, Shape::kDotStride, b, b_stride, b0, args.seq_len, d0, args.head_dim);
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

// sums[r][4 chunk + e] += sum over j of tile.scores[ty + 16 r][j] * b[b0 + j][chunk * 64 + sum_column(e)]
template <class T, class Acc, int kHeadDim>
__device__ void sum_rows(Tile<Acc>& tile, Acc (&sums)[Tile<Acc>::kPerThread][kHeadDim / 16], const T* b,
                         int64_t b_stride, int b0, const AttentionArgs& args) {
  using Shape = Tile<Acc>;
  constexpr int kN = Shape::kPerThread;
  constexpr int kV = Shape::kVector;
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
#pragma unroll
  for (int chunk = 0; chunk < kHeadDim / Shape::kSumChunk; ++chunk) {
    __syncthreads();
    load_rows<T, Acc, Shape::kSumChunk>(tile.operand, Shape::kSumStride, b, b_stride, b0, args.seq_len,
                                        chunk * Shape::kSumChunk, args.head_dim);
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

template <class T, class Acc, int kHeadDim>
__device__ void store_sums(T* to, int64_t stride, int row0, Acc (&sums)[Tile<Acc>::kPerThread][kHeadDim / 16],
                           const Acc (&factor)[Tile<Acc>::kPerThread], const AttentionArgs& args) {
#pragma unroll
  for (int r = 0; r < Tile<Acc>::kPerThread; ++r) {
    const int row = row0 + threadIdx.x / 16 + 16 * r;
    if (row >= args.seq_len) continue;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const int d = i / 4 * Tile<Acc>::kSumChunk + sum_column<Acc>(i % 4);
      if (d < args.head_dim) to[row * stride + d] = narrow<T>(sums[r][i] * factor[r]);
    }
  }
}

// Turns the product q . k of element (i, j) into its score in log2 units; -inf where j is not to be seen.
template <class Acc>
__device__ __forceinline__ Acc score_log2(const AttentionArgs& args, const HeadIndex& h, Acc product, int i, int j) {
  if (i >= args.seq_len || j >= args.seq_len || (args.causal && j > i)) return -infinity<Acc>();
  const Acc scale = static_cast<Acc>(args.score_scale * kLog2e);
  if (!args.mask.data) return scaled(product, scale);
  const int64_t* s = args.mask.strides;
  const int64_t index = h.batch * s[0] + h.head * s[1] + i * s[2] + j * s[3];
  Acc score;
  with_mask_elements(args.mask,
                     [&](const auto* elements) { score = fma(product, scale, mask_log2<Acc>(elements[index])); });
  return score;
}

template <class T, class Acc, int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_forward_plain(AttentionArgs args) {
  if constexpr (kServes<T>) {
    using Shape = Tile<Acc>;
    constexpr int kN = Shape::kPerThread;
    __shared__ Shape tile;
    const int tiles = (args.seq_len + Shape::kRows - 1) / Shape::kRows;
    const HeadIndex h = head_index(args, blockIdx.x / tiles);
    const int row0 = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Shape::kRows;
    write_random_state(args);
    const int64_t stride = args.token_stride();
    T* qkv = static_cast<T*>(const_cast<void*>(args.qkv));
    const T* q = qkv_head<T>(args, qkv, h, 0);
    const T* k = qkv_head<T>(args, qkv, h, 1);
    const T* v = qkv_head<T>(args, qkv, h, 2);
    const int ty = threadIdx.x / 16;
    const int tx = threadIdx.x % 16;
    PhiloxState philox_key{};
    if (args.drops) philox_key = forward_philox(args);

    Acc sums[kN][kHeadDim / 16];
    Acc maximum[kN], total[kN];
#pragma unroll
    for (int r = 0; r < kN; ++r) {
      maximum[r] = -infinity<Acc>();
      total[r] = 0;
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) sums[r][i] = 0;
    }

    const int end = args.causal ? min(args.seq_len, row0 + Shape::kRows) : args.seq_len;
    for (int col0 = 0; col0 < end; col0 += Shape::kRows) {
      Square<Acc> s;
      dot_rows(tile, s, q, stride, row0, k, stride, col0, args);
#pragma unroll
      for (int r = 0; r < kN; ++r) {
        const int i = row0 + ty + 16 * r;
        Acc top = maximum[r];
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          s[r][c] = score_log2(args, h, s[r][c], i, col0 + tx + 16 * c);
          top = max(top, s[r][c]);
        }
#pragma unroll
        for (int lane = 8; lane > 0; lane /= 2) top = max(top, __shfl_xor_sync(0xFFFFFFFFu, top, lane));
        const Acc base = top == -infinity<Acc>() ? Acc(0) : top;
        const Acc correction = exp2_of(maximum[r] - base);
        maximum[r] = top;
        total[r] *= correction;
#pragma unroll
        for (int e = 0; e < kHeadDim / 16; ++e) sums[r][e] *= correction;
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          const int j = col0 + tx + 16 * c;
          Acc probability = exp2_of(s[r][c] - base);
          total[r] += probability;
          if (args.drops && (attention_random(philox_key, h.random, i, j) << 16) <= args.drop_limit) probability = 0;
          tile.scores[(ty + 16 * r) * Shape::kScoreStride + tx + 16 * c] = probability;
        }
      }
      sum_rows<T, Acc, kHeadDim>(tile, sums, v, stride, col0, args);
    }

    Acc factor[kN];
#pragma unroll
    for (int r = 0; r < kN; ++r) {
#pragma unroll
      for (int lane = 8; lane > 0; lane /= 2) total[r] += __shfl_xor_sync(0xFFFFFFFFu, total[r], lane);
      factor[r] = total[r] > 0 ? static_cast<Acc>(args.drop_scale) / total[r] : Acc(0);
      const int row = row0 + ty + 16 * r;
      if (tx == 0) store_row_statistics(args, h.flat, row, maximum[r], total[r]);
    }
    store_sums<T, Acc, kHeadDim>(out_head<T>(args, args.out, h), args.heads_dim(), row0, sums, factor, args);
  }
}

// From the products q . k and d_out . v of element (i, j): `sum_p`, what d_out is weighted with in d_v (less
// drop_scale), and `d_score`, the gradient of the score.
template <class Acc>
__device__ __forceinline__ void score_gradient(const AttentionArgs& args, const HeadIndex& h, PhiloxState philox_key,
                                               int i, int j, Acc lse2, Acc shift2, Acc delta, Acc product,
                                               Acc d_product, Acc& sum_p, Acc& d_score) {
  const Acc p = exp2_of(min(score_log2(args, h, product, i, j) - shift2 - lse2, Acc(0)));
  const bool kept = !args.drops || (attention_random(philox_key, h.random, i, j) << 16) > args.drop_limit;
  sum_p = kept ? p : Acc(0);
  d_score = p * ((kept ? d_product * static_cast<Acc>(args.drop_scale) : Acc(0)) - delta);
}

// d_k and d_v of a tile of keys: rows of the tile are keys, columns are queries.
template <class T, class Acc, int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_backward_kv_plain(AttentionArgs args) {
  if constexpr (kServes<T>) {
    using Shape = Tile<Acc>;
    constexpr int kN = Shape::kPerThread;
    __shared__ Shape tile;
    const int tiles = (args.seq_len + Shape::kRows - 1) / Shape::kRows;
    const HeadIndex h = head_index(args, blockIdx.x / tiles);
    const int key0 = static_cast<int>(blockIdx.x % tiles) * Shape::kRows;
    const int64_t stride = args.token_stride();
    T* qkv = static_cast<T*>(const_cast<void*>(args.qkv));
    const T* q = qkv_head<T>(args, qkv, h, 0);
    const T* k = qkv_head<T>(args, qkv, h, 1);
    const T* v = qkv_head<T>(args, qkv, h, 2);
    const T* d_out = out_head<T>(args, const_cast<void*>(args.d_out), h);
    const Acc* lse2 = static_cast<const Acc*>(args.lse2) + h.flat * static_cast<int64_t>(args.rows_padded);
    const Acc* delta = static_cast<const Acc*>(args.delta) + h.flat * static_cast<int64_t>(args.rows_padded);
    const Acc* shift2 = static_cast<const Acc*>(args.shift2) + h.flat * static_cast<int64_t>(args.rows_padded);
    const int ty = threadIdx.x / 16;
    const int tx = threadIdx.x % 16;
    PhiloxState philox_key{};
    if (args.drops) philox_key = backward_philox(args);

    Acc dk[kN][kHeadDim / 16] = {};
    Acc dv[kN][kHeadDim / 16] = {};
    for (int row0 = args.causal ? key0 : 0; row0 < args.seq_len; row0 += Shape::kRows) {
      Square<Acc> s, dp;
      dot_rows(tile, s, k, stride, key0, q, stride, row0, args);
      dot_rows(tile, dp, v, stride, key0, d_out, args.heads_dim(), row0, args);
#pragma unroll
      for (int r = 0; r < kN; ++r) {
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          const int i = row0 + tx + 16 * c;
          Acc sum_p = 0;
          Acc d_score = 0;
          if (i < args.seq_len) {
            score_gradient(args, h, philox_key, i, key0 + ty + 16 * r, lse2[i], shift2[i], delta[i], s[r][c], dp[r][c],
                           sum_p, d_score);
          }
          dp[r][c] = d_score;
          tile.scores[(ty + 16 * r) * Shape::kScoreStride + tx + 16 * c] = sum_p;
        }
      }
      sum_rows<T, Acc, kHeadDim>(tile, dv, d_out, args.heads_dim(), row0, args);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kN; ++r) {
#pragma unroll
        for (int c = 0; c < kN; ++c) tile.scores[(ty + 16 * r) * Shape::kScoreStride + tx + 16 * c] = dp[r][c];
      }
      sum_rows<T, Acc, kHeadDim>(tile, dk, q, stride, row0, args);
    }

    Acc factor[kN];
#pragma unroll
    for (int r = 0; r < kN; ++r) factor[r] = static_cast<Acc>(args.score_scale);
    store_sums<T, Acc, kHeadDim>(qkv_head<T>(args, args.d_qkv, h, 1), stride, key0, dk, factor, args);
#pragma unroll
    for (int r = 0; r < kN; ++r) factor[r] = static_cast<Acc>(args.drop_scale);
    store_sums<T, Acc, kHeadDim>(qkv_head<T>(args, args.d_qkv, h, 2), stride, key0, dv, factor, args);
  }
}

// d_q of a tile of queries.
template <class T, class Acc, int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_backward_q_plain(AttentionArgs args) {
  if constexpr (kServes<T>) {
    using Shape = Tile<Acc>;
    constexpr int kN = Shape::kPerThread;
    __shared__ Shape tile;
    const int tiles = (args.seq_len + Shape::kRows - 1) / Shape::kRows;
    const HeadIndex h = head_index(args, blockIdx.x / tiles);
    const int row0 = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Shape::kRows;
    const int64_t stride = args.token_stride();
    T* qkv = static_cast<T*>(const_cast<void*>(args.qkv));
    const T* q = qkv_head<T>(args, qkv, h, 0);
    const T* k = qkv_head<T>(args, qkv, h, 1);
    const T* v = qkv_head<T>(args, qkv, h, 2);
    const T* d_out = out_head<T>(args, const_cast<void*>(args.d_out), h);
    const int64_t statistics = h.flat * static_cast<int64_t>(args.rows_padded);
    const int ty = threadIdx.x / 16;
    const int tx = threadIdx.x % 16;
    PhiloxState philox_key{};
    if (args.drops) philox_key = backward_philox(args);

    Acc dq[kN][kHeadDim / 16] = {};
    Acc lse2[kN], shift2[kN], delta[kN];
#pragma unroll
    for (int r = 0; r < kN; ++r) {
      const int row = row0 + ty + 16 * r;
      lse2[r] = row < args.seq_len ? static_cast<const Acc*>(args.lse2)[statistics + row] : infinity<Acc>();
      shift2[r] = row < args.seq_len ? static_cast<const Acc*>(args.shift2)[statistics + row] : Acc(0);
      delta[r] = row < args.seq_len ? static_cast<const Acc*>(args.delta)[statistics + row] : Acc(0);
    }
    const int end = args.causal ? min(args.seq_len, row0 + Shape::kRows) : args.seq_len;
    for (int col0 = 0; col0 < end; col0 += Shape::kRows) {
      Square<Acc> s, dp;
      dot_rows(tile, s, q, stride, row0, k, stride, col0, args);
      dot_rows(tile, dp, d_out, args.heads_dim(), row0, v, stride, col0, args);
#pragma unroll
      for (int r = 0; r < kN; ++r) {
#pragma unroll
        for (int c = 0; c < kN; ++c) {
          Acc sum_p, d_score;
          score_gradient(args, h, philox_key, row0 + ty + 16 * r, col0 + tx + 16 * c, lse2[r], shift2[r], delta[r],
                         s[r][c], dp[r][c], sum_p, d_score);
          tile.scores[(ty + 16 * r) * Shape::kScoreStride + tx + 16 * c] = d_score;
        }
      }
      sum_rows<T, Acc, kHeadDim>(tile, dq, k, stride, col0, args);
    }
    Acc factor[kN];
#pragma unroll
    for (int r = 0; r < kN; ++r) factor[r] = static_cast<Acc>(args.score_scale);
    store_sums<T, Acc, kHeadDim>(qkv_head<T>(args, args.d_qkv, h, 0), stride, row0, dq, factor, args);
  }
}

}  // namespace plain
}  // namespace cuda
}  // namespace pfa
