// Attention, backward, on Hopper: a block owns 128 keys and walks over the queries; d_k and d_v stay in registers.
//
// Rows are keys: each of two computing warpgroups holds 64 of them, and P^T and dS^T are operands from registers for
// d_v and d_k. dS^T also goes to shared memory, where both warpgroups meet, for d_q = dS k: with head dims up to 64
// each computes 64 of the tile's 128 queries, else each computes half of the head dims of 64 queries. A third warpgroup
// copies, and takes the block's next tile of keys while the others are at work on this one.
//
// d_q is added up in float32 in device memory, in the order in which threads hold it. There are sums for as many heads
// as blocks can be working on, few enough for the L2 cache: head h has slot h % dq_slots of them. The block that has
// done tile t of head h brings tile t of d_q of head h - dq_lag to its place and clears its sums; the last dq_lag heads
// are left to a kernel of their own. Blocks take tiles in the order of heads, and only when they run, so that whatever
// one waits for is under way in another.
//
// d_q and d_v, on their way out of registers, are summed over the tokens as well: the gradient of the QKV bias. The sum
// of d_k is zero, for what is added to all keys alike moves all scores of a query alike.
//
// Of a mask that is the same for all queries a thread holds its two keys' elements, and tiles of keys that nobody sees
// have no walk; elements of any other mask are loaded a step ahead.
#include "core/cuda/attention/hopper/hopper.h"

#if CUDART_VERSION >= 12010

#include "core/cuda/attention/hopper/instructions.cuh"
#include "core/cuda/attention/hopper/tiles.h"

namespace pfa {
namespace cuda {
namespace hopper {
namespace {

constexpr int kKeys = 128;
constexpr int kStages = 2;
constexpr int kThreads = 384;
constexpr int kQueriesTaken = kKeys;           // of d_q at a time, so that there are as many tiles of them as of keys
constexpr int kSumBlock = 64 * kBlockColumns;  // sums of d_q that a warpgroup adds to at a time
constexpr int kElementBytes = 12;              // q, k, v, d_out and the sums of d_q
// In a build for compute-sanitizer.
#ifdef PFA_SANITIZED
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

template <int kHeadDim>
struct BackwardShape {
  static constexpr int kQueries = kHeadDim > 64 ? 64 : 128;
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;       // a tile of k or v
  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;  // a tile of q or d_out
  static constexpr int kScoreBlockBytes = kKeys * kRowBytes;   // dS^T for 64 queries
  static constexpr int kScoreBytes = kQueries / 64 * kScoreBlockBytes;
  static constexpr int kRowStatisticBytes = kQueries * 4;
  // Of the computing threads at a barrier, or one for each warp: compute-sanitizer follows only the former, which with
  // small tiles of queries takes 8% longer.
  static constexpr int kArrivals = kQueries > 64 || kSanitized ? 256 : 8;
  static constexpr size_t kSharedBytes =
      1024 + kStages * (2 * kKeyBytes + 2 * kQueryBytes + kScoreBytes + 3 * kRowStatisticBytes);
};

#if PFA_HOPPER_CODE

// d = the warpgroup's 64 rows of k or v times the rows of q or d_out.
template <class T, int kHeadDim, int kQueries>
__device__ __forceinline__ void multiply_rows(float (&d)[kQueries / 2], uint64_t keys, uint64_t queries) {
  constexpr int kKeyBlock = kKeys * kRowBytes / 16;  // from a block of 64 columns to the next, as descriptors count
  constexpr int kQueryBlock = kQueries * kRowBytes / 16;
  pin(d);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    const uint64_t a = keys + i / 4 * kKeyBlock + i % 4 * kRowsStep;
    const uint64_t b = queries + i / 4 * kQueryBlock + i % 4 * kRowsStep;
    wgmma<T, 0, 0>(d, a, b, i > 0);
  }
}

// Whether any key of a tile may be seen, by a mask that is the same for all queries.
__device__ __forceinline__ bool any_visible(const AttentionArgs& args, int64_t mask_offset, int key0) {
  bool visible = false;
  with_mask_elements(args.mask, [&](const auto* elements) {
    constexpr int kBatch = 8;  // loads in flight
    for (int j = 0; j < kKeys && !visible; j += kBatch) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int key = min(key0 + j + k, args.seq_len - 1);
        visible |= mask_log2<float>(elements[mask_offset + key * args.mask.strides[3]]) != -INFINITY;
      }
    }
  });
  return visible;
}

// Of the tiles of all heads that a head's slot has had: how many are in the sums, and how many of d_q have left them.
__device__ __forceinline__ uint32_t* tiles_added(const AttentionArgs& args, uint32_t head) {
  return args.progress + 1 + head % args.dq_slots;
}
__device__ __forceinline__ uint32_t* tiles_taken(const AttentionArgs& args, uint32_t head) {
  return args.progress + 1 + args.dq_slots + head % args.dq_slots;
}

__device__ __forceinline__ void wait_for_count(const uint32_t* count, uint32_t expected) {
  while (true) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
    if (value >= expected) return;
    __nanosleep(50);
  }
}

__device__ __forceinline__ void add_count(uint32_t* count) {
  asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

// What `values` of d_q or d_v (`which` 0 or 2) add to the gradient of the QKV bias.
template <int kHeadDim>
__device__ __forceinline__ void add_to_bias(const AttentionArgs& args, const float (&values)[kHeadDim / 2],
                                            float factor, const HeadIndex& h, int which, int column0) {
  if (!args.bias_sums) return;
  float* sums = args.bias_sums + blockIdx.x % kBiasCopies * args.token_stride() + which * args.heads_dim() +
                h.head * args.head_dim;
  add_column_sums<kHeadDim>(values, factor, sums + column0, args.head_dim - column0);
}

// A warpgroup's 64 queries of d_q on their way from the sums of their head to their place.
template <class T, int kHeadDim>
struct QueryGradient {
  static constexpr int kBlocks = kHeadDim / kBlockColumns;
  float values[kBlocks][32];

  __device__ __forceinline__ float4* sums(const AttentionArgs& args, uint32_t head, int row0) const {
    return reinterpret_cast<float4*>(dq_sums(args, head) + row0 * kHeadDim) + threadIdx.x % 128;
  }

  __device__ __forceinline__ void load(const AttentionArgs& args, uint32_t head, int row0) {
    const float4* from = sums(args, head, row0);
#pragma unroll
    for (int i = 0; i < 8 * kBlocks; ++i)
      *reinterpret_cast<float4*>(&values[i / 8][i % 8 * 4]) = __ldcg(from + i * 128);
  }

  __device__ __forceinline__ void clear(const AttentionArgs& args, uint32_t head, int row0) const {
    float4* to = sums(args, head, row0);
#pragma unroll
    for (int i = 0; i < 8 * kBlocks; ++i) __stcg(to + i * 128, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }

  // `strip`: the rows of `block` that belong to the warp.
  __device__ __forceinline__ void store(const AttentionArgs& args, uint32_t head, int row0, char* block,
                                        int strip) const {
    const float scale = static_cast<float>(args.score_scale);
    const HeadIndex h = head_index(args, head);
    T* to = qkv_head<T>(args, args.d_qkv, h, 0);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      add_to_bias<kBlockColumns>(args, values[b], scale, h, 0, b * kBlockColumns);
      store_strip<T, kBlockColumns>(values[b], scale, scale, block, strip, to + b * kBlockColumns, args.token_stride(),
                                    row0 + strip % 64, args.seq_len, args.head_dim - b * kBlockColumns);
    }
  }
};

#endif

template <class T, int kHeadDim, MaskKind kMask, bool kDrops>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap d_out_map,
                    const AttentionArgs args, const int heads_per_group) {
#if PFA_HOPPER_CODE
  using Shape = BackwardShape<kHeadDim>;
  constexpr int kQueries = Shape::kQueries;
  constexpr int kArrivals = Shape::kArrivals;
  extern __shared__ unsigned char unaligned[];
  char* shared = reinterpret_cast<char*>(unaligned) + (-shared_address(unaligned) & 1023);
  char* k_tiles = shared;
  char* v_tiles = k_tiles + kStages * Shape::kKeyBytes;
  char* q_tiles = v_tiles + kStages * Shape::kKeyBytes;
  char* d_out_tiles = q_tiles + kStages * Shape::kQueryBytes;
  char* score_tiles = d_out_tiles + kStages * Shape::kQueryBytes;
  float* lse2_tiles = reinterpret_cast<float*>(score_tiles + kStages * Shape::kScoreBytes);
  float* delta_tiles = lse2_tiles + kStages * kQueries;
  float* shift2_tiles = delta_tiles + kStages * kQueries;
  __shared__ uint64_t kv_full[kStages], kv_empty[kStages], q_full[kStages], q_empty[kStages], d_out_full[kStages],
      d_out_empty[kStages];
  __shared__ uint32_t taken[kStages];              // which tiles of keys lie in k_tiles and v_tiles
  __shared__ int walk_ends[kStages];               // the tiles of queries before which their walks end
  __shared__ uint64_t added, may_take, has_taken;  // d_q of this tile to the sums; that of an earlier head from them

  const int tiles = (args.seq_len + kKeys - 1) / kKeys;
  const int query_tiles = (args.seq_len + kQueries - 1) / kQueries;
  const uint32_t all_tiles = static_cast<uint32_t>(args.batch * args.num_heads) * tiles;
  if (threadIdx.x == 0) {
    prefetch_map(qkv_map);
    prefetch_map(d_out_map);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&kv_full[i], 1);
      barrier_init(&q_full[i], 1);
      barrier_init(&d_out_full[i], 1);
      barrier_init(&kv_empty[i], kArrivals + 1);
      barrier_init(&q_empty[i], kArrivals);
      barrier_init(&d_out_empty[i], kArrivals);
    }
    barrier_init(&added, kArrivals);
    barrier_init(&may_take, 1);
    barrier_init(&has_taken, kArrivals);
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_give<24>();
    if (threadIdx.x == 0) {
      for (int t = 0, step = 0;; ++t) {
        const int slot = t % kStages;
        const uint32_t index = atomicAdd(args.progress, 1u);
        if (t >= kStages) barrier_wait(&kv_empty[slot], (t / kStages - 1) % 2);
        taken[slot] = index;
        if (index >= all_tiles) {
          barrier_arrive(&kv_full[slot]);
          break;
        }
        const TileIndex tile = tile_index(args, index, heads_per_group, tiles);
        wait_for_count(tiles_taken(args, tile.head), tile.head / args.dq_slots * tiles);
        const HeadIndex h = head_index(args, tile.head);
        const int head = static_cast<int>(h.head);
        const int batch = static_cast<int>(h.batch);
        const int key0 = tile.tile * kKeys;
        const int64_t mask_offset = h.batch * args.mask.strides[0] + h.head * args.mask.strides[1];
        const int walk_end = kMask != kKeyMask || any_visible(args, mask_offset, key0) ? query_tiles : 0;
        walk_ends[slot] = walk_end;
        const int64_t statistics = h.flat * static_cast<int64_t>(args.rows_padded);
        const float* lse2 = static_cast<const float*>(args.lse2) + statistics;
        const float* delta = static_cast<const float*>(args.delta) + statistics;
        const float* shift2 = static_cast<const float*>(args.shift2) + statistics;
        barrier_expect(&kv_full[slot], 2 * Shape::kKeyBytes);
        copy_tile<kKeys, kHeadDim>(k_tiles + slot * Shape::kKeyBytes, qkv_map, &kv_full[slot], head, 1, key0, batch);
        copy_tile<kKeys, kHeadDim>(v_tiles + slot * Shape::kKeyBytes, qkv_map, &kv_full[slot], head, 2, key0, batch);
        for (int n = args.causal ? key0 / kQueries : 0; n < walk_end; ++n, ++step) {
          const int stage = step % kStages;
          const int row0 = n * kQueries;
          if (step >= kStages) barrier_wait(&q_empty[stage], (step / kStages - 1) % 2);
          barrier_expect(&q_full[stage], Shape::kQueryBytes + 2 * Shape::kRowStatisticBytes);
          copy_tile<kQueries, kHeadDim>(q_tiles + stage * Shape::kQueryBytes, qkv_map, &q_full[stage], head, 0, row0,
                                        batch);
          copy_bytes(lse2_tiles + stage * kQueries, lse2 + row0, Shape::kRowStatisticBytes, &q_full[stage]);
          copy_bytes(shift2_tiles + stage * kQueries, shift2 + row0, Shape::kRowStatisticBytes, &q_full[stage]);
          if (step >= kStages) barrier_wait(&d_out_empty[stage], (step / kStages - 1) % 2);
          barrier_expect(&d_out_full[stage], Shape::kQueryBytes + Shape::kRowStatisticBytes);
          copy_tile<kQueries, kHeadDim>(d_out_tiles + stage * Shape::kQueryBytes, d_out_map, &d_out_full[stage], head,
                                        0, row0, batch);
          copy_bytes(delta_tiles + stage * kQueries, delta + row0, Shape::kRowStatisticBytes, &d_out_full[stage]);
        }
      }
    } else if (threadIdx.x == 32) {  // tells other blocks of the sums, and hears of theirs
      for (int t = 0;; ++t) {
        barrier_wait(&kv_full[t % kStages], t / kStages % 2);
        const uint32_t index = taken[t % kStages];
        if (index >= all_tiles) break;
        barrier_arrive(&kv_empty[t % kStages]);
        const uint32_t head = tile_index(args, index, heads_per_group, tiles).head;
        const bool takes = head >= static_cast<uint32_t>(args.dq_lag);
        const uint32_t from = head - args.dq_lag;
        if (takes) wait_for_count(tiles_added(args, from), (from / args.dq_slots + 1) * tiles);
        barrier_arrive(&may_take);
        barrier_wait(&added, t % 2);
        add_count(tiles_added(args, head));
        barrier_wait(&has_taken, t % 2);
        if (takes) add_count(tiles_taken(args, from));
      }
    }
    return;
  }
  registers_take<240>();

  const int group = threadIdx.x / 128 - 1;
  const int strip = group * 64 + threadIdx.x / 32 % 4 * 16;  // of the warp's 16 keys in the tile
  const float scale = static_cast<float>(args.score_scale);
  const float scale_log2 = static_cast<float>(args.score_scale * kLog2e);
  const float drop_scale = static_cast<float>(args.drop_scale);
  PhiloxState philox_key{};
  if (kDrops) philox_key = backward_philox(args);
  const auto release = [&](uint64_t* barrier) {
    __syncwarp();
    if (kArrivals > 8 || threadIdx.x % 32 == 0) barrier_arrive(barrier);
  };
  constexpr bool kPackedOnly = kQueries > 64;

  for (int t = 0, step = 0;; ++t) {
    const int slot = t % kStages;
    barrier_wait(&kv_full[slot], t / kStages % 2);
    const uint32_t index = taken[slot];
    if (index >= all_tiles) break;
    const TileIndex tile = tile_index(args, index, heads_per_group, tiles);
    const HeadIndex h = head_index(args, tile.head);
    const int key0 = tile.tile * kKeys;
    const int64_t mask_offset = h.batch * args.mask.strides[0] + h.head * args.mask.strides[1];
    const char* k_tile = k_tiles + slot * Shape::kKeyBytes;
    const char* v_tile = v_tiles + slot * Shape::kKeyBytes;
    float* head_sums = dq_sums(args, h.flat);
    const uint64_t k_rows = rows_operand(k_tile + group * 64 * kRowBytes);
    const uint64_t v_rows = rows_operand(v_tile + group * 64 * kRowBytes);
    const uint64_t k_columns = columns_operand(k_tile + (kHeadDim > 64 ? group * kKeys * kRowBytes : 0), 0);

    float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
    float s[kQueries / 2], dp[kQueries / 2], dq[32];
    uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
    uint32_t mask_elements[kQueries / 2];  // of a step, until its dp is begun: there are no registers for both
    uint32_t key_elements[2];
    if (kMask == kKeyMask) {
      with_mask_elements(args.mask, [&](const auto* elements) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = min(key0 + strip + lane_row(2 * i), args.seq_len - 1);
          key_elements[i] = mask_bits(&elements[mask_offset + key * args.mask.strides[3]]);
        }
      });
    }

    const int walk_end = walk_ends[slot];
    const int walk_begin = args.causal ? key0 / kQueries : 0;
    if (kMask == kFullMask) fetch_mask<true>(args, mask_offset, key0 + strip, walk_begin * kQueries, mask_elements);
    for (int n = walk_begin; n < walk_end; ++n, ++step) {
      const int stage = step % kStages;
      const int parity = step / kStages % 2;
      const int row0 = n * kQueries;
      const char* q_tile = q_tiles + stage * Shape::kQueryBytes;
      const char* d_out_tile = d_out_tiles + stage * Shape::kQueryBytes;
      char* score_tile = score_tiles + stage * Shape::kScoreBytes;
      const float* lse2 = lse2_tiles + stage * kQueries;
      const float* delta = delta_tiles + stage * kQueries;
      const float* shift2 = shift2_tiles + stage * kQueries;

      barrier_wait(&q_full[stage], parity);
      multiply_rows<T, kHeadDim, kQueries>(s, k_rows, rows_operand(q_tile));
      wgmma_commit();
      bool large = false;  // whether any of the queries has a large score
#pragma unroll
      for (int i = 0; i < kQueries; i += 32) large |= shift2[i + threadIdx.x % 32] != 0.0f;
      large = __any_sync(0xFFFFFFFFu, large);
      if (kMask == kFullMask) {
        wgmma_wait<0>();
        pin(s);
        add_fetched<true>(args, mask_offset, key0 + strip, row0, scale_log2, mask_elements, s);
      }
      barrier_wait(&d_out_full[stage], parity);
      multiply_rows<T, kHeadDim, kQueries>(dp, v_rows, rows_operand(d_out_tile));
      wgmma_commit();
      if (kMask != kFullMask) {
        wgmma_wait<1>();
        pin(s);
      }

      // s: scores, then probabilities; those that dropout drops get a minus sign. With 128 queries only their 16-bit
      // form is kept.
      float added_by_mask[2];  // to the scores of the thread's keys
      if (kMask == kKeyMask) {
        with_added_by_bits(args.mask, [&](auto added_by) {
#pragma unroll
          for (int i = 0; i < 2; ++i) added_by_mask[i] = added_by(key_elements[i]);
        });
      }
      float to_log2 = kMask == kFullMask ? 1.0f : scale_log2;  // what scores are still to be multiplied with
      if (large) {
#pragma unroll
        for (int i = 0; i < kQueries / 2; ++i) {
          const int query = i / 8 * 16 + lane_column(i % 8);
          float score = s[i];
          if (kMask == kKeyMask) score = fmaf(score, scale_log2, added_by_mask[i / 2 % 2]);
          score = kMask == kNoMask ? fmaf(score, scale_log2, -shift2[query]) : score - shift2[query];
          s[i] = fminf(score, lse2[query]);  // at most that, however roundings fall
        }
        to_log2 = 1.0f;
        if (kMask == kKeyMask) added_by_mask[0] = added_by_mask[1] = 0.0f;
      }
      const bool edge = key0 + kKeys > args.seq_len || (args.causal && key0 + kKeys - 1 > row0);
#pragma unroll
      for (int m = 0; m < kQueries / 16; ++m) {
        float (&piece)[8] = reinterpret_cast<float (&)[8]>(s[8 * m]);
#pragma unroll
        for (int e = 0; e < 8; e += 4) {
          const float2 l = *reinterpret_cast<const float2*>(lse2 + 16 * m + lane_column(e));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float score = piece[e + i];
            if (kMask == kKeyMask) score = fmaf(score, to_log2, added_by_mask[i / 2]);
            const float exponent = fmaf(score, kMask == kNoMask ? to_log2 : 1.0f, -(i % 2 ? l.y : l.x));
            piece[e + i] = exp2_of(exponent);
          }
        }
        if (edge) {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int j = key0 + strip + lane_row(e);
            if (j >= args.seq_len || (args.causal && j > row0 + 16 * m + lane_column(e))) piece[e] = 0.0f;
          }
        }
        if (kDrops) {
          uint32_t numbers[8];
          numbers_by_key(philox_key, h.random, key0 + strip, row0 + 16 * m, numbers);
#pragma unroll
          for (int e = 0; e < 8; ++e) negate_dropped(piece[e], numbers[e], args.drop_limit);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float low = kDrops && !kPackedOnly ? fmaxf(piece[2 * e], 0.0f) : piece[2 * e];
          const float high = kDrops && !kPackedOnly ? fmaxf(piece[2 * e + 1], 0.0f) : piece[2 * e + 1];
          p[m][e] = pack<T>(low, high);
        }
      }

      const auto start_value_sums = [&] {
        pin(dv);
        wgmma_fence();
        const uint64_t d_out_columns = columns_operand(d_out_tile, kQueries * kRowBytes);
#pragma unroll
        for (int m = 0; m < kQueries / 16; ++m) wgmma<T, 1>(dv, p[m], d_out_columns + m * kColumnsStep, 1);
        wgmma_commit();
      };
      constexpr bool kSignedOperand =
          kDrops && kPackedOnly;  // there are no registers for probabilities with and without signs
      if constexpr (kSignedOperand) {
        wgmma_wait<0>();
      } else {
        start_value_sums();
        wgmma_wait<1>();
      }
      pin(dp);

#pragma unroll
      for (int m = 0; m < kQueries / 16; ++m) {
#pragma unroll
        for (int e = 0; e < 8; e += 4) {
          const float2 rows = *reinterpret_cast<const float2*>(delta + 16 * m + lane_column(e));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float probability = kPackedOnly ? unpack<T>(p[m][(e + i) / 2], i % 2) : s[8 * m + e + i];
            float d = dp[8 * m + e + i];
            if (kDrops) zero_unless_positive(d, probability);
            dp[8 * m + e + i] =
                (kDrops ? fabsf(probability) : probability) * (d * drop_scale - (i % 2 ? rows.y : rows.x));
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[m][e] = pack<T>(dp[8 * m + 2 * e], dp[8 * m + 2 * e + 1]);
        store_piece(score_tile + m / 4 * Shape::kScoreBlockBytes, strip, m % 4 * 16, ds[m]);
        if (kSignedOperand) {
#pragma unroll
          for (int e = 0; e < 4; ++e) p[m][e] = clear_negative(p[m][e]);
        }
      }
      if constexpr (kSignedOperand) start_value_sums();

      shared_proxy_fence();
      named_sync<1, 256>();
      pin(dk);
      pin(dq);
      wgmma_fence();
      const uint64_t scores = columns_operand(score_tile + (kHeadDim > 64 ? 0 : group * Shape::kScoreBlockBytes), 0);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        wgmma<T, 1, 1>(dq, scores + k * kColumnsStep, k_columns + k * kColumnsStep, k > 0);
      wgmma_commit();
      const uint64_t q_columns = columns_operand(q_tile, kQueries * kRowBytes);
#pragma unroll
      for (int m = 0; m < kQueries / 16; ++m) wgmma<T, 1>(dk, ds[m], q_columns + m * kColumnsStep, 1);
      wgmma_commit();

      wgmma_wait<1>();
      pin(dv);
      pin(dq);
      release(&d_out_empty[stage]);
      const int block = n * 2 + group;
      float* to = head_sums + block * kSumBlock + threadIdx.x % 128 * 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) add_to(to + i * 512, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
      if (kMask == kFullMask) fetch_mask<true>(args, mask_offset, key0 + strip, row0 + kQueries, mask_elements);
      wgmma_wait<0>();
      pin(dk);
      release(&q_empty[stage]);
    }

    release(&kv_empty[slot]);
    release(&added);

    // Through the rows of dS^T that this warp alone writes, in the stage that nobody reads any more.
    char* block = score_tiles + step % kStages * Shape::kScoreBytes;
    const auto store_tile = [&] {
      store_strip<T, kHeadDim>(dk, scale, scale, block, strip, qkv_head<T>(args, args.d_qkv, h, 1), args.token_stride(),
                               key0 + strip, args.seq_len, args.head_dim);
      add_to_bias<kHeadDim>(args, dv, drop_scale, h, 2, 0);
      store_strip<T, kHeadDim>(dv, drop_scale, drop_scale, block, strip, qkv_head<T>(args, args.d_qkv, h, 2),
                               args.token_stride(), key0 + strip, args.seq_len, args.head_dim);
    };
    barrier_wait(&may_take, t % 2);
    if (tile.head >= static_cast<uint32_t>(args.dq_lag)) {
      const uint32_t from = tile.head - args.dq_lag;
      const int row0 = key0 + group * 64;
      QueryGradient<T, kHeadDim> d_q;
      d_q.load(args, from, row0);
      store_tile();  // meanwhile
      d_q.clear(args, from, row0);
      d_q.store(args, from, row0, block, strip);
    } else {
      store_tile();
    }
    release(&has_taken);
  }
#endif
}

// d_q of the heads that no block took: a block per 128 queries.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(256) query_gradient_kernel(const AttentionArgs args) {
#if PFA_HOPPER_CODE
  __shared__ alignas(1024) char block[kQueriesTaken * kRowBytes];
  const int tiles = args.rows_padded / kQueriesTaken;
  const uint32_t heads = static_cast<uint32_t>(args.batch * args.num_heads);
  const uint32_t head = heads - gridDim.x / tiles + blockIdx.x / tiles;
  const int row0 = static_cast<int>(blockIdx.x % tiles) * kQueriesTaken + threadIdx.x / 128 * 64;
  QueryGradient<T, kHeadDim> d_q;
  d_q.load(args, head, row0);
  d_q.store(args, head, row0, block, threadIdx.x / 32 * 16);
#endif
}

int64_t blocks(const Context& context, const AttentionArgs& args) {
  return std::min<int64_t>(context.num_sms, ceil_div(args.seq_len, kKeys) * args.batch * args.num_heads);
}

template <class T, int kHeadDim>
void backward(const Context& context, const AttentionArgs& args, DType dtype) {
  const CUtensorMap qkv_map = tensor_map(args.qkv, dtype, args, 3);
  const CUtensorMap d_out_map = tensor_map(args.d_out, dtype, args, 1);
  with_mask_kind(args, [&](auto mask) {
    with_bool(args.drops, [&](auto drops) {
      launch(context, "attention_backward_hopper",
             backward_kernel<T, kHeadDim, decltype(mask)::value, decltype(drops)::value>, blocks(context, args),
             kThreads, BackwardShape<kHeadDim>::kSharedBytes, qkv_map, d_out_map, args,
             heads_per_group(args, kElementBytes));
    });
  });
  const int64_t heads = std::min<int64_t>(args.dq_lag, args.batch * args.num_heads);
  launch(context, "attention_query_gradient", query_gradient_kernel<T, kHeadDim>,
         heads * (args.rows_padded / kQueriesTaken), 256, 0, args);
}

}  // namespace
}  // namespace hopper

void attention_backward_hopper_plan(const Context& context, AttentionArgs& args) {
  const int64_t heads = args.batch * args.num_heads;
  const int64_t blocks = hopper::blocks(context, args);
  const int64_t tiles = ceil_div(args.seq_len, hopper::kKeys);
  // While a head's longest tile is worked on, blocks get through so many heads; and a few spare ones, so that hardly
  // anyone waits.
  const int64_t at_work = args.causal ? ceil_div(2 * blocks, tiles + 1) : ceil_div(blocks, tiles);
  const int64_t spare = 1 + at_work / (args.causal ? 6 : 2);
  // The heads of a group are worked on together, so what is taken must be of an earlier group. With causal masks the
  // shortest tiles come last in it, and when they are done the longest of a head `at_work` heads before are.
  const int64_t group = hopper::heads_per_group(args, hopper::kElementBytes);
  const int64_t lag = args.causal ? std::max(group, at_work - group + spare) : spare;
  args.dq_columns = args.head_dim > 64 ? 128 : 64;
  args.dq_lag = static_cast<int>(lag);
  args.dq_slots = static_cast<int>(std::min(heads, lag + std::max(at_work, group) + spare));
}

void attention_backward_hopper(const Context& context, const AttentionArgs& args, DType dtype) {
  with_head_dim<64, 128>(args.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    if (dtype == DType::kFloat16) {
      hopper::backward<__half, kHeadDim>(context, args, dtype);
    } else {
      hopper::backward<__nv_bfloat16, kHeadDim>(context, args, dtype);
    }
  });
}

}  // namespace cuda
}  // namespace pfa

#endif
