// Attention with mma.sync, ldmatrix and cp.async for float16, bfloat16, and float32 rounded to TF32: compute
// capability 8.0 and later.
//
// Every warp owns 16-row strips of the tile and keeps its scores, probabilities and sums in registers; blocks share
// nothing and add to nothing, so results are the same bits each time. Tiles lie in shared memory with 16 bytes between
// rows, which spreads the eight rows of an ldmatrix over all banks. kGeneral kernels know masks and dropout, the others
// are kept lean.
#pragma once

#include "core/cuda/attention/fragments.cuh"
#include "core/cuda/attention/launch.h"

namespace pfa {
namespace cuda {
namespace tensor {

// Whether float32 may go by TF32 tensor cores, and the kernels are there for the head dim.
inline bool tf32_serves(const Context& context, const AttentionArgs& args) {
  return context.allow_tf32 && args.head_dim <= 128 && tensor_cores_serve(context);
}

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes
template <class T>
constexpr int kDepth = 2 * kVector<T>;  // what one instruction sums over: 16, or 8 in TF32
template <class T, int kHeadDim>
constexpr int kStride = kHeadDim + kVector<T>;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

template <class T>
__device__ __forceinline__ void load_operand(uint32_t (&r)[4], const T* p) {
  load_matrices(r, p);
  if constexpr (std::is_same<T, float>::value) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = round_to_tf32(__uint_as_float(r[i]));
  }
}

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same<T, float>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (std::is_same<T, __half>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Starts copying rows [row0, row0 + kRows) into shared memory; zeros stand for what lies outside of seq_len and
// head_dim.
template <class T, int kRows, int kHeadDim>
__device__ __forceinline__ void copy_rows(T* to, const T* from, int64_t stride, int row0, const AttentionArgs& args) {
  if (args.vectors) {
    constexpr int kVectors = kHeadDim / kVector<T>;
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
      const int row = i / kVectors;
      const int d = i % kVectors * kVector<T>;
      const bool inside = row0 + row < args.seq_len && d < args.head_dim;
      const T* source = inside ? from + (row0 + row) * stride + d : from;
      asm volatile(
          "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to + row * kStride<T, kHeadDim> + d)),
          "l"(source), "r"(inside ? 16 : 0)
          : "memory");
    }
  } else {
    for (int i = threadIdx.x; i < kRows * kHeadDim; i += kThreads) {
      const int row = i / kHeadDim;
      const int d = i % kHeadDim;
      const bool inside = row0 + row < args.seq_len && d < args.head_dim;
      to[row * kStride<T, kHeadDim> + d] = inside ? from[(row0 + row) * stride + d] : narrow<T>(0.0f);
    }
  }
}

// c[m][n] += a[16 m ..][d] * b[8 n ..][d]: both operands in shared memory, rows of head dims.
template <class T, int kStrips, int kColumns, int kHeadDim>
__device__ __forceinline__ void dot_rows(float (&c)[kStrips][kColumns / 8][4], const T* a, const T* b) {
  constexpr int kRow = kStride<T, kHeadDim>;
  const int lane = threadIdx.x % 32;
  const T* a_lane = a + lane % 16 * kRow + lane / 16 * kVector<T>;
  const T* b_lane = b + (lane / 16 * 8 + lane % 8) * kRow + lane / 8 % 2 * kVector<T>;
#pragma unroll
  for (int d = 0; d < kHeadDim; d += kDepth<T>) {
    uint32_t af[kStrips][4];
#pragma unroll
    for (int m = 0; m < kStrips; ++m) load_operand<T>(af[m], a_lane + m * 16 * kRow + d);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t bf[4];
      load_operand<T>(bf, b_lane + n * 16 * kRow + d);
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        mma<T>(c[m][2 * n], af[m], bf[0], bf[1]);
        mma<T>(c[m][2 * n + 1], af[m], bf[2], bf[3]);
      }
    }
  }
}

// Eight numbers of a 16 x 16 piece of accumulators as left operands of one instruction (16 bits) or two (TF32; there
// the lane's neighbouring columns 2 t and 2 t + 1 take the places t and t + 4 of the sum, and sum_rows reads its rows
// in that order).
template <class T>
__device__ __forceinline__ void pack_piece(uint32_t (*to)[4], const float (&from)[8]) {
  if constexpr (std::is_same<T, float>::value) {
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e / 4][e % 2 * 2 + e / 2 % 2] = round_to_tf32(from[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[0][e] = pack<T>(from[2 * e], from[2 * e + 1]);
  }
}

// c[m][n] += a[m][k] * b[kDepth k ..][8 n ..]: a in registers, b in shared memory with head dims as columns.
template <class T, int kStrips, int kSteps, int kHeadDim>
__device__ __forceinline__ void sum_rows(float (&c)[kStrips][kHeadDim / 8][4], const uint32_t (&a)[kStrips][kSteps][4],
                                         const T* b) {
  constexpr int kRow = kStride<T, kHeadDim>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if constexpr (std::is_same<T, float>::value) {
      const T* b_lane = b + (8 * k + lane % 4 * 2) * kRow + lane / 4;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const uint32_t b0 = round_to_tf32(b_lane[8 * n]);
        const uint32_t b1 = round_to_tf32(b_lane[8 * n + kRow]);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) mma<T>(c[m][n], a[m][k], b0, b1);
      }
    } else {
      const T* b_lane = b + (16 * k + lane % 16) * kRow + lane / 16 * 8;
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t bf[4];
        load_matrices_transposed(bf, b_lane + n * 16);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          mma<T>(c[m][2 * n], a[m][k], bf[0], bf[1]);
          mma<T>(c[m][2 * n + 1], a[m][k], bf[2], bf[3]);
        }
      }
    }
  }
}

template <int kStrips, int kColumns>
__device__ __forceinline__ void clear(float (&c)[kStrips][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0.0f;
    }
  }
}

#endif

template <class T, int kHeadDim>
struct ForwardShape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kStrips = kHeadDim <= 128 && !kWide ? 2 : 1;  // of 16 queries, per warp
  static constexpr int kQueries = 16 * kStrips * kWarps;
  static constexpr int kKeys =
      (kHeadDim == 64 || kHeadDim == 192) && !kWide ? 64 : 32;  // what fits in registers beside the sums
  static constexpr size_t kSharedBytes = sizeof(T) * kStride<T, kHeadDim> * (kQueries + 2 * kKeys);
};

template <class T, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kThreads) attention_forward_mma(AttentionArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  write_random_state(args);
  using Shape = ForwardShape<T, kHeadDim>;
  constexpr int kStrips = Shape::kStrips;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kRow = kStride<T, kHeadDim>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* q_tile = reinterpret_cast<T*>(shared_memory);
  T* k_tile = q_tile + Shape::kQueries * kRow;
  T* v_tile = k_tile + kKeys * kRow;

  const int tiles = (args.seq_len + Shape::kQueries - 1) / Shape::kQueries;
  const HeadIndex h = head_index(args, blockIdx.x / tiles);
  const int row0 = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Shape::kQueries;
  const int64_t stride = args.token_stride();
  T* qkv = static_cast<T*>(const_cast<void*>(args.qkv));
  const T* q = qkv_head<T>(args, qkv, h, 0);
  const T* k = qkv_head<T>(args, qkv, h, 1);
  const T* v = qkv_head<T>(args, qkv, h, 2);
  const int warp_row = threadIdx.x / 32 * 16 * kStrips;
  const float scale_log2 = static_cast<float>(args.score_scale * kLog2e);
  const int64_t mask_offset = h.batch * args.mask.strides[0] + h.head * args.mask.strides[1];
  PhiloxState philox_key{};
  if (kGeneral && args.drops) philox_key = forward_philox(args);

  float sums[kStrips][kHeadDim / 8][4];
  clear(sums);
  float maximum[kStrips][2], total[kStrips][2];
#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
    maximum[m][0] = maximum[m][1] = -INFINITY;
    total[m][0] = total[m][1] = 0.0f;
  }

  const int end = args.causal ? min(args.seq_len, row0 + Shape::kQueries) : args.seq_len;
  copy_rows<T, Shape::kQueries, kHeadDim>(q_tile, q, stride, row0, args);
  copy_rows<T, kKeys, kHeadDim>(k_tile, k, stride, 0, args);
  copies_commit();
  for (int col0 = 0; col0 < end; col0 += kKeys) {
    copies_wait<0>();
    __syncthreads();
    copy_rows<T, kKeys, kHeadDim>(v_tile, v, stride, col0, args);
    copies_commit();

    float s[kStrips][kKeys / 8][4];
    clear(s);
    dot_rows<T, kStrips, kKeys, kHeadDim>(s, q_tile + warp_row * kRow, k_tile);

    uint32_t p[kStrips][kKeys / kDepth<T>][4];
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      const int strip = row0 + warp_row + 16 * m;
      const bool edge = col0 + kKeys > args.seq_len || (args.causal && col0 + kKeys - 1 > strip);
      const float scale =
          kGeneral && args.mask.data ? 1.0f : scale_log2;  // what scores are still to be multiplied with
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        float (&piece)[8] = reinterpret_cast<float (&)[8]>(s[m][2 * n]);
        if (kGeneral && args.mask.data) add_mask<false>(args, mask_offset, strip, col0 + 16 * n, scale_log2, piece);
        if (edge) {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int j = col0 + 16 * n + lane_column(e);
            if (j >= args.seq_len || (args.causal && j > strip + lane_row(e))) piece[e] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
        top = fmaxf(maximum[m][half], top * scale);
        const float base = top == -INFINITY ? 0.0f : top;
        const float correction = exp2_of(maximum[m][half] - base);
        maximum[m][half] = top;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[m][n][e] = exp2_of(fmaf(s[m][n][e], scale, -base));
            sum += s[m][n][e];
          }
        }
        total[m][half] = total[m][half] * correction + sum;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          sums[m][n][2 * half] *= correction;
          sums[m][n][2 * half + 1] *= correction;
        }
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        float (&piece)[8] = reinterpret_cast<float (&)[8]>(s[m][2 * n]);
        if (kGeneral && args.drops) {
          uint32_t numbers[8];
          numbers_by_query(philox_key, h.random, strip, col0 + 16 * n, numbers);
#pragma unroll
          for (int e = 0; e < 8; ++e) zero_dropped(piece[e], numbers[e], args.drop_limit);
        }
        pack_piece<T>(&p[m][16 / kDepth<T> * n], piece);
      }
    }

    copies_wait<0>();
    __syncthreads();
    if (col0 + kKeys < end) {
      copy_rows<T, kKeys, kHeadDim>(k_tile, k, stride, col0 + kKeys, args);
      copies_commit();
    }
    sum_rows<T, kStrips, kKeys / kDepth<T>, kHeadDim>(sums, p, v_tile);
  }

#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = total[m][half];
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
      factor[half] = sum > 0.0f ? static_cast<float>(args.drop_scale) / sum : 0.0f;
      const int row = row0 + warp_row + 16 * m + lane_row(2 * half);
      if (threadIdx.x % 4 == 0) store_row_statistics(args, h.flat, row, maximum[m][half], sum);
    }
    const int row = warp_row + 16 * m;
    store_rows<T, kHeadDim, kRow>(sums[m], factor[0], factor[1], q_tile + row * kRow, out_head<T>(args, args.out, h),
                                  args.heads_dim(), row0 + row, args);
  }
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// The warp's answer to whether any of kRows rows has a large score.
template <int kRows>
__device__ __forceinline__ bool any_large(const float* shift2) {
  bool large = false;
#pragma unroll
  for (int i = 0; i < kRows; i += 32) large |= shift2[(i + threadIdx.x % 32) % kRows] != 0.0f;
  return __any_sync(0xFFFFFFFFu, large);
}

// Applies the mask, and the shifts of the queries if any is large, to the products of queries and keys of a tile, 16
// rows by kColumns * 8 columns; gives what these must still be multiplied with to be in units of log2.
template <bool kGeneral, bool kRowsAreKeys, int kColumns>
__device__ __forceinline__ float shift_scores(const AttentionArgs& args, int64_t mask_offset, float scale_log2,
                                              int row0, int column0, bool large, const float* shift2,
                                              float (&s)[kColumns][4]) {
  const bool masked = kGeneral && args.mask.data;
  if (!masked && !large) return scale_log2;
#pragma unroll
  for (int n = 0; n < kColumns / 2; ++n) {
    float (&piece)[8] = reinterpret_cast<float (&)[8]>(s[2 * n]);
    if (masked) add_mask<kRowsAreKeys>(args, mask_offset, row0, column0 + 16 * n, scale_log2, piece);
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
template <bool kGeneral, bool kRowsAreKeys>
__device__ __forceinline__ void score_gradients(const AttentionArgs& args, PhiloxState philox_key, uint32_t head,
                                                float scale, int row0, int column0, bool edge, const float (&lse2)[4],
                                                const float (&delta)[4], float (&s)[8], float (&dp)[8]) {
  const float drop_scale = static_cast<float>(args.drop_scale);
  uint32_t numbers[8];
  if (kGeneral && args.drops) {
    if (kRowsAreKeys) {
      numbers_by_key(philox_key, head, row0, column0, numbers);
    } else {
      numbers_by_query(philox_key, head, row0, column0, numbers);
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int query = kRowsAreKeys ? e / 4 * 2 + e % 2 : e / 2 % 2;  // which of the lane's queries
    float p = exp2_of(fminf(fmaf(s[e], scale, -lse2[query]), 0.0f));
    if (edge) {
      const int i = kRowsAreKeys ? column0 + lane_column(e) : row0 + lane_row(e);
      const int j = kRowsAreKeys ? row0 + lane_row(e) : column0 + lane_column(e);
      if (j >= args.seq_len || (args.causal && j > i)) p = 0.0f;
    }
    const bool kept = !kGeneral || !args.drops || numbers[e] > args.drop_limit;
    dp[e] = p * ((kept ? dp[e] * drop_scale : 0.0f) - delta[query]);
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

template <class T, int kHeadDim>
struct BackwardShape {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(T));
  static constexpr int kOuter = 16 * kWarps;  // keys or queries that a block owns
  static constexpr int kInner = kRowBytes <= 128 ? 64 : kRowBytes <= 384 ? 32 : 16;
  static constexpr int kStages = kRowBytes <= 256 ? 2 : 1;
  static constexpr size_t kSharedBytes = sizeof(T) * kStride<T, kHeadDim> * 2 * (kOuter + kStages * kInner);
  static constexpr bool kSplit =
      kHeadDim > 128;  // d_k and d_v each by a launch of its own: both don't fit in registers
};

// Of attention_backward_q_mma, as registers allow.
template <class T, int kHeadDim, bool kGeneral>
constexpr int kQueryBlocksPerSm = sizeof(T) == 4   ? (kHeadDim <= 64 ? 4 : 3)
                                  : kHeadDim <= 96 ? (kGeneral ? 3 : 4)
                                                   : (kHeadDim <= 128 && !kGeneral ? 3 : 2);

// d_k (if kKeyGradient) and d_v (if kValueGradient) of a tile of keys; rows are keys.
template <class T, int kHeadDim, bool kGeneral, bool kKeyGradient, bool kValueGradient>
__global__ void __launch_bounds__(kThreads) attention_backward_kv_mma(AttentionArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  using Shape = BackwardShape<T, kHeadDim>;
  constexpr int kQueries = Shape::kInner;
  constexpr int kRow = kStride<T, kHeadDim>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* k_tile = reinterpret_cast<T*>(shared_memory);
  T* v_tile = k_tile + Shape::kOuter * kRow;
  T* q_tiles = v_tile + Shape::kOuter * kRow;
  T* d_out_tiles = q_tiles + Shape::kStages * kQueries * kRow;

  const int tiles = (args.seq_len + Shape::kOuter - 1) / Shape::kOuter;
  const HeadIndex h = head_index(args, blockIdx.x / tiles);
  const int key0 = static_cast<int>(blockIdx.x % tiles) * Shape::kOuter;
  const int64_t stride = args.token_stride();
  T* qkv = static_cast<T*>(const_cast<void*>(args.qkv));
  const T* q = qkv_head<T>(args, qkv, h, 0);
  const T* d_out = out_head<T>(args, const_cast<void*>(args.d_out), h);
  const int64_t statistics = h.flat * static_cast<int64_t>(args.rows_padded);
  const float* lse2_head = static_cast<const float*>(args.lse2) + statistics;
  const float* shift2_head = static_cast<const float*>(args.shift2) + statistics;
  const float* delta_head = static_cast<const float*>(args.delta) + statistics;
  const int warp_row = threadIdx.x / 32 * 16;
  const float scale_log2 = static_cast<float>(args.score_scale * kLog2e);
  const int64_t mask_offset = h.batch * args.mask.strides[0] + h.head * args.mask.strides[1];
  PhiloxState philox_key{};
  if (kGeneral && args.drops) philox_key = backward_philox(args);

  float dk[1][kHeadDim / 8][4], dv[1][kHeadDim / 8][4];
  clear(dk);
  clear(dv);

  const int start = args.causal ? key0 / kQueries * kQueries : 0;
  copy_rows<T, Shape::kOuter, kHeadDim>(k_tile, qkv_head<T>(args, qkv, h, 1), stride, key0, args);
  copy_rows<T, Shape::kOuter, kHeadDim>(v_tile, qkv_head<T>(args, qkv, h, 2), stride, key0, args);
  copy_rows<T, kQueries, kHeadDim>(q_tiles, q, stride, start, args);
  copy_rows<T, kQueries, kHeadDim>(d_out_tiles, d_out, args.heads_dim(), start, args);
  copies_commit();
  for (int row0 = start, stage = 0; row0 < args.seq_len; row0 += kQueries) {
    copies_wait<0>();
    __syncthreads();
    const T* q_tile = q_tiles + stage * kQueries * kRow;
    const T* d_out_tile = d_out_tiles + stage * kQueries * kRow;
    if (Shape::kStages > 1 && row0 + kQueries < args.seq_len) {
      stage ^= 1;
      copy_rows<T, kQueries, kHeadDim>(q_tiles + stage * kQueries * kRow, q, stride, row0 + kQueries, args);
      copy_rows<T, kQueries, kHeadDim>(d_out_tiles + stage * kQueries * kRow, d_out, args.heads_dim(), row0 + kQueries,
                                       args);
      copies_commit();
    }

    float s[1][kQueries / 8][4], dp[1][kQueries / 8][4];
    clear(s);
    clear(dp);
    dot_rows<T, 1, kQueries, kHeadDim>(s, k_tile + warp_row * kRow, q_tile);
    if (kKeyGradient) dot_rows<T, 1, kQueries, kHeadDim>(dp, v_tile + warp_row * kRow, d_out_tile);
    const bool edge = key0 + Shape::kOuter > args.seq_len || (args.causal && key0 + Shape::kOuter - 1 > row0);
    const float scale = shift_scores<kGeneral, true>(args, mask_offset, scale_log2, key0 + warp_row, row0,
                                                     any_large<kQueries>(shift2_head + row0), shift2_head + row0, s[0]);
#pragma unroll
    for (int n = 0; n < kQueries / 16; ++n) {
      float lse2[4], delta[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + 16 * n + lane_column(i / 2 * 4 + i % 2);
        lse2[i] = lse2_head[row];
        delta[i] = delta_head[row];
      }
      score_gradients<kGeneral, true>(args, philox_key, h.random, scale, key0 + warp_row, row0 + 16 * n, edge, lse2,
                                      delta, reinterpret_cast<float (&)[8]>(s[0][2 * n]),
                                      reinterpret_cast<float (&)[8]>(dp[0][2 * n]));
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
    if (Shape::kStages == 1 && row0 + kQueries < args.seq_len) {
      __syncthreads();
      copy_rows<T, kQueries, kHeadDim>(q_tiles, q, stride, row0 + kQueries, args);
      copy_rows<T, kQueries, kHeadDim>(d_out_tiles, d_out, args.heads_dim(), row0 + kQueries, args);
      copies_commit();
    }
  }

  __syncthreads();
  const float scale = static_cast<float>(args.score_scale);
  const float drop_scale = static_cast<float>(args.drop_scale);
  T* shared = k_tile + warp_row * kRow;
  if (kKeyGradient) {
    store_rows<T, kHeadDim, kRow>(dk[0], scale, scale, shared, qkv_head<T>(args, args.d_qkv, h, 1), stride,
                                  key0 + warp_row, args);
  }
  if (kValueGradient) {
    store_rows<T, kHeadDim, kRow>(dv[0], drop_scale, drop_scale, shared, qkv_head<T>(args, args.d_qkv, h, 2), stride,
                                  key0 + warp_row, args);
  }
#endif
}

// d_q of a tile of queries; rows are queries.
template <class T, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kQueryBlocksPerSm<T, kHeadDim, kGeneral>)
    attention_backward_q_mma(AttentionArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  using Shape = BackwardShape<T, kHeadDim>;
  constexpr int kKeys = Shape::kInner;
  constexpr int kRow = kStride<T, kHeadDim>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* q_tile = reinterpret_cast<T*>(shared_memory);
  T* d_out_tile = q_tile + Shape::kOuter * kRow;
  T* k_tiles = d_out_tile + Shape::kOuter * kRow;
  T* v_tiles = k_tiles + Shape::kStages * kKeys * kRow;

  const int tiles = (args.seq_len + Shape::kOuter - 1) / Shape::kOuter;
  const HeadIndex h = head_index(args, blockIdx.x / tiles);
  const int row0 = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Shape::kOuter;
  const int64_t stride = args.token_stride();
  T* qkv = static_cast<T*>(const_cast<void*>(args.qkv));
  const T* k = qkv_head<T>(args, qkv, h, 1);
  const T* v = qkv_head<T>(args, qkv, h, 2);
  const int64_t statistics = h.flat * static_cast<int64_t>(args.rows_padded);
  const int warp_row = threadIdx.x / 32 * 16;
  const float scale_log2 = static_cast<float>(args.score_scale * kLog2e);
  const int64_t mask_offset = h.batch * args.mask.strides[0] + h.head * args.mask.strides[1];
  PhiloxState philox_key{};
  if (kGeneral && args.drops) philox_key = backward_philox(args);

  float lse2[4] = {}, delta[4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row0 + warp_row + lane_row(2 * i);
    lse2[i] = static_cast<const float*>(args.lse2)[statistics + row];
    delta[i] = static_cast<const float*>(args.delta)[statistics + row];
  }
  const float* shift2 = static_cast<const float*>(args.shift2) + statistics + row0 + warp_row;
  const bool large = any_large<16>(shift2);
  float dq[1][kHeadDim / 8][4];
  clear(dq);

  const int end = args.causal ? min(args.seq_len, row0 + Shape::kOuter) : args.seq_len;
  copy_rows<T, Shape::kOuter, kHeadDim>(q_tile, qkv_head<T>(args, qkv, h, 0), stride, row0, args);
  copy_rows<T, Shape::kOuter, kHeadDim>(d_out_tile, out_head<T>(args, const_cast<void*>(args.d_out), h),
                                        args.heads_dim(), row0, args);
  copy_rows<T, kKeys, kHeadDim>(k_tiles, k, stride, 0, args);
  copy_rows<T, kKeys, kHeadDim>(v_tiles, v, stride, 0, args);
  copies_commit();
  for (int col0 = 0, stage = 0; col0 < end; col0 += kKeys) {
    copies_wait<0>();
    __syncthreads();
    const T* k_tile = k_tiles + stage * kKeys * kRow;
    const T* v_tile = v_tiles + stage * kKeys * kRow;
    if (Shape::kStages > 1 && col0 + kKeys < end) {
      stage ^= 1;
      copy_rows<T, kKeys, kHeadDim>(k_tiles + stage * kKeys * kRow, k, stride, col0 + kKeys, args);
      copy_rows<T, kKeys, kHeadDim>(v_tiles + stage * kKeys * kRow, v, stride, col0 + kKeys, args);
      copies_commit();
    }

    float s[1][kKeys / 8][4], dp[1][kKeys / 8][4];
    clear(s);
    clear(dp);
    dot_rows<T, 1, kKeys, kHeadDim>(s, q_tile + warp_row * kRow, k_tile);
    dot_rows<T, 1, kKeys, kHeadDim>(dp, d_out_tile + warp_row * kRow, v_tile);
    const bool edge = col0 + kKeys > args.seq_len || (args.causal && col0 + kKeys - 1 > row0 + warp_row);
    const float scale =
        shift_scores<kGeneral, false>(args, mask_offset, scale_log2, row0 + warp_row, col0, large, shift2, s[0]);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      score_gradients<kGeneral, false>(args, philox_key, h.random, scale, row0 + warp_row, col0 + 16 * n, edge, lse2,
                                       delta, reinterpret_cast<float (&)[8]>(s[0][2 * n]),
                                       reinterpret_cast<float (&)[8]>(dp[0][2 * n]));
    }
    uint32_t ds[1][kKeys / kDepth<T>][4];
    pack_pieces<T>(ds, dp);
    sum_rows<T, 1, kKeys / kDepth<T>, kHeadDim>(dq, ds, k_tile);
    if (Shape::kStages == 1 && col0 + kKeys < end) {
      __syncthreads();
      copy_rows<T, kKeys, kHeadDim>(k_tiles, k, stride, col0 + kKeys, args);
      copy_rows<T, kKeys, kHeadDim>(v_tiles, v, stride, col0 + kKeys, args);
      copies_commit();
    }
  }

  __syncthreads();
  const float scale = static_cast<float>(args.score_scale);
  store_rows<T, kHeadDim, kRow>(dq[0], scale, scale, q_tile + warp_row * kRow, qkv_head<T>(args, args.d_qkv, h, 0),
                                stride, row0 + warp_row, args);
#endif
}

}  // namespace tensor
}  // namespace cuda
}  // namespace pfa
