// Attention with mma.sync, ldmatrix and cp.async for float16, bfloat16, and float32 rounded to TF32: compute capability
// 8.0 and later.
//
// Each warp owns 16-row strips of the tile and keeps their scores, probabilities and sums in registers; thread blocks
// share nothing and add to nothing, so results are the same bits each time. kMaskOrDropout kernels know masks, dropout,
// ranges of hidden queries and scales that are not positive; kPacked ones know packed sequences. The others are kept
// lean.
#pragma once

#include "core/cuda/attention/hidden_ranges.cuh"
#include "core/cuda/attention/mma_products.cuh"
#include "core/cuda/attention/residue.cuh"
#include "core/cuda/attention/score_gradient.cuh"

namespace pfa {
namespace cuda {
namespace mma {

// How many numbers of a strip a lane holds, for kColumns columns, in the order of fragments.cuh.
template <int kColumns>
using Strip = float[kColumns / 2];

// The same numbers as the products count them: [kColumns / 8][4].
template <int kColumns>
__device__ __forceinline__ Strip<kColumns>& strip_of(float (&sums)[kColumns / 8][4]) {
  return reinterpret_cast<Strip<kColumns>&>(sums);
}

template <class T, int kHeadDim>
struct ForwardShape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kStrips = kHeadDim <= 128 && !kWide ? 2 : 1;  // of 16 queries, per warp
  static constexpr int kQueries = 16 * kStrips * kWarps;
  static constexpr int kKeys =
      (kHeadDim == 64 || kHeadDim == 192) && !kWide ? 64 : 32;  // what fits in registers beside the sums
  static constexpr size_t kSharedBytes = sizeof(T) * kStride<T, kHeadDim> * (kQueries + 2 * kKeys);
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// From a strip's products of queries and keys to its probabilities after dropout, packed as operands. The sums so far
// are to be multiplied with `correction`.
template <class T, int kKeys, bool kMaskOrDropout, bool kPacked>
__device__ __forceinline__ void probabilities(const ForwardArgs& args, const HeadState& head, int row0, int col0,
                                              bool ranges_hide, StripSoftmax& softmax, float (&correction)[2],
                                              float (&s)[kKeys / 8][4], uint32_t (&p)[kKeys / kDepth<T>][4]) {
  float scale = static_cast<float>(args.score_scale * kLog2e);
  Strip<kKeys>& strip = strip_of<kKeys>(s);
  if (kMaskOrDropout && args.mask.data) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      add_mask<false>(args, head.mask_offset, row0, col0 + 16 * n, scale, reinterpret_cast<float (&)[8]>(s[2 * n]));
    }
    scale = 1.0f;
  } else if (kMaskOrDropout && !(scale > 0.0f)) {
    // The softmax takes the highest product for that of the highest score.
    const float sign = scale < 0.0f ? -1.0f : 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) strip[i] *= sign;
    scale = scale < 0.0f ? -scale : 1.0f;
  }
  hide_scores(head_visibility<kPacked>(args, head), row0, col0, strip);
  if (kMaskOrDropout && ranges_hide) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      if (is_hidden(head, row0 + lane_row(i % 4), col0 + i / 4 * 8 + lane_column(i % 2))) strip[i] = -INFINITY;
    }
  }
  softmax.add_tile<false>(scale, correction, strip);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    float (&piece)[8] = reinterpret_cast<float (&)[8]>(s[2 * n]);
    if (kMaskOrDropout && args.drops) {
      uint32_t numbers[8];
      numbers_by_query(head.philox_key, head.index.dropout_head, row0, col0 + 16 * n, numbers);
#pragma unroll
      for (int e = 0; e < 8; ++e) zero_dropped(piece[e], numbers[e], args.drop_limit);
    }
    pack_piece<T>(&p[16 / kDepth<T> * n], piece);
  }
}

#endif

template <class T, int kHeadDim, bool kMaskOrDropout, bool kPacked>
__global__ void __launch_bounds__(kThreads) attention_forward_mma(ForwardArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  write_random_state(args);
  using Shape = ForwardShape<T, kHeadDim>;
  constexpr int kStrips = Shape::kStrips;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kRow = kStride<T, kHeadDim>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* q_tile = reinterpret_cast<T*>(shared_memory);  // [kQueries][kRow]
  T* k_tile = q_tile + Shape::kQueries * kRow;      // [kKeys][kRow]
  T* v_tile = k_tile + kKeys * kRow;                // [kKeys][kRow]

  const TileIndex index = tile_of_block<Shape::kQueries>(args.visibility.queries, true);
  const ForwardHead<T> head = forward_head<T, kPacked>(args, index.head, kMaskOrDropout && args.drops);
  const int queries = head.visibility.queries;
  const int keys = head.visibility.keys;
  const int row0 = index.first;
  if (kPacked && row0 >= queries) return;
  const int warp_row = threadIdx.x / 32 * 16 * kStrips;

  float sums[kStrips][kHeadDim / 8][4];
  clear(sums);
  StripSoftmax softmax[kStrips];

  const Range<int> walk = head.visibility.keys_of(row0, row0 + Shape::kQueries);
  const auto tile_from = [&](int first) {
    return next_tile<kKeys, kMaskOrDropout>(head, first, walk.end, [&](int col0) {
      return hidden_of_tile<kKeys>(head, row0, row0 + Shape::kQueries, col0);
    });
  };
  WalkTile tile = tile_from(walk.first / kKeys * kKeys);
  copy_rows<T, Shape::kQueries, kHeadDim>(q_tile, head.q, row0, queries, args);
  copy_rows<T, kKeys, kHeadDim>(k_tile, head.k, tile.first, keys, args);
  copies_commit();
  while (tile.first < walk.end) {
    const int col0 = tile.first;
    const WalkTile next = tile_from(col0 + kKeys);
    copies_wait<0>();
    __syncthreads();
    copy_rows<T, kKeys, kHeadDim>(v_tile, head.v, col0, keys, args);
    copies_commit();

    float s[kStrips][kKeys / 8][4];
    clear(s);
    dot_rows<T, kStrips, kKeys, kHeadDim>(s, q_tile + warp_row * kRow, k_tile);

    uint32_t p[kStrips][kKeys / kDepth<T>][4];
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      float correction[2];
      probabilities<T, kKeys, kMaskOrDropout, kPacked>(args, head, row0 + warp_row + 16 * m, col0, tile.hides,
                                                       softmax[m], correction, s[m], p[m]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] *= correction[e / 2];
      }
    }

    copies_wait<0>();
    __syncthreads();
    if (next.first < walk.end) {
      copy_rows<T, kKeys, kHeadDim>(k_tile, head.k, next.first, keys, args);
      copies_commit();
    }
    sum_rows<T, kStrips, kKeys / kDepth<T>, kHeadDim>(sums, p, v_tile);
    tile = next;
  }

  // Results go by way of the queries' place: of a walk without tiles nobody has waited for these.
  copies_wait<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
    const int row = warp_row + 16 * m;
    float factor[2];
    softmax[m].finish(args, head, row0 + row, factor);
    if constexpr (sizeof(T) == 2) {
      const float (&flat)[kHeadDim / 2] = reinterpret_cast<const float (&)[kHeadDim / 2]>(sums[m]);
      store_residues<T, kHeadDim>(args, head, flat, factor, row0 + row, queries);
    }
    store_rows<T, kHeadDim>(sums[m], factor[0], factor[1], q_tile + row * kRow, head.out, row0 + row, queries, args);
  }
#endif
}

template <class T, int kHeadDim>
struct BackwardShape {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(T));
  static constexpr int kOuter = 16 * kWarps;  // keys or queries that a thread block owns
  static constexpr int kInner = kRowBytes <= 128 ? 64 : kRowBytes <= 384 ? 32 : 16;
  static constexpr int kStages = kRowBytes <= 256 ? 2 : 1;
  static constexpr size_t kSharedBytes = sizeof(T) * kStride<T, kHeadDim> * 2 * (kOuter + kStages * kInner);
  static constexpr bool kSplit = kHeadDim > 128;  // d_k and d_v each by a launch: both don't fit in registers
};

// How many thread blocks of attention_backward_q_mma share a multiprocessor, as registers allow.
template <class T, int kHeadDim, bool kMaskOrDropout>
constexpr int kQueryBlocksPerSm = sizeof(T) == 4   ? (kHeadDim <= 64 ? 4 : 3)
                                  : kHeadDim <= 96 ? (kMaskOrDropout ? 3 : 4)
                                                   : (kHeadDim <= 128 && !kMaskOrDropout ? 3 : 2);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// The tiles of a backward kernel: two of kOuter rows that stay, and two of kInner rows, in kStages stages, that follow
// each other along the walk.
template <class T, int kHeadDim>
struct BackwardTiles {
  using Shape = BackwardShape<T, kHeadDim>;
  static constexpr int kRow = kStride<T, kHeadDim>;

  T* outer[2];  // [kOuter][kRow]
  T* inner[2];  // [kStages][kInner][kRow]
  int stage = 0;

  __device__ __forceinline__ explicit BackwardTiles(unsigned char* shared_memory)
      : outer{reinterpret_cast<T*>(shared_memory), reinterpret_cast<T*>(shared_memory) + Shape::kOuter * kRow},
        inner{outer[1] + Shape::kOuter * kRow, outer[1] + (Shape::kOuter + Shape::kStages * Shape::kInner) * kRow} {}

  __device__ __forceinline__ void copy_outer(const HeadRows<const T>& first, const HeadRows<const T>& second, int row0,
                                             int rows, const AttentionArgs& args) {
    copy_rows<T, Shape::kOuter, kHeadDim>(outer[0], first, row0, rows, args);
    copy_rows<T, Shape::kOuter, kHeadDim>(outer[1], second, row0, rows, args);
  }

  __device__ __forceinline__ void copy_inner(const HeadRows<const T>& first, const HeadRows<const T>& second, int row0,
                                             int rows, const AttentionArgs& args) {
    copy_rows<T, Shape::kInner, kHeadDim>(inner[0] + stage * Shape::kInner * kRow, first, row0, rows, args);
    copy_rows<T, Shape::kInner, kHeadDim>(inner[1] + stage * Shape::kInner * kRow, second, row0, rows, args);
    copies_commit();
  }
};

// Applies the mask, and the shifts of the queries if any is large, to the products of queries and keys of a tile, 16
// rows by kColumns * 8 columns; gives what these must still be multiplied with to be in units of log2.
template <bool kMaskOrDropout, bool kRowsAreKeys, int kColumns>
__device__ __forceinline__ float shift_scores(const BackwardArgs& args, const HeadState& head, int row0, int column0,
                                              bool large, const float* shift2, float (&s)[kColumns][4]) {
  const float scale_log2 = static_cast<float>(args.score_scale * kLog2e);
  const bool masked = kMaskOrDropout && args.mask.data;
  if (!masked && !large) return scale_log2;
#pragma unroll
  for (int n = 0; n < kColumns / 2; ++n) {
    float (&piece)[8] = reinterpret_cast<float (&)[8]>(s[2 * n]);
    if (masked) add_mask<kRowsAreKeys>(args, head.mask_offset, row0, column0 + 16 * n, scale_log2, piece);
    if (large) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float shift = shift2[kRowsAreKeys ? 16 * n + lane_column(e) : lane_row(e)];
        piece[e] = masked ? piece[e] - shift : fmaf(piece[e], scale_log2, -shift);
      }
    }
  }
  return 1.0f;
}

// One piece of the gradients. In: `s` scores in units of log2 once multiplied with `scale`, `dp` the products of d_out
// and values. Out: `s` the probabilities that dropout keeps, `dp` the gradients of the scores.
template <bool kMaskOrDropout, bool kPacked, bool kRowsAreKeys>
__device__ __forceinline__ void score_gradients(const BackwardArgs& args, const HeadState& head, float scale, int row0,
                                                int column0, bool hides, bool ranges_hide, const float (&lse2)[4],
                                                const float (&delta)[4], float (&s)[8], float (&dp)[8]) {
  const float drop_scale = static_cast<float>(args.drop_scale);
  uint32_t numbers[8];
  if (kMaskOrDropout && args.drops) {
    if (kRowsAreKeys) {
      numbers_by_key(head.philox_key, head.index.dropout_head, row0, column0, numbers);
    } else {
      numbers_by_query(head.philox_key, head.index.dropout_head, row0, column0, numbers);
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int query = kRowsAreKeys ? e / 4 * 2 + e % 2 : e / 2 % 2;  // which of the lane's queries
    float p = exp2_of(fminf(fmaf(s[e], scale, -lse2[query]), 0.0f));
    if (hides || (kMaskOrDropout && ranges_hide)) {
      const int row = row0 + lane_row(e);
      const int column = column0 + lane_column(e);
      const int i = kRowsAreKeys ? column : row;
      const int j = kRowsAreKeys ? row : column;
      if (!head_visibility<kPacked>(args, head).sees(i, j)) p = 0.0f;
      if (kMaskOrDropout && ranges_hide && is_hidden(head, i, j)) p = 0.0f;
    }
    const bool kept = !kMaskOrDropout || !args.drops || numbers[e] > args.drop_limit;
    dp[e] = score_gradient(p, kept ? dp[e] : 0.0f, drop_scale, delta[query]);
    s[e] = kept ? p : 0.0f;
  }
}

template <class T, int kSteps, int kColumns>
__device__ __forceinline__ void pack_pieces(uint32_t (&to)[1][kSteps][4], const float (&from)[1][kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns / 2; ++n) {
    pack_piece<T>(&to[0][16 / kDepth<T> * n], reinterpret_cast<const float (&)[8]>(from[0][2 * n]));
  }
}

#endif

// d_k (if kKeyGradient) and d_v (if kValueGradient) of a tile of keys; rows are keys. kPackedOrGrouped kernels know
// packed sequences, and heads of keys that several heads of queries read.
template <class T, int kHeadDim, bool kMaskOrDropout, bool kPackedOrGrouped, bool kKeyGradient, bool kValueGradient>
__global__ void __launch_bounds__(kThreads) attention_backward_kv_mma(BackwardArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  using Shape = BackwardShape<T, kHeadDim>;
  constexpr int kQueries = Shape::kInner;
  constexpr int kRow = kStride<T, kHeadDim>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  BackwardTiles<T, kHeadDim> tiles(shared_memory);  // outer: k, v; inner: q, d_out

  const TileIndex index = tile_of_block<Shape::kOuter>(args.visibility.keys, false);
  const uint32_t group = kPackedOrGrouped ? static_cast<uint32_t>(args.layout.group) : 1;
  const auto head_of_group = [&](uint32_t member) {
    return backward_head<T, float, kPackedOrGrouped>(args, index.head * group + member, kMaskOrDropout && args.drops);
  };
  BackwardHead<T, float> head = head_of_group(0);
  const int queries = head.visibility.queries;
  const int keys = head.visibility.keys;
  const int key0 = index.first;
  const int warp_row = threadIdx.x / 32 * 16;
  if (kPackedOrGrouped && key0 >= keys) return;

  float dk[1][kHeadDim / 8][4], dv[1][kHeadDim / 8][4];
  clear(dk);
  clear(dv);

  Range<int> walk = head.visibility.queries_of(key0, key0 + Shape::kOuter);
  if (kMaskOrDropout && head.ranges.data) walk = seeing_queries<Shape::kOuter>(head, walk, key0);
  const auto tile_from = [&](int first) {
    return next_tile<kQueries, kMaskOrDropout>(head, first, walk.end, [&](int row0) {
      return hidden_of_tile<Shape::kOuter>(head, row0, row0 + kQueries, key0);
    });
  };
  const WalkTile first_tile = tile_from(walk.first / kQueries * kQueries);
  tiles.copy_outer(head.k, head.v, key0, keys, args);
  for (uint32_t member = 0; member < group; ++member) {
    if (member > 0) {
      head = head_of_group(member);
      __syncthreads();
    }
    tiles.copy_inner(head.q, head.d_out, first_tile.first, queries, args);
    WalkTile tile = first_tile;
    while (tile.first < walk.end) {
      const int row0 = tile.first;
      const WalkTile next = tile_from(row0 + kQueries);
      copies_wait<0>();
      __syncthreads();
      const T* q_tile = tiles.inner[0] + tiles.stage * kQueries * kRow;
      const T* d_out_tile = tiles.inner[1] + tiles.stage * kQueries * kRow;
      if (Shape::kStages > 1 && next.first < walk.end) {
        tiles.stage ^= 1;
        tiles.copy_inner(head.q, head.d_out, next.first, queries, args);
      }

      float s[1][kQueries / 8][4], dp[1][kQueries / 8][4];
      clear(s);
      clear(dp);
      dot_rows<T, 1, kQueries, kHeadDim>(s, tiles.outer[0] + warp_row * kRow, q_tile);
      if (kKeyGradient) dot_rows<T, 1, kQueries, kHeadDim>(dp, tiles.outer[1] + warp_row * kRow, d_out_tile);
      const bool hides =
          head_visibility<kPackedOrGrouped>(args, head).hides_any(row0, row0 + kQueries, key0, key0 + Shape::kOuter);
      const float scale = shift_scores<kMaskOrDropout, true>(
          args, head, key0 + warp_row, row0, any_large<kQueries>(head.shift2 + row0), head.shift2 + row0, s[0]);
#pragma unroll
      for (int n = 0; n < kQueries / 16; ++n) {
        float lse2[4], delta[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = row0 + 16 * n + lane_column(i / 2 * 4 + i % 2);
          lse2[i] = head.lse2[row];
          delta[i] = head.delta[row];
        }
        score_gradients<kMaskOrDropout, kPackedOrGrouped, true>(
            args, head, scale, key0 + warp_row, row0 + 16 * n, hides, tile.hides, lse2, delta,
            reinterpret_cast<float (&)[8]>(s[0][2 * n]), reinterpret_cast<float (&)[8]>(dp[0][2 * n]));
      }
      if (kValueGradient) {
        uint32_t p[1][kQueries / kDepth<T>][4];
        pack_pieces<T>(p, s);
        sum_rows<T, 1, kQueries / kDepth<T>, kHeadDim>(dv, p, d_out_tile);
      }
      if (kKeyGradient) {
        uint32_t ds[1][kQueries / kDepth<T>][4];
        pack_pieces<T>(ds, dp);
        sum_rows<T, 1, kQueries / kDepth<T>, kHeadDim>(dk, ds, q_tile);
      }
      if (Shape::kStages == 1 && next.first < walk.end) {
        __syncthreads();
        tiles.copy_inner(head.q, head.d_out, next.first, queries, args);
      }
      tile = next;
    }
  }

  copies_wait<0>();
  __syncthreads();
  const float scale = static_cast<float>(args.score_scale);
  const float drop_scale = static_cast<float>(args.drop_scale);
  T* shared = tiles.outer[0] + warp_row * kRow;
  if (kKeyGradient && args.d_key.data) {
    store_rows<T, kHeadDim>(dk[0], scale, scale, shared, head.d_k, key0 + warp_row, keys, args);
  }
  if (kValueGradient && args.d_value.data) {
    store_rows<T, kHeadDim>(dv[0], drop_scale, drop_scale, shared, head.d_v, key0 + warp_row, keys, args);
  }
#endif
}

// d_q of a tile of queries; rows are queries.
template <class T, int kHeadDim, bool kMaskOrDropout, bool kPacked>
__global__ void __launch_bounds__(kThreads, kQueryBlocksPerSm<T, kHeadDim, kMaskOrDropout>)
    attention_backward_q_mma(BackwardArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  using Shape = BackwardShape<T, kHeadDim>;
  constexpr int kKeys = Shape::kInner;
  constexpr int kRow = kStride<T, kHeadDim>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  BackwardTiles<T, kHeadDim> tiles(shared_memory);  // outer: q, d_out; inner: k, v

  const TileIndex index = tile_of_block<Shape::kOuter>(args.visibility.queries, true);
  const BackwardHead<T, float> head = backward_head<T, float, kPacked>(args, index.head, kMaskOrDropout && args.drops);
  const int queries = head.visibility.queries;
  const int keys = head.visibility.keys;
  const int row0 = index.first;
  const int warp_row = threadIdx.x / 32 * 16;
  if (kPacked && row0 >= queries) return;

  float lse2[4] = {}, delta[4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row0 + warp_row + lane_row(2 * i);
    lse2[i] = head.lse2[row];
    delta[i] = head.delta[row];
  }
  const float* shift2 = head.shift2 + row0 + warp_row;
  const bool large = any_large<16>(shift2);
  float dq[1][kHeadDim / 8][4];
  clear(dq);

  const Range<int> walk = head.visibility.keys_of(row0, row0 + Shape::kOuter);
  const auto tile_from = [&](int first) {
    return next_tile<kKeys, kMaskOrDropout>(
        head, first, walk.end, [&](int col0) { return hidden_of_tile<kKeys>(head, row0, row0 + Shape::kOuter, col0); });
  };
  WalkTile tile = tile_from(walk.first / kKeys * kKeys);
  tiles.copy_outer(head.q, head.d_out, row0, queries, args);
  tiles.copy_inner(head.k, head.v, tile.first, keys, args);
  while (tile.first < walk.end) {
    const int col0 = tile.first;
    const WalkTile next = tile_from(col0 + kKeys);
    copies_wait<0>();
    __syncthreads();
    const T* k_tile = tiles.inner[0] + tiles.stage * kKeys * kRow;
    const T* v_tile = tiles.inner[1] + tiles.stage * kKeys * kRow;
    if (Shape::kStages > 1 && next.first < walk.end) {
      tiles.stage ^= 1;
      tiles.copy_inner(head.k, head.v, next.first, keys, args);
    }

    float s[1][kKeys / 8][4], dp[1][kKeys / 8][4];
    clear(s);
    clear(dp);
    dot_rows<T, 1, kKeys, kHeadDim>(s, tiles.outer[0] + warp_row * kRow, k_tile);
    dot_rows<T, 1, kKeys, kHeadDim>(dp, tiles.outer[1] + warp_row * kRow, v_tile);
    const int strip = row0 + warp_row;
    const bool hides = head_visibility<kPacked>(args, head).hides_any(strip, strip + 16, col0, col0 + kKeys);
    const float scale = shift_scores<kMaskOrDropout, false>(args, head, strip, col0, large, shift2, s[0]);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      score_gradients<kMaskOrDropout, kPacked, false>(args, head, scale, strip, col0 + 16 * n, hides, tile.hides, lse2,
                                                      delta, reinterpret_cast<float (&)[8]>(s[0][2 * n]),
                                                      reinterpret_cast<float (&)[8]>(dp[0][2 * n]));
    }
    uint32_t ds[1][kKeys / kDepth<T>][4];
    pack_pieces<T>(ds, dp);
    sum_rows<T, 1, kKeys / kDepth<T>, kHeadDim>(dq, ds, k_tile);
    if (Shape::kStages == 1 && next.first < walk.end) {
      __syncthreads();
      tiles.copy_inner(head.k, head.v, next.first, keys, args);
    }
    tile = next;
  }

  copies_wait<0>();
  __syncthreads();
  const float scale = static_cast<float>(args.score_scale);
  store_rows<T, kHeadDim>(dq[0], scale, scale, tiles.outer[0] + warp_row * kRow, head.d_q, row0 + warp_row, queries,
                          args);
#endif
}

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
