// Attention, forward, on Hopper: the copy engine brings tiles of 128 keys and values, each warpgroup computes 64 rows
// of queries.
//
// Head dims up to 64: two thread blocks of two warpgroups share a multiprocessor, and one computes products while
// another computes exponentials. Else, or with a mask that is read in place, registers are too few for that. There is
// one thread block of three warpgroups then. One copies; each of the two others starts the next tile's scores before
// this tile's sums, and they take turns at the tensor cores.
//
// A mask that is the same for all queries is brought to shared memory in units of log2 before the walk over the keys.
// The walk then leaves out tiles before the first and after the last key that may be seen. Any other mask comes by
// tiles with the copy engine, or is read in place where its strides do not allow that.
//
// Ranges of hidden queries leave out tiles anywhere: a warp lists the others before the walk (hidden_tiles.cuh), first
// those of which nothing is hidden. The ranges of the others' keys come to shared memory beside the keys, and a
// warpgroup passes over those of which it sees nothing.
#pragma once

#include "core/cuda/attention/dropout.cuh"
#include "core/cuda/attention/hopper/hidden_tiles.cuh"
#include "core/cuda/attention/hopper/mask.cuh"
#include "core/cuda/attention/hopper/ring.cuh"
#include "core/cuda/attention/hopper/store.cuh"
#include "core/cuda/attention/residue.cuh"
#include "core/cuda/attention/softmax.cuh"
#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kQueries = kQueryTile;  // of a thread block: 64 of each computing warpgroup

template <int kHeadDim, MaskKind kMask>
struct ForwardShape {
  static constexpr bool kCopies = kHeadDim > 64 || kMask == kFullMask;  // a warpgroup that only copies
  static constexpr int kThreads = kCopies ? 384 : 256;
  static constexpr int kBlocksPerSm = kCopies ? 1 : 2;
  static constexpr int kQueryBytes = 64 * kHeadDim * 2;  // of a warpgroup: its queries, in the end its result
  static constexpr int kTileBytes = kKeys * kHeadDim * 2;
  static constexpr int kMaskPanels = kCopies ? 4 : 2;  // at most, of a part
  static constexpr int kTilesBytes = 2 * kQueryBytes + 2 * kStages * kTileBytes;
};
constexpr int kRangesBytes = kKeys * sizeof(uint2);  // of one range of each of a tile's keys

struct ForwardMaps {
  CUtensorMap query;
  CUtensorMap key;
  CUtensorMap value;
  CUtensorMap mask;
};

#if PFA_HOPPER_CODE

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

// What the threads of a thread block share, beside the tiles.
struct ForwardShared {
  // Where copies come from: in shared memory, to spare registers.
  int query_head, key_head;
  MapRows query_rows, key_rows;
  const CUtensorMap *key_map, *value_map;
  uint64_t q_full;
  Ring<kStages, kSanitized ? 256 : 8> k, v;
  Ring<kStages, kSanitized ? 128 : 4> mask[2];  // by warpgroup
  KeyTiles key_tiles;
  int2 listed;  // with ranges: the tiles of either phase of the walk
};

// Named barriers: 1 and 2 say which warpgroup's turn it is at the tensor cores.
constexpr int kTurnBarrier = 1;
constexpr int kOwnBarrier = 3;  // and 4: one warpgroup's own
constexpr int kKeyMaskBarrier = 5;

// The roles of a thread block's warps. A thread's role is produce, or one of consume_in_turns and consume_alone.
template <class T, int kHeadDim, MaskKind kMask, bool kDrops, bool kPacked>
struct ForwardRoles {
  using Shape = ForwardShape<kHeadDim, kMask>;

  const ForwardMaps& maps;
  const MaskCopies& mask_copies;
  const HiddenTiles& hidden;
  const ForwardArgs& args;
  ForwardShared& shared;
  char* tiles;  // of queries [2][64][D], keys [kStages][kKeys][D] and values; then the mask,
                // or ranges [kStages][1 or 2][kKeys] and the list of tiles that they leave
  HeadState head;
  int row0;        // the thread block's first query
  int first_tile;  // of keys, and the one after the last
  int end_tile;
  int skipped = 0;  // a tile that lies before the second that is walked, where the mask had to be read to know that
  int steps;        // of the walk, after its first
  int plain = 0;    // tiles at its beginning of which ranges hide nothing

  __device__ __forceinline__ ForwardRoles(const ForwardMaps& maps, const MaskCopies& mask_copies,
                                          const HiddenTiles& hidden, const ForwardArgs& args, ForwardShared& shared,
                                          char* tiles, const SequenceTile& tile)
      : maps(maps),
        mask_copies(mask_copies),
        hidden(hidden),
        args(args),
        shared(shared),
        tiles(tiles),
        head(head_state<kPacked>(args, tile.head, kDrops)),
        row0(tile.first) {
    const Range<int> walk = walk_over_keys(visibility(), row0);
    first_tile = walk.first;
    end_tile = walk.end;
    steps = end_tile - first_tile - 1;
  }

  __device__ __forceinline__ const Visibility<int>& visibility() const { return head_visibility<kPacked>(args, head); }

  // [64][D], as panels of 64 columns.
  __device__ __forceinline__ char* q_tile(int group) const { return tiles + group * Shape::kQueryBytes; }
  // [kKeys][D]
  __device__ __forceinline__ char* k_tile(int stage) const {
    return tiles + 2 * Shape::kQueryBytes + stage * Shape::kTileBytes;
  }
  __device__ __forceinline__ char* v_tile(int stage) const { return k_tile(kStages + stage); }
  __device__ __forceinline__ char* masks() const { return k_tile(2 * kStages); }
  // [64] x panels of 128 bytes
  __device__ __forceinline__ char* mask_tile(int group, int stage) const {
    return masks() + (stage * 2 + group) * mask_copies.panels * kCopyBytes;
  }
  __device__ __forceinline__ bool two_ranges() const { return hidden.ranges_of_key == 2; }
  // [1 or 2][kKeys]
  __device__ __forceinline__ uint2* ranges_tile(int stage) const {
    return reinterpret_cast<uint2*>(masks() + stage * hidden.ranges_of_key * kRangesBytes);
  }
  __device__ __forceinline__ uint16_t* tile_list() const { return reinterpret_cast<uint16_t*>(ranges_tile(kStages)); }
  // [min(tiles, kMaskTiles)][kKeys]
  __device__ __forceinline__ float* key_mask() const { return reinterpret_cast<float*>(masks()); }

  // Which tile of keys is step n of the walk. Tiles are walked from the last to the first. Where the mask has to be
  // read to know the last, they are walked from the first, and then from that after `skipped` to the last that matters.
  __device__ __forceinline__ int tile_of(int n) const {
    if (kMask == kRanges) return tile_list()[n] & kTileOfEntry;
    return kMask != kKeyMask ? end_tile - 1 - n : n == 0 ? first_tile : skipped + n;
  }
  __device__ __forceinline__ int key0_of(int n) const { return tile_of(n) * kKeys; }

  __device__ __forceinline__ void copy_queries() const {
    barrier_expect(&shared.q_full, 2 * Shape::kQueryBytes);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      copy_tile<64, kHeadDim, kPacked>(q_tile(group), maps.query, &shared.q_full, shared.query_head,
                                       first_of(shared.query_rows) + row0 + group * 64, shared.query_rows.sequence);
    }
  }

  // Row 0 among a map's rows.
  static __device__ __forceinline__ int first_of(const MapRows& rows) { return kPacked ? rows.first : 0; }

  __device__ __forceinline__ void copy_keys(int n) const {
    const RingStep step = ring_step<kStages>(n);
    const int ranges = kMask == kRanges && n >= shared.listed.x ? hidden.ranges_of_key : 0;
    uint64_t* full = shared.k.fill(step, Shape::kTileBytes + ranges * kRangesBytes);
    copy_tile<kKeys, kHeadDim, kPacked>(k_tile(step.stage), *shared.key_map, full, shared.key_head,
                                        first_of(shared.key_rows) + key0_of(n), shared.key_rows.sequence);
    for (int r = 0; r < ranges; ++r) {
      copy_bytes(ranges_tile(step.stage) + r * kKeys, hidden.ranges_of(head.index, r) + key0_of(n), kRangesBytes, full);
    }
  }

  __device__ __forceinline__ void copy_values(int n) const {
    const RingStep step = ring_step<kStages>(n);
    uint64_t* full = shared.v.fill(step, Shape::kTileBytes);
    copy_tile<kKeys, kHeadDim, kPacked>(v_tile(step.stage), *shared.value_map, full, shared.key_head,
                                        first_of(shared.key_rows) + key0_of(n), shared.key_rows.sequence);
  }

  __device__ __forceinline__ RingStep mask_step(int n, int part) const {
    const int copy = (n << mask_copies.log2_parts) + part;
    return {copy & mask_copies.log2_stages, copy >> mask_copies.log2_stages};
  }

  // Copies the mask of a warpgroup's 64 queries.
  __device__ __forceinline__ void copy_mask(int group, int n, int part) const {
    const RingStep step = mask_step(n, part);
    uint64_t* full = shared.mask[group].fill(step, mask_copies.panels * kCopyBytes);
    const int columns = kKeys >> mask_copies.log2_parts;
    for (int i = 0; i < mask_copies.panels; ++i) {
      copy_panel(mask_tile(group, step.stage) + i * kCopyBytes, maps.mask, full,
                 key0_of(n) + part * columns + i * (columns / mask_copies.panels),
                 args.mask.strides[1] ? shared.query_head : 0, row0 + group * 64,
                 args.mask.strides[0] ? shared.query_rows.sequence : 0, 0);
    }
  }

  // By a warp, before others copy: what ranges leave of the walk. Queries that see no key walk over one tile all the
  // same.
  __device__ __forceinline__ void list_walk() const {
    const TileBits* rows = hidden.row(head.index, row0 / kHalfTile);
    const int2 listed = list_tiles(rows, hidden.words, {first_tile, end_tile}, tile_list());
    if (threadIdx.x % 32 == 0) {
      const bool none = listed.x + listed.y == 0;
      if (none) tile_list()[0] = static_cast<uint16_t>(first_tile);
      shared.listed = make_int2(listed.x, none ? 1 : listed.y);
    }
  }

  // All threads call this before the walk. It starts the copies of the first step, and brings a key mask to shared
  // memory.
  __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      copy_queries();
      copy_keys(0);
      copy_values(0);
    }
    if (kMask == kTiledMask && threadIdx.x % 128 == 0 && threadIdx.x < 256) copy_mask(threadIdx.x / 128, 0, 0);
    if constexpr (kMask == kKeyMask) {
      KeyTiles found{0, INT_MAX, -1};
      for (int chunk = (end_tile - 1) / kMaskTiles; chunk >= first_tile / kMaskTiles; --chunk) {
        load_key_mask(args, head.mask_offset, chunk, end_tile, threadIdx.x / 32, Shape::kThreads / 32, key_mask(),
                      found);
      }
      if (threadIdx.x % 32 == 0) {
        atomicOr(&shared.key_tiles.masked, found.masked);
        atomicMin(&shared.key_tiles.first, found.first);
        atomicMax(&shared.key_tiles.last, found.last);
      }
      __syncthreads();
      skipped = max(shared.key_tiles.first - 1, first_tile);
      steps = max(shared.key_tiles.last - skipped, 0);
    }
    if constexpr (kMask == kRanges) {
      plain = shared.listed.x;
      steps = plain + shared.listed.y - 1;
    }
  }

  // The warpgroup that copies: one thread keys and values, two others the mask.
  __device__ __forceinline__ void produce() const {
    if (threadIdx.x == 0) {
      for (int n = 1; n <= steps; ++n) {
        copy_keys(n);
        copy_values(n);
      }
    }
    if (kMask == kTiledMask && (threadIdx.x == 32 || threadIdx.x == 64)) {
      for (int n = 1; n <= steps; ++n) copy_mask(threadIdx.x / 32 - 1, n, 0);
    }
  }

  // Before step n: brings the mask of its tile to shared memory, where it is not there yet.
  __device__ __forceinline__ void next_key_mask(int n) const {
    if (kMask != kKeyMask || tile_of(n) / kMaskTiles == tile_of(n - 1) / kMaskTiles) return;
    named_sync(kKeyMaskBarrier, 256);
    const int warp = threadIdx.x / 32 - (Shape::kCopies ? 4 : 0);
    if (warp == 0 && threadIdx.x % 32 == 0) shared.key_tiles.masked = 0;
    KeyTiles found{};
    load_key_mask(args, head.mask_offset, tile_of(n) / kMaskTiles, end_tile, warp, 8, key_mask(), found);
    named_sync(kKeyMaskBarrier, 256);
    if (threadIdx.x % 32 == 0) atomicOr(&shared.key_tiles.masked, found.masked);
    named_sync(kKeyMaskBarrier, 256);
  }

  // Part kPart of the mask of step n, of the scores s [64][kKeys]. Starts the copy that follows it where nobody else
  // does.
  template <int kPart>
  __device__ __forceinline__ float add_mask_part(int group, int n, float scale_log2, float (&s)[kKeys / 2]) const {
    const RingStep step = mask_step(n, kPart);
    shared.mask[group].wait_full(step);
    const char* rows_of_warp = mask_tile(group, step.stage) + threadIdx.x / 32 % 4 * 16 * kRowBytes;
    const float scale = apply_mask_tile<Shape::kMaskPanels, kPart>(args.mask, rows_of_warp, scale_log2, s);
    shared.mask[group].release(step);
    if (!Shape::kCopies) {
      const bool more = kPart < mask_copies.log2_parts;
      if (threadIdx.x % 128 == 0 && (more || n < steps)) copy_mask(group, more ? n : n + 1, more ? kPart + 1 : 0);
      __syncwarp();
    }
    return scale;
  }

  // Applies the mask to step n's scores s [64][kKeys], of which the warp holds 16 rows from `strip` on. Gives the scale
  // that they still need.
  __device__ __forceinline__ float add_mask(int group, int strip, int n, float (&s)[kKeys / 2]) const {
    const float scale_log2 = static_cast<float>(args.score_scale * kLog2e);
    if constexpr (kMask == kKeyMask) {
      const int place = tile_of(n) % kMaskTiles;
      if (!(shared.key_tiles.masked >> place & 1)) return scale_log2;
      add_key_mask(key_mask() + place * kKeys, scale_log2, s);
      return 1.0f;
    } else if constexpr (kMask == kTiledMask) {
      float scale = add_mask_part<0>(group, n, scale_log2, s);
      if (!Shape::kCopies && mask_copies.log2_parts > 0) scale = add_mask_part<1>(group, n, scale_log2, s);
      return scale;
    } else if constexpr (kMask == kFullMask) {
      constexpr int kPart = kKeys / 4;  // there are no registers for the elements of all scores
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += kPart) {
        const int column0 = key0_of(n) + 2 * i;
        uint32_t elements[kPart];
        fetch_mask<false>(args, head.mask_offset, strip, column0, elements);
        add_fetched<false>(args, head.mask_offset, strip, column0, scale_log2, elements,
                           reinterpret_cast<float (&)[kPart]>(s[i]));
      }
      return 1.0f;
    } else {
      return scale_log2;
    }
  }

  // Step n's scores s [64][kKeys] to probabilities, before dropout.
  __device__ __forceinline__ void exponentiate(int group, int strip, int n, StripSoftmax& softmax,
                                               float (&correction)[2], float (&s)[kKeys / 2]) const {
    const float scale = add_mask(group, strip, n, s);
    hide_scores(visibility(), strip, key0_of(n), s);
    softmax.add_tile<kMask == kKeyMask || kMask == kTiledMask>(scale, correction, s);
  }

  // Probabilities s [64][kKeys], after dropout, as operands p of the product with the values.
  __device__ __forceinline__ void drop_and_pack(int strip, int n, float (&s)[kKeys / 2],
                                                uint32_t (&p)[kKeys / 16][4]) const {
#pragma unroll
    for (int m = 0; m < kKeys / 16; ++m) {
      if (kDrops) {
        uint32_t numbers[8];
        numbers_by_query(head.philox_key, head.index.dropout_head, strip, key0_of(n) + 16 * m, numbers);
#pragma unroll
        for (int e = 0; e < 8; ++e) zero_dropped(s[8 * m + e], numbers[e], args.drop_limit);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) p[m][e] = pack<T>(s[8 * m + 2 * e], s[8 * m + 2 * e + 1]);
    }
  }

  static __device__ __forceinline__ void correct(const float (&correction)[2], float (&o)[kHeadDim / 2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
  }

  // Whether a warpgroup sees some of step n's tile.
  __device__ __forceinline__ bool sees(int group, int n) const { return sees_entry(tile_list()[n], group); }

  // A warpgroup of two, the third of which copies.
  __device__ __forceinline__ void consume_in_turns(int group, int strip, StripSoftmax& softmax,
                                                   float (&o)[kHeadDim / 2]) const {
    float correction[2];
    float s[kKeys / 2];         // scores [64][kKeys]
    uint32_t p[kKeys / 16][4];  // probabilities [64][kKeys]
    barrier_wait(&shared.q_full, 0);
    shared.k.wait_full(ring_step<kStages>(0));
    start_scores<T, kHeadDim>(s, q_tile(group), k_tile(0));
    HiddenKeys hidden_keys;
    if (kMask == kRanges && plain == 0) hidden_keys.find(ranges_tile(0), two_ranges(), strip);
    wgmma_wait<0>();
    pin(s);
    if (kMask == kRanges && plain == 0) hidden_keys.hide(ranges_tile(0), two_ranges(), strip, s);
    shared.k.release(ring_step<kStages>(0));
    exponentiate(group, strip, 0, softmax, correction, s);
    drop_and_pack(strip, 0, s, p);
    if (group == 1 && steps > 0) named_arrive(kTurnBarrier, 256);
    const auto step = [&](int n, auto ranges_hide) {
      constexpr bool kHides = decltype(ranges_hide)::value;
      const RingStep step = ring_step<kStages>(n);
      const RingStep last = ring_step<kStages>(n - 1);
      next_key_mask(n);
      shared.k.wait_full(step);
      named_sync(kTurnBarrier + group, 256);
      if (kHides && !sees(group, n)) {
        shared.v.wait_full(last);
        start_sums<T, kHeadDim>(o, p, v_tile(last.stage), n > 1);
        if (group == 0 || n < steps) named_arrive(kTurnBarrier + 1 - group, 256);
        wgmma_wait<0>();
        pin(o);
        shared.k.release(step);
        shared.v.release(last);
#pragma unroll
        for (int m = 0; m < kKeys / 16; ++m) p[m][0] = p[m][1] = p[m][2] = p[m][3] = 0;
        return;
      }
      start_scores<T, kHeadDim>(s, q_tile(group), k_tile(step.stage));
      shared.v.wait_full(last);
      start_sums<T, kHeadDim>(o, p, v_tile(last.stage), n > 1);
      if (group == 0 || n < steps) named_arrive(kTurnBarrier + 1 - group, 256);
      if (kHides) hidden_keys.find(ranges_tile(step.stage), two_ranges(), strip);
      wgmma_wait<1>();
      pin(s);
      if (kHides) hidden_keys.hide(ranges_tile(step.stage), two_ranges(), strip, s);
      shared.k.release(step);
      exponentiate(group, strip, n, softmax, correction, s);
      wgmma_wait<0>();
      pin(o);
      shared.v.release(last);
      correct(correction, o);
      drop_and_pack(strip, n, s, p);
    };
    int n = 1;
    for (; n < (kMask == kRanges ? plain : steps + 1); ++n) step(n, std::false_type{});
    if constexpr (kMask == kRanges) {
      for (; n <= steps; ++n) step(n, std::true_type{});
    }
    const RingStep last = ring_step<kStages>(steps);
    shared.v.wait_full(last);
    start_sums<T, kHeadDim>(o, p, v_tile(last.stage), steps > 0);
    wgmma_wait<0>();
    pin(o);
  }

  // A warpgroup of two, the first of which also copies.
  __device__ __forceinline__ void consume_alone(int group, int strip, StripSoftmax& softmax,
                                                float (&o)[kHeadDim / 2]) const {
    float correction[2];
    float s[kKeys / 2];         // scores [64][kKeys]
    uint32_t p[kKeys / 16][4];  // probabilities [64][kKeys]
    const bool copies = threadIdx.x == 0;
    barrier_wait(&shared.q_full, 0);
    const auto step = [&](int n, auto ranges_hide) {
      constexpr bool kHides = decltype(ranges_hide)::value;
      const RingStep step = ring_step<kStages>(n);
      if (kHides && !sees(group, n)) {
        shared.k.wait_full(step);
        shared.k.release(step);
        if (copies && n < steps) {
          copy_keys(n + 1);
          copy_values(n + 1);
        }
        __syncwarp();
        shared.v.wait_full(step);
        shared.v.release(step);
        return;
      }
      if (n > 0) next_key_mask(n);
      shared.k.wait_full(step);
      start_scores<T, kHeadDim>(s, q_tile(group), k_tile(step.stage));
      if (copies && n < steps) copy_keys(n + 1);
      __syncwarp();
      HiddenKeys hidden_keys;
      if (kHides) hidden_keys.find(ranges_tile(step.stage), two_ranges(), strip);
      wgmma_wait<0>();
      pin(s);
      if (kHides) hidden_keys.hide(ranges_tile(step.stage), two_ranges(), strip, s);
      shared.k.release(step);
      exponentiate(group, strip, n, softmax, correction, s);
      if (copies && n < steps) copy_values(n + 1);
      __syncwarp();
      if (kMask == kRanges || n > 0) correct(correction, o);
      drop_and_pack(strip, n, s, p);
      shared.v.wait_full(step);
      start_sums<T, kHeadDim>(o, p, v_tile(step.stage), kMask == kRanges || n > 0);
      wgmma_wait<0>();
      pin(o);
      shared.v.release(step);
    };
    if constexpr (kMask == kRanges) {
      // Which step is the first that the warpgroup sees is not known.
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
    }
    int n = 0;
    for (; n < (kMask == kRanges ? plain : steps + 1); ++n) step(n, std::false_type{});
    if constexpr (kMask == kRanges) {
      for (; n <= steps; ++n) step(n, std::true_type{});
    }
  }

  // The warp's 16 rows of the result, by way of the place where the warpgroup's queries were.
  __device__ __forceinline__ void store(int group, int strip, StripSoftmax& softmax,
                                        const float (&o)[kHeadDim / 2]) const {
    named_sync(kOwnBarrier + group, 128);
    float factor[2];
    softmax.finish(args, head, strip, factor);
    store_residues<T, kHeadDim>(args, head, o, factor, strip, visibility().queries);
    const HeadRows<T> out = args.layout.template query_rows<T>(args.out, head.index);
    store_strip<T, kHeadDim>(o, factor[0], factor[1], q_tile(group), threadIdx.x / 32 % 4 * 16, out, strip,
                             visibility().queries, args.head_dim());
  }
};

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
