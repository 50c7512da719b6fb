// Attention, forward, on Hopper: the copy engine brings tiles of 128 keys and values, each warpgroup computes 64 rows of queries.
//
// Head dims up to 64, no mask: two blocks of two warpgroups share a multiprocessor, and one computes products while another computes
// exponentials. Else registers are too few for that, and there is one block of two computing warpgroups and one that copies; each
// computing warpgroup starts the next tile's scores before this tile's sums, and the two take turns at the tensor cores.
#include "core/cuda/attention_hopper.h"

#if CUDART_VERSION >= 12010

#include "core/cuda/attention_hopper.cuh"
#include "core/cuda/attention_hopper_launch.h"

namespace pfa {
namespace cuda {
namespace hopper {
namespace {

constexpr int kKeys = 128;
constexpr int kQueries = 128;  // of a block: 64 of each computing warpgroup
constexpr int kStages = 2;

template <int kHeadDim, bool kMask>
struct ForwardShape {
  static constexpr bool kCopies = kHeadDim > 64 || kMask;  // a warpgroup that only copies
  static constexpr int kThreads = kCopies ? 384 : 256;
  static constexpr int kBlocksPerSm = kCopies ? 1 : 2;
  static constexpr int kQueryBytes = 64 * kHeadDim * 2;  // of a warpgroup: its queries, in the end its result
  static constexpr int kTileBytes = kKeys * kHeadDim * 2;
  static constexpr size_t kSharedBytes = 1024 + 2 * kQueryBytes + 2 * kStages * kTileBytes;
};

#if PFA_HOPPER_CODE

// What a warpgroup knows of its 64 rows; a thread holds rows lane_row(0) and lane_row(2) of its warp's 16.
struct Rows {
  float maximum[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};
};

// Scores of 64 rows and kKeys keys to probabilities; gives what the sums so far must be multiplied with.
template <bool kMask>
__device__ __forceinline__ void softmax(const AttentionArgs& args, int64_t mask_offset, float scale_log2, int row0, int col0,
                                        Rows& rows, float (&correction)[2], float (&s)[kKeys / 2]) {
  if (kMask) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      float (&piece)[8] = reinterpret_cast<float (&)[8]>(s[8 * n]);
#pragma unroll
      for (int e = 0; e < 8; ++e) piece[e] *= scale_log2;
      add_mask<false>(args, mask_offset, row0, col0 + 16 * n, piece);
    }
  }
  if (col0 + kKeys > args.seq_len || (args.causal && col0 + kKeys - 1 > row0)) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int limit = args.causal ? min(args.seq_len - 1, row0 + lane_row(i % 4)) : args.seq_len - 1;
      if (col0 + i / 4 * 8 + lane_column(i % 2) > limit) s[i] = -INFINITY;
    }
  }
  const float scale = kMask ? 1.0f : scale_log2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = rows.maximum[half];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
    const float base = top == -INFINITY ? 0.0f : top * scale;
    correction[half] = exp2_of(rows.maximum[half] * scale - base);
    rows.maximum[half] = top;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[4 * n + e] = exp2_of(s[4 * n + e] * scale - base);
        sum += s[4 * n + e];
      }
    }
    rows.total[half] = rows.total[half] * correction[half] + sum;
  }
}

// Probabilities, after dropout, as operands of the product with the values.
template <class T, bool kDrops>
__device__ __forceinline__ void probabilities(const AttentionArgs& args, PhiloxState philox_key, uint32_t head, int row0,
                                              int col0, float (&s)[kKeys / 2], uint32_t (&p)[kKeys / 16][4]) {
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    if (kDrops) {
      uint32_t numbers[8];
      numbers_by_query(philox_key, head, row0, col0 + 16 * n, numbers);
#pragma unroll
      for (int e = 0; e < 8; ++e) zero_dropped(s[8 * n + e], numbers[e], args.drop_limit);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) p[n][e] = pack<T>(s[8 * n + 2 * e], s[8 * n + 2 * e + 1]);
  }
}

template <class T, int kHeadDim>
__device__ __forceinline__ void start_scores(float (&s)[kKeys / 2], const void* q, const void* k) {
  pin(s);
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    const uint64_t a = rows_operand(static_cast<const char*>(q) + d / 4 * 64 * kRowBytes) + d % 4 * kRowsStep;
    const uint64_t b = rows_operand(static_cast<const char*>(k) + d / 4 * kKeys * kRowBytes) + d % 4 * kRowsStep;
    wgmma<T, 0, 0>(s, a, b, d > 0);
  }
  wgmma_commit();
  pin(s);
}

template <class T, int kHeadDim>
__device__ __forceinline__ void start_sums(float (&o)[kHeadDim / 2], const uint32_t (&p)[kKeys / 16][4], const void* v,
                                           bool accumulate) {
  pin(o);
  wgmma_fence();
  const uint64_t b = columns_operand(v, kKeys * kRowBytes);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) wgmma<T, 1>(o, p[n], b + n * kColumnsStep, accumulate || n > 0);
  wgmma_commit();
  pin(o);
}

template <class T, int kHeadDim>
__device__ __forceinline__ void finish(const AttentionArgs& args, const HeadIndex& h, float scale, int row0, Rows& rows,
                                       const float (&o)[kHeadDim / 2], char* shared) {
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.total[half];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    factor[half] = sum > 0.0f ? static_cast<float>(args.drop_scale) / sum : 0.0f;
    const int row = row0 + lane_row(2 * half);
    if (threadIdx.x % 4 == 0) store_row_statistics(args, h.flat, row, rows.maximum[half] * scale, sum);
  }
  store_strip<T, kHeadDim>(o, factor[0], factor[1], shared, threadIdx.x / 32 % 4 * 16, out_head<T>(args, args.out, h),
                           args.heads_dim(), row0, args.seq_len, args.head_dim);
}

#endif

template <class T, int kHeadDim, bool kMask, bool kDrops>
__global__ void __launch_bounds__(ForwardShape<kHeadDim, kMask>::kThreads, ForwardShape<kHeadDim, kMask>::kBlocksPerSm)
    forward_kernel(const __grid_constant__ CUtensorMap qkv_map, const AttentionArgs args, const int heads_per_group) {
#if PFA_HOPPER_CODE
  using Shape = ForwardShape<kHeadDim, kMask>;
  extern __shared__ unsigned char unaligned[];
  char* shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(unaligned) + 1023) / 1024 * 1024);
  char* k_tiles = shared + 2 * Shape::kQueryBytes;
  char* v_tiles = k_tiles + kStages * Shape::kTileBytes;
  __shared__ int from_head, from_batch;  // for the copies
  __shared__ uint64_t q_full, k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];

  const TileIndex tile = tile_index(args, blockIdx.x, heads_per_group, (args.seq_len + kQueries - 1) / kQueries);
  const HeadIndex h = head_index(args, tile.head);
  const int row0 = (tile.tiles - 1 - tile.tile) * kQueries;
  const int end = args.causal ? min(args.seq_len, row0 + kQueries) : args.seq_len;
  const int last = (end + kKeys - 1) / kKeys - 1;  // tiles are walked from the last to the first
  if (threadIdx.x == 0) {
    prefetch_map(qkv_map);
    from_head = static_cast<int>(h.head);
    from_batch = static_cast<int>(h.batch);
    barrier_init(&q_full, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&k_full[i], 1);
      barrier_init(&v_full[i], 1);
      barrier_init(&k_empty[i], 8);
      barrier_init(&v_empty[i], 8);
    }
    barrier_init_fence();
  }
  __syncthreads();

  // Tile number n, counted in the order of the walk, lies in stage n % kStages and is its n / kStages-th tile.
  const auto copy_queries = [&] {
    barrier_expect(&q_full, kQueries * kHeadDim * 2);
    copy_tile<64, kHeadDim>(shared, qkv_map, &q_full, from_head, 0, row0, from_batch);
    copy_tile<64, kHeadDim>(shared + Shape::kQueryBytes, qkv_map, &q_full, from_head, 0, row0 + 64, from_batch);
  };
  const auto copy_keys = [&](int n) {
    const int stage = n % kStages;
    if (n >= kStages) barrier_wait(&k_empty[stage], (n / kStages - 1) % 2);
    barrier_expect(&k_full[stage], Shape::kTileBytes);
    copy_tile<kKeys, kHeadDim>(k_tiles + stage * Shape::kTileBytes, qkv_map, &k_full[stage], from_head, 1, (last - n) * kKeys,
                               from_batch);
  };
  const auto copy_values = [&](int n) {
    const int stage = n % kStages;
    if (n >= kStages) barrier_wait(&v_empty[stage], (n / kStages - 1) % 2);
    barrier_expect(&v_full[stage], Shape::kTileBytes);
    copy_tile<kKeys, kHeadDim>(v_tiles + stage * Shape::kTileBytes, qkv_map, &v_full[stage], from_head, 2, (last - n) * kKeys,
                               from_batch);
  };
  const auto release = [&](uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  };

  if (Shape::kCopies && threadIdx.x < 128) {
    registers_give<24>();
    if (threadIdx.x == 0) {
      copy_queries();
      for (int n = 0; n <= last; ++n) {
        copy_keys(n);
        copy_values(n);
      }
    }
    return;
  }
  if (Shape::kCopies) registers_take<240>();

  const int group = threadIdx.x / 128 - (Shape::kCopies ? 1 : 0);
  const int strip = row0 + group * 64 + threadIdx.x / 32 % 4 * 16;
  char* q_tile = shared + group * Shape::kQueryBytes;
  const float scale_log2 = static_cast<float>(args.score_scale * kLog2e);
  const int64_t mask_offset = h.batch * args.mask.strides[0] + h.head * args.mask.strides[1];
  PhiloxState philox_key{};
  if (kDrops) philox_key = attention_philox(args);

  Rows rows;
  float correction[2];
  float o[kHeadDim / 2];
  float s[kKeys / 2];
  uint32_t p[kKeys / 16][4];

  if constexpr (Shape::kCopies) {
    barrier_wait(&q_full, 0);
    barrier_wait(&k_full[0], 0);
    start_scores<T, kHeadDim>(s, q_tile, k_tiles);
    wgmma_wait<0>();
    pin(s);
    release(&k_empty[0]);
    softmax<kMask>(args, mask_offset, scale_log2, strip, last * kKeys, rows, correction, s);
    probabilities<T, kDrops>(args, philox_key, h.random, strip, last * kKeys, s, p);
    constexpr int kTurn = 1;  // named barriers 1 and 2: the warpgroup's turn at the tensor cores
    if (group == 1 && last > 0) named_arrive(kTurn, 256);
    for (int n = 1; n <= last; ++n) {
      const int col0 = (last - n) * kKeys;
      barrier_wait(&k_full[n % kStages], n / kStages % 2);
      named_sync(kTurn + group, 256);
      start_scores<T, kHeadDim>(s, q_tile, k_tiles + n % kStages * Shape::kTileBytes);
      barrier_wait(&v_full[(n - 1) % kStages], (n - 1) / kStages % 2);
      start_sums<T, kHeadDim>(o, p, v_tiles + (n - 1) % kStages * Shape::kTileBytes, n > 1);
      if (group == 0 || n < last) named_arrive(kTurn + 1 - group, 256);
      wgmma_wait<1>();
      pin(s);
      release(&k_empty[n % kStages]);
      softmax<kMask>(args, mask_offset, scale_log2, strip, col0, rows, correction, s);
      wgmma_wait<0>();
      pin(o);
      release(&v_empty[(n - 1) % kStages]);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
      probabilities<T, kDrops>(args, philox_key, h.random, strip, col0, s, p);
    }
    barrier_wait(&v_full[last % kStages], last / kStages % 2);
    start_sums<T, kHeadDim>(o, p, v_tiles + last % kStages * Shape::kTileBytes, last > 0);
    wgmma_wait<0>();
    pin(o);
  } else {
    const bool copies = threadIdx.x == 0;
    if (copies) {
      copy_queries();
      copy_keys(0);
      copy_values(0);
    }
    barrier_wait(&q_full, 0);
    for (int n = 0; n <= last; ++n) {
      const int stage = n % kStages;
      const int parity = n / kStages % 2;
      const int col0 = (last - n) * kKeys;
      barrier_wait(&k_full[stage], parity);
      start_scores<T, kHeadDim>(s, q_tile, k_tiles + stage * Shape::kTileBytes);
      if (copies && n < last) copy_keys(n + 1);
      __syncwarp();
      wgmma_wait<0>();
      pin(s);
      release(&k_empty[stage]);
      softmax<kMask>(args, mask_offset, scale_log2, strip, col0, rows, correction, s);
      if (copies && n < last) copy_values(n + 1);
      __syncwarp();
      if (n > 0) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
      }
      probabilities<T, kDrops>(args, philox_key, h.random, strip, col0, s, p);
      barrier_wait(&v_full[stage], parity);
      start_sums<T, kHeadDim>(o, p, v_tiles + stage * Shape::kTileBytes, n > 0);
      wgmma_wait<0>();
      pin(o);
      release(&v_empty[stage]);
    }
  }

  named_sync(3 + group, 128);  // the result goes where the warpgroup's queries were
  finish<T, kHeadDim>(args, h, kMask ? 1.0f : scale_log2, strip, rows, o, q_tile);
#endif
}

template <class T, int kHeadDim>
void forward(const Context& context, const AttentionArgs& args, DType dtype) {
  const CUtensorMap map = tensor_map(args.qkv, dtype, args, 3);
  with_bool(args.mask.data != nullptr, [&](auto mask) {
    with_bool(args.drops, [&](auto drops) {
      using Shape = ForwardShape<kHeadDim, decltype(mask)::value>;
      launch(context, "attention_forward_hopper", forward_kernel<T, kHeadDim, decltype(mask)::value, decltype(drops)::value>,
             ceil_div(args.seq_len, kQueries) * args.batch * args.num_heads, Shape::kThreads, Shape::kSharedBytes, map, args,
             heads_per_group(args, 4));  // k, v
    });
  });
}

}  // namespace
}  // namespace hopper

void attention_forward_hopper(const Context& context, const AttentionArgs& args, DType dtype) {
  with_head_dim<64, 128>(args.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    if (dtype == DType::kFloat16) {
      hopper::forward<__half, kHeadDim>(context, args, dtype);
    } else {
      hopper::forward<__nv_bfloat16, kHeadDim>(context, args, dtype);
    }
  });
}

bool hopper_serves(const Context& context, const AttentionArgs& args, DType dtype) {
  if (context.compute_capability != 90 || !is_16bit_float(dtype) || args.head_dim > 128 || !args.vectors) return false;
  const void* kernel = reinterpret_cast<const void*>(hopper::forward_kernel<__half, 64, false, false>);
  return kernel_attributes(context, kernel).sharedSizeBytes > 0;  // code for other targets is empty and has no barriers
}

}  // namespace cuda
}  // namespace pfa

#endif
