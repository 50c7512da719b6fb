// Attention, forward, on Hopper: the copy engine brings tiles of 128 keys and values, each warpgroup computes 64 rows
// of queries.
//
// Head dims up to 64: two blocks of two warpgroups share a multiprocessor, and one computes products while another
// computes exponentials. Else, or with a mask that is read in place, registers are too few for that, and there is one
// block of two computing warpgroups and one that copies; each computing warpgroup starts the next tile's scores before
// this tile's sums, and the two take turns at the tensor cores.
//
// A mask that is the same for all queries is brought to shared memory in units of log2 before the walk over the keys,
// which then leaves out tiles before the first and after the last key that may be seen. Any other mask comes by tiles
// with the copy engine, or, where its strides do not allow that, is read in place.
#include "core/cuda/attention/hopper/hopper.h"

#if CUDART_VERSION >= 12010

#include "core/cuda/attention/hopper/instructions.cuh"
#include "core/cuda/attention/hopper/tiles.h"

namespace pfa {
namespace cuda {
namespace hopper {
namespace {

constexpr int kKeys = 128;
constexpr int kQueries = 128;  // of a block: 64 of each computing warpgroup
constexpr int kStages = 2;
constexpr int kMostTilesBytes = 225 * 1024;  // in a multiprocessor's only block
constexpr int kMaskTiles =
    32;  // tiles of keys whose mask is in shared memory at a time, where it is the same for all queries

template <int kHeadDim, MaskKind kMask>
struct ForwardShape {
  static constexpr bool kCopies = kHeadDim > 64 || kMask == kFullMask;  // a warpgroup that only copies
  static constexpr int kThreads = kCopies ? 384 : 256;
  static constexpr int kBlocksPerSm = kCopies ? 1 : 2;
  static constexpr int kQueryBytes = 64 * kHeadDim * 2;  // of a warpgroup: its queries, in the end its result
  static constexpr int kTileBytes = kKeys * kHeadDim * 2;
  static constexpr int kMaskBlocks = kCopies ? 4 : 2;  // at most, of a part
  static constexpr int kTilesBytes = 2 * kQueryBytes + 2 * kStages * kTileBytes;
};

// How a tile of a mask comes to shared memory, of a warpgroup's 64 queries: in 1 or 2 parts, one after the other in 1
// or 2 stages, of so many blocks of 128 bytes a query.
struct MaskCopies {
  int log2_parts;
  int log2_stages;
  int blocks;
};

#if PFA_HOPPER_CODE

// What a warpgroup knows of its 64 rows, maxima in units of log2; a thread holds rows lane_row(0) and lane_row(2) of
// its warp's 16.
struct Rows {
  float maximum[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};
};

// Which of some tiles of keys have a mask other than zeros, and the first and the last tile with a key that may be
// seen.
struct KeyTiles {
  uint32_t masked;
  int first;
  int last;
};

// Brings the mask of tiles chunk * kMaskTiles.. below `tiles` to shared memory, in units of log2, a tile per warp at a
// time.
__device__ __forceinline__ void load_key_mask(const AttentionArgs& args, int64_t mask_offset, int chunk, int tiles,
                                              int warp, int warps, float* to, KeyTiles& found) {
  found.masked = 0;
  for (int i = warp; i < kMaskTiles; i += warps) {
    const int tile = chunk * kMaskTiles + i;
    if (tile >= tiles) return;
    constexpr int kLaneKeys = kKeys / 32;
    const int key = tile * kKeys + threadIdx.x % 32;
    float added[kLaneKeys];
    with_mask_elements(args.mask, [&](const auto* elements) {
#pragma unroll
      for (int k = 0; k < kLaneKeys; ++k) {
        const int j = min(key + 32 * k, args.seq_len - 1);
        added[k] = mask_log2<float>(elements[mask_offset + j * args.mask.strides[3]]);
      }
    });
    bool masked = false, visible = false;
#pragma unroll
    for (int k = 0; k < kLaneKeys; ++k) {
      if (key + 32 * k >= args.seq_len) added[k] = -INFINITY;
      masked |= added[k] != 0.0f;
      visible |= added[k] != -INFINITY;
      to[i * kKeys + threadIdx.x % 32 + 32 * k] = added[k];
    }
    if (__any_sync(0xFFFFFFFFu, masked)) found.masked |= 1u << i;
    if (__any_sync(0xFFFFFFFFu, visible)) {
      found.first = min(found.first, tile);
      found.last = max(found.last, tile);
    }
  }
}

// Scores to units of log2, with the mask of their keys.
__device__ __forceinline__ void add_key_mask(const float* mask, float scale_log2, float (&s)[kKeys / 2]) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const float2 added = *reinterpret_cast<const float2*>(mask + 8 * n + lane_column(0));
#pragma unroll
    for (int e = 0; e < 4; ++e) s[4 * n + e] = fmaf(s[4 * n + e], scale_log2, e % 2 ? added.y : added.x);
  }
}

// What two neighbouring float elements of a mask add, in units of log2.
template <class Element>
__device__ __forceinline__ float2 added_by_pair(uint32_t pair) {
  return make_float2(mask_log2<float>(unpack<Element>(pair, 0)), mask_log2<float>(unpack<Element>(pair, 1)));
}
template <class Element>
__device__ __forceinline__ float2 added_by_pair(uint64_t pair) {
  return make_float2(mask_log2<float>(__uint_as_float(static_cast<uint32_t>(pair))),
                     mask_log2<float>(__uint_as_float(static_cast<uint32_t>(pair >> 32))));
}

// Applies the warp's 16 rows of part kPart of a mask tile, which lies as the copy engine wrote it, and gives the scale
// that scores still need.
template <int kBlocks, int kPart>
__device__ __forceinline__ float apply_mask_tile(const Mask& mask, const char* strip, float scale_log2,
                                                 float (&s)[kKeys / 2]) {
  float scale = 1.0f;
  with_mask_elements(mask, [&](const auto* elements) {
    using Element = std::remove_cv_t<std::remove_reference_t<decltype(*elements)>>;
    constexpr int kSize = sizeof(Element);
    using Pair = std::conditional_t<kSize == 1, uint16_t, std::conditional_t<kSize == 2, uint32_t, uint64_t>>;
    constexpr int kColumns = sizeof(Element) > kBlocks ? kBlocks * kRowBytes / sizeof(Element) : kKeys;
    if constexpr (sizeof(Element) <= kMaxTiledMaskBytes && kPart * kColumns < kKeys) {
      const int lane = threadIdx.x % 32;
      const int place = (lane % 4 * 2 * kSize) ^ (lane / 4 * 16);
      const char* lane_rows = strip + lane / 4 * kRowBytes;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const int byte = 8 * n * kSize;
        const char* from =
            lane_rows + byte / kRowBytes * kCopyBytes + (place ^ (byte % kRowBytes / 16 * 16)) + byte % 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pair pair = *reinterpret_cast<const Pair*>(from + half * 8 * kRowBytes);
          float* scores = &s[kPart * kColumns / 2 + 4 * n + 2 * half];
          if constexpr (std::is_integral<Element>::value) {
            constexpr Pair kFirst = static_cast<Pair>(~Pair{0}) >> 8 * kSize;
            if ((pair & kFirst) == 0) scores[0] = -INFINITY;
            if ((pair & ~kFirst) == 0) scores[1] = -INFINITY;
          } else {
            const auto added = added_by_pair<Element>(pair);
            scores[0] = fmaf(scores[0], scale_log2, added.x);
            scores[1] = fmaf(scores[1], scale_log2, added.y);
          }
        }
      }
    }
    if constexpr (std::is_integral<Element>::value) scale = scale_log2;
  });
  return scale;
}

// Scores of 64 rows and kKeys keys, times `scale` in units of log2, to probabilities; gives what the sums so far must
// be multiplied with. kVotes: the scale may be 1 in some tiles and not in others, so that large scores are rounded
// before they are subtracted from.
template <bool kVotes>
__device__ __forceinline__ void softmax(const AttentionArgs& args, float scale, int row0, int col0, Rows& rows,
                                        float (&correction)[2], float (&s)[kKeys / 2]) {
  if (col0 + kKeys > args.seq_len || (args.causal && col0 + kKeys - 1 > row0)) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int limit = args.causal ? min(args.seq_len - 1, row0 + lane_row(i % 4)) : args.seq_len - 1;
      if (col0 + i / 4 * 8 + lane_column(i % 2) > limit) s[i] = -INFINITY;
    }
  }
  float highest[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
    highest[half] = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
  }
  if (kVotes && __any_sync(0xFFFFFFFFu, fmaxf(fabsf(highest[0]), fabsf(highest[1])) * scale > kLargeScore)) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) s[i] = scaled(s[i], scale);
#pragma unroll
    for (int half = 0; half < 2; ++half) highest[half] = scaled(highest[half], scale);
    scale = 1.0f;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float top = fmaxf(rows.maximum[half], highest[half] * scale);
    const float base = top == -INFINITY ? 0.0f : top;
    correction[half] = exp2_of(rows.maximum[half] - base);
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
__device__ __forceinline__ void probabilities(const AttentionArgs& args, PhiloxState philox_key, uint32_t head,
                                              int row0, int col0, float (&s)[kKeys / 2], uint32_t (&p)[kKeys / 16][4]) {
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
__device__ __forceinline__ void finish(const AttentionArgs& args, const HeadIndex& h, int row0, Rows& rows,
                                       const float (&o)[kHeadDim / 2], char* shared) {
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.total[half];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    factor[half] = sum > 0.0f ? static_cast<float>(args.drop_scale) / sum : 0.0f;
    const int row = row0 + lane_row(2 * half);
    if (threadIdx.x % 4 == 0) store_row_statistics(args, h.flat, row, rows.maximum[half], sum);
  }
  store_strip<T, kHeadDim>(o, factor[0], factor[1], shared, threadIdx.x / 32 % 4 * 16, out_head<T>(args, args.out, h),
                           args.heads_dim(), row0, args.seq_len, args.head_dim);
}

#endif

template <class T, int kHeadDim, MaskKind kMask, bool kDrops>
__global__ void __launch_bounds__(ForwardShape<kHeadDim, kMask>::kThreads, ForwardShape<kHeadDim, kMask>::kBlocksPerSm)
    forward_kernel(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap mask_map,
                   const MaskCopies mask_copies, const AttentionArgs args, const int heads_per_group) {
#if PFA_HOPPER_CODE
  write_random_state(args);
  using Shape = ForwardShape<kHeadDim, kMask>;
  extern __shared__ unsigned char unaligned[];
  char* shared = reinterpret_cast<char*>(unaligned) + (-shared_address(unaligned) & 1023);
  char* k_tiles = shared + 2 * Shape::kQueryBytes;
  char* v_tiles = k_tiles + kStages * Shape::kTileBytes;
  char* masks = v_tiles + kStages * Shape::kTileBytes;
  __shared__ int from_head, from_batch;  // for the copies
  __shared__ uint64_t q_full, k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];
  __shared__ uint64_t mask_full[2][kStages], mask_empty[2][kStages];  // by warpgroup
  __shared__ KeyTiles key_tiles;

  const TileIndex tile = tile_index(args, blockIdx.x, heads_per_group, (args.seq_len + kQueries - 1) / kQueries);
  const HeadIndex h = head_index(args, tile.head);
  const int row0 = (tile.tiles - 1 - tile.tile) * kQueries;
  const int end = args.causal ? min(args.seq_len, row0 + kQueries) : args.seq_len;
  const int64_t mask_offset = h.batch * args.mask.strides[0] + h.head * args.mask.strides[1];
  if (threadIdx.x == 0) {
    prefetch_map(qkv_map);
    if (kMask == kTiledMask) prefetch_map(mask_map);
    from_head = static_cast<int>(h.head);
    from_batch = static_cast<int>(h.batch);
    barrier_init(&q_full, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&k_full[i], 1);
      barrier_init(&v_full[i], 1);
      barrier_init(&k_empty[i], 8);
      barrier_init(&v_empty[i], 8);
    }
    if (kMask == kTiledMask) {
      for (int i = 0; i < 2 * kStages; ++i) {
        barrier_init(&mask_full[i / kStages][i % kStages], 1);
        barrier_init(&mask_empty[i / kStages][i % kStages], 4);
      }
    }
    if (kMask == kKeyMask) key_tiles = {0, INT_MAX, -1};
    barrier_init_fence();
  }
  __syncthreads();

  // Tiles are walked from the last to the first; where the mask has to be read to know the last, from the first, and
  // then from that after `skipped` others to the last that matters.
  const int tiles = (end + kKeys - 1) / kKeys;
  int steps = tiles - 1;  // after the first
  int skipped = 0;
  const auto tile_of = [&](int n) { return kMask != kKeyMask ? tiles - 1 - n : n == 0 ? 0 : skipped + n; };

  // The tile of step n lies in stage n % kStages and is its n / kStages-th tile.
  const auto copy_keys = [&](int n) {
    const int stage = n % kStages;
    if (n >= kStages) barrier_wait(&k_empty[stage], (n / kStages - 1) % 2);
    barrier_expect(&k_full[stage], Shape::kTileBytes);
    copy_tile<kKeys, kHeadDim>(k_tiles + stage * Shape::kTileBytes, qkv_map, &k_full[stage], from_head, 1,
                               tile_of(n) * kKeys, from_batch);
  };
  const auto copy_values = [&](int n) {
    const int stage = n % kStages;
    if (n >= kStages) barrier_wait(&v_empty[stage], (n / kStages - 1) % 2);
    barrier_expect(&v_full[stage], Shape::kTileBytes);
    copy_tile<kKeys, kHeadDim>(v_tiles + stage * Shape::kTileBytes, qkv_map, &v_full[stage], from_head, 2,
                               tile_of(n) * kKeys, from_batch);
  };
  const auto mask_stage = [&](int group, int stage) {
    return masks + (stage * 2 + group) * mask_copies.blocks * kCopyBytes;
  };
  const auto copy_mask = [&](int group, int n, int part) {
    const int copy = (n << mask_copies.log2_parts) + part;
    const int stage = copy & mask_copies.log2_stages;
    if (copy > mask_copies.log2_stages)
      barrier_wait(&mask_empty[group][stage], ((copy >> mask_copies.log2_stages) - 1) & 1);
    barrier_expect(&mask_full[group][stage], mask_copies.blocks * kCopyBytes);
    const int columns = kKeys >> mask_copies.log2_parts;
    for (int i = 0; i < mask_copies.blocks; ++i) {
      copy_block(mask_stage(group, stage) + i * kCopyBytes, mask_map, &mask_full[group][stage],
                 tile_of(n) * kKeys + part * columns + i * (columns / mask_copies.blocks),
                 args.mask.strides[1] ? from_head : 0, 0, row0 + group * 64, args.mask.strides[0] ? from_batch : 0);
    }
  };
  const auto release = [&](uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  };

  if (threadIdx.x == 0) {
    barrier_expect(&q_full, kQueries * kHeadDim * 2);
    copy_tile<64, kHeadDim>(shared, qkv_map, &q_full, from_head, 0, row0, from_batch);
    copy_tile<64, kHeadDim>(shared + Shape::kQueryBytes, qkv_map, &q_full, from_head, 0, row0 + 64, from_batch);
    copy_keys(0);
    copy_values(0);
  }
  if (kMask == kTiledMask && threadIdx.x % 128 == 0 && threadIdx.x < 256) copy_mask(threadIdx.x / 128, 0, 0);

  float* key_mask = reinterpret_cast<float*>(masks);
  if constexpr (kMask == kKeyMask) {
    KeyTiles found{0, INT_MAX, -1};
    for (int chunk = (tiles - 1) / kMaskTiles; chunk >= 0; --chunk) {
      load_key_mask(args, mask_offset, chunk, tiles, threadIdx.x / 32, Shape::kThreads / 32, key_mask, found);
    }
    if (threadIdx.x % 32 == 0) {
      atomicOr(&key_tiles.masked, found.masked);
      atomicMin(&key_tiles.first, found.first);
      atomicMax(&key_tiles.last, found.last);
    }
    __syncthreads();
    skipped = max(key_tiles.first - 1, 0);
    steps = max(key_tiles.last - skipped, 0);
  }

  if (Shape::kCopies && threadIdx.x < 128) {
    registers_give<24>();
    if (threadIdx.x == 0) {
      for (int n = 1; n <= steps; ++n) {
        copy_keys(n);
        copy_values(n);
      }
    }
    if (kMask == kTiledMask && (threadIdx.x == 32 || threadIdx.x == 64)) {
      for (int n = 1; n <= steps; ++n) copy_mask(threadIdx.x / 32 - 1, n, 0);
    }
    return;
  }
  if (Shape::kCopies) registers_take<240>();

  const int group = threadIdx.x / 128 - (Shape::kCopies ? 1 : 0);
  const int strip = row0 + group * 64 + threadIdx.x / 32 % 4 * 16;
  char* q_tile = shared + group * Shape::kQueryBytes;
  const float scale_log2 = static_cast<float>(args.score_scale * kLog2e);
  PhiloxState philox_key{};
  if (kDrops) philox_key = forward_philox(args);

  Rows rows;
  float correction[2];
  float o[kHeadDim / 2];
  float s[kKeys / 2];
  uint32_t p[kKeys / 16][4];

  // Applies the mask to step n's scores and gives the scale that they still need.
  const auto mask_scores = [&](int n) {
    float scale = scale_log2;
    if constexpr (kMask == kKeyMask) {
      const int place = tile_of(n) % kMaskTiles;
      if (key_tiles.masked >> place & 1) {
        add_key_mask(key_mask + place * kKeys, scale_log2, s);
        scale = 1.0f;
      }
    } else if constexpr (kMask == kTiledMask) {
      const auto apply_part = [&](auto part) {
        constexpr int kPart = decltype(part)::value;
        const int copy = (n << mask_copies.log2_parts) + kPart;
        const int stage = copy & mask_copies.log2_stages;
        barrier_wait(&mask_full[group][stage], copy >> mask_copies.log2_stages & 1);
        const char* rows_of_warp = mask_stage(group, stage) + threadIdx.x / 32 % 4 * 16 * kRowBytes;
        scale = apply_mask_tile<Shape::kMaskBlocks, kPart>(args.mask, rows_of_warp, scale_log2, s);
        release(&mask_empty[group][stage]);
        if (!Shape::kCopies) {
          const bool more = kPart < mask_copies.log2_parts;
          if (threadIdx.x % 128 == 0 && (more || n < steps)) copy_mask(group, more ? n : n + 1, more ? kPart + 1 : 0);
          __syncwarp();
        }
      };
      apply_part(std::integral_constant<int, 0>{});
      if (!Shape::kCopies && mask_copies.log2_parts > 0) apply_part(std::integral_constant<int, 1>{});
    } else if constexpr (kMask == kFullMask) {
      constexpr int kPart = kKeys / 4;  // there are no registers for the elements of all scores
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += kPart) {
        const int column0 = tile_of(n) * kKeys + 2 * i;
        uint32_t elements[kPart];
        fetch_mask<false>(args, mask_offset, strip, column0, elements);
        add_fetched<false>(args, mask_offset, strip, column0, scale_log2, elements,
                           reinterpret_cast<float (&)[kPart]>(s[i]));
      }
      scale = 1.0f;
    }
    return scale;
  };
  // Before step n: brings the mask of its tile to shared memory, where it is not there yet.
  const auto next_key_mask = [&](int n) {
    if (kMask != kKeyMask || tile_of(n) / kMaskTiles == tile_of(n - 1) / kMaskTiles) return;
    constexpr int kReady = 5;
    named_sync(kReady, 256);
    const int warp = threadIdx.x / 32 - (Shape::kCopies ? 4 : 0);
    if (warp == 0 && threadIdx.x % 32 == 0) key_tiles.masked = 0;
    KeyTiles found{};
    load_key_mask(args, mask_offset, tile_of(n) / kMaskTiles, tiles, warp, 8, key_mask, found);
    named_sync(kReady, 256);
    if (threadIdx.x % 32 == 0) atomicOr(&key_tiles.masked, found.masked);
    named_sync(kReady, 256);
  };

  if constexpr (Shape::kCopies) {
    barrier_wait(&q_full, 0);
    barrier_wait(&k_full[0], 0);
    start_scores<T, kHeadDim>(s, q_tile, k_tiles);
    wgmma_wait<0>();
    pin(s);
    release(&k_empty[0]);
    softmax<kMask == kKeyMask || kMask == kTiledMask>(args, mask_scores(0), strip, tile_of(0) * kKeys, rows, correction,
                                                      s);
    probabilities<T, kDrops>(args, philox_key, h.random, strip, tile_of(0) * kKeys, s, p);
    constexpr int kTurn = 1;  // named barriers 1 and 2: the warpgroup's turn at the tensor cores
    if (group == 1 && steps > 0) named_arrive(kTurn, 256);
    for (int n = 1; n <= steps; ++n) {
      const int col0 = tile_of(n) * kKeys;
      next_key_mask(n);
      barrier_wait(&k_full[n % kStages], n / kStages % 2);
      named_sync(kTurn + group, 256);
      start_scores<T, kHeadDim>(s, q_tile, k_tiles + n % kStages * Shape::kTileBytes);
      barrier_wait(&v_full[(n - 1) % kStages], (n - 1) / kStages % 2);
      start_sums<T, kHeadDim>(o, p, v_tiles + (n - 1) % kStages * Shape::kTileBytes, n > 1);
      if (group == 0 || n < steps) named_arrive(kTurn + 1 - group, 256);
      wgmma_wait<1>();
      pin(s);
      release(&k_empty[n % kStages]);
      softmax<kMask == kKeyMask || kMask == kTiledMask>(args, mask_scores(n), strip, col0, rows, correction, s);
      wgmma_wait<0>();
      pin(o);
      release(&v_empty[(n - 1) % kStages]);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
      probabilities<T, kDrops>(args, philox_key, h.random, strip, col0, s, p);
    }
    barrier_wait(&v_full[steps % kStages], steps / kStages % 2);
    start_sums<T, kHeadDim>(o, p, v_tiles + steps % kStages * Shape::kTileBytes, steps > 0);
    wgmma_wait<0>();
    pin(o);
  } else {
    const bool copies = threadIdx.x == 0;
    barrier_wait(&q_full, 0);
    for (int n = 0; n <= steps; ++n) {
      const int stage = n % kStages;
      const int parity = n / kStages % 2;
      const int col0 = tile_of(n) * kKeys;
      if (n > 0) next_key_mask(n);
      barrier_wait(&k_full[stage], parity);
      start_scores<T, kHeadDim>(s, q_tile, k_tiles + stage * Shape::kTileBytes);
      if (copies && n < steps) copy_keys(n + 1);
      __syncwarp();
      wgmma_wait<0>();
      pin(s);
      release(&k_empty[stage]);
      softmax<kMask == kKeyMask || kMask == kTiledMask>(args, mask_scores(n), strip, col0, rows, correction, s);
      if (copies && n < steps) copy_values(n + 1);
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
  finish<T, kHeadDim>(args, h, strip, rows, o, q_tile);
#endif
}

template <class T, int kHeadDim, MaskKind kMask>
void forward(const Context& context, const AttentionArgs& args, DType dtype, const CUtensorMap& mask_map) {
  using Shape = ForwardShape<kHeadDim, kMask>;
  MaskCopies mask_copies{};
  int mask_bytes = 0;
  if (kMask == kKeyMask) mask_bytes = std::min<int>(ceil_div(args.seq_len, kKeys), kMaskTiles) * kKeys * 4;
  if (kMask == kTiledMask) {
    const int blocks = static_cast<int>(size_of(args.mask.dtype));
    mask_copies.log2_parts = blocks > Shape::kMaskBlocks ? 1 : 0;
    mask_copies.blocks = blocks >> mask_copies.log2_parts;
    mask_bytes = mask_copies.blocks * kQueries * kRowBytes;
    mask_copies.log2_stages = Shape::kCopies && Shape::kTilesBytes + 2 * mask_bytes <= kMostTilesBytes ? 1 : 0;
    mask_bytes <<= mask_copies.log2_stages;
  }
  with_bool(args.drops, [&](auto drops) {
    const auto kernel = forward_kernel<T, kHeadDim, kMask, decltype(drops)::value>;
    // Tiles begin at a multiple of 1024 bytes. Two blocks with a tiled mask just fit, if no more is left for that than
    // lies before the first multiple behind what the kernel declares.
    size_t to_multiple = 1024;
    if (kMask == kTiledMask && Shape::kBlocksPerSm == 2) {
      to_multiple -= kernel_attributes(context, reinterpret_cast<const void*>(kernel)).sharedSizeBytes % 1024;
    }
    const size_t shared_bytes = to_multiple + Shape::kTilesBytes + mask_bytes;
    launch(context, "attention_forward_hopper", kernel, ceil_div(args.seq_len, kQueries) * args.batch * args.num_heads,
           Shape::kThreads, shared_bytes, tensor_map(args.qkv, dtype, args, 3), mask_map, mask_copies, args,
           heads_per_group(args, 4));  // k, v
  });
}

template <class T, int kHeadDim>
void forward(const Context& context, const AttentionArgs& args, DType dtype) {
  CUtensorMap mask_map{};
  with_mask_kind(args, [&](auto mask) {
    constexpr MaskKind kMask = decltype(mask)::value;
    if (kMask == kFullMask && mask_tensor_map(args, &mask_map)) {
      forward<T, kHeadDim, kTiledMask>(context, args, dtype, mask_map);
    } else {
      forward<T, kHeadDim, kMask>(context, args, dtype, mask_map);
    }
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
  const void* kernel = reinterpret_cast<const void*>(hopper::forward_kernel<__half, 64, hopper::kNoMask, false>);
  return kernel_attributes(context, kernel).sharedSizeBytes > 0;  // code for other targets is empty and has no barriers
}

}  // namespace cuda
}  // namespace pfa

#endif
