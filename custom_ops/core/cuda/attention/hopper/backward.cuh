// Attention, backward, on Hopper: a thread block owns 128 keys and walks over the queries; d_k and d_v stay in
// registers.
//
// Rows are keys: each of two computing warpgroups holds 64 of them, and P^T and dS^T are operands from registers for
// d_v and d_k. dS^T also goes to shared memory, where both warpgroups meet, for d_q = dS k: with head dims up to 64
// each computes 64 of the tile's 128 queries, else each computes half of the head dims of 64 queries. A third warpgroup
// copies, and takes the thread block's next tile of keys while the others are at work on this one. The walk goes over
// the queries of one head of the group after the other.
//
// d_q is added up in device memory; schedule.h says how thread blocks share that. d_q and d_v, on their way out of
// registers, are summed over the tokens as well: the gradient of the QKV bias. The sum of d_k is zero, for what is
// added to all keys alike moves all scores of a query alike.
//
// Where gradients are to have the same bits each time, two more warps see to the order of d_q's sums: one waits for the
// thread block's turn at each step's queries, the other tells when it is over.
//
// Where the mask is the same for all queries, a thread holds its two keys' elements, and a tile of keys that nobody
// sees has no walk. The elements of any other mask are loaded a step ahead. Of ranges of hidden queries the thread that
// copies finds the tiles that they leave (hidden_tiles.cuh), and tells the others. What position or ranges hide of a
// tile a thread knows as bits of the queries that see its keys.
#pragma once

#include "core/cuda/attention/hopper/backward_shared.cuh"
#include "core/cuda/attention/hopper/mask.cuh"
#include "core/cuda/attention/hopper/query_gradient.cuh"
#include "core/cuda/attention/hopper/turns.cuh"
#include "core/cuda/attention/score_gradient.cuh"
#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

#if PFA_HOPPER_CODE

// d = the warpgroup's 64 rows of k or v times the rows of q or d_out.
template <class T, int kHeadDim, int kQueries>
__device__ __forceinline__ void multiply_rows(float (&d)[kQueries / 2], uint64_t keys, uint64_t queries) {
  constexpr int kKeyPanel = kKeys * kRowBytes / 16;  // from a panel of 64 columns to the next, as descriptors count
  constexpr int kQueryPanel = kQueries * kRowBytes / 16;
  pin(d);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    const uint64_t a = keys + i / 4 * kKeyPanel + i % 4 * kRowsStep;
    const uint64_t b = queries + i / 4 * kQueryPanel + i % 4 * kRowsStep;
    wgmma<T, 0, 0>(d, a, b, i > 0);
  }
}

constexpr int kScoresBarrier = 1;  // a named barrier of the computing warpgroups

// The roles of a thread block's warps: produce, exchange, consume, await turns and end them. All go through the thread
// block's tiles of keys, t = 0, 1, ..., and all but exchange over each one's walk: the tiles of queries that have to do
// with it, of all heads that read it. `step` counts those of all walks.
template <class T, int kHeadDim, MaskKind kMask, bool kDrops, bool kPacked>
struct BackwardRoles {
  using Shape = BackwardShape<kHeadDim>;
  static constexpr int kQueries = Shape::kQueries;
  static constexpr int kArrivals = Shape::kArrivals;
  static constexpr bool kPackedOnly = Shape::kPackedOnly;
  static constexpr bool kUnmasked = kMask == kNoMask || kMask == kRanges;
  // With dropout there are no registers for packed probabilities with and without signs.
  static constexpr bool kSignedOperand = kDrops && kPackedOnly;

  const BackwardMaps& maps;
  const BackwardArgs& args;
  const BackwardSchedule& schedule;
  const HiddenTiles& hidden;
  const TileOrder& order;
  const float& scale_log2;  // of scores, a parameter of the kernel: it would be a product of doubles in each step
  BackwardShared<kArrivals>& shared;
  char* tiles;  // by stages: of k and v [kKeys][D], q and d_out [kQueries][D], dS^T [kKeys][kQueries], statistics
                // [kQueries]

  __device__ __forceinline__ char* k_tile(int stage) const { return tiles + stage * Shape::kKeyBytes; }
  __device__ __forceinline__ char* v_tile(int stage) const { return k_tile(kStages + stage); }
  __device__ __forceinline__ char* q_tile(int stage) const { return k_tile(2 * kStages) + stage * Shape::kQueryBytes; }
  __device__ __forceinline__ char* d_out_tile(int stage) const { return q_tile(kStages + stage); }
  __device__ __forceinline__ char* score_tile(int stage) const {
    return q_tile(2 * kStages) + stage * Shape::kScoreBytes;
  }
  __device__ __forceinline__ float* lse2_tile(int stage) const {
    return reinterpret_cast<float*>(score_tile(kStages)) + stage * kQueries;
  }
  __device__ __forceinline__ float* delta_tile(int stage) const { return lse2_tile(kStages + stage); }
  __device__ __forceinline__ float* shift2_tile(int stage) const { return lse2_tile(2 * kStages + stage); }

  // Of keys.
  __device__ __forceinline__ int tiles_of_head() const { return key_tiles<kPacked>(args); }
  __device__ __forceinline__ int group() const { return static_cast<int>(args.layout.group); }
  // The tiles of queries that have to do with the keys from key0 on, by position.
  __device__ __forceinline__ Range<int> walk_of(const HeadState& head, int key0) const {
    return walk_over_queries(head_visibility<kPacked>(args, head), key0, kQueries);
  }
  // Whether a key mask hides them all.
  __device__ __forceinline__ bool hides_all(const HeadState& head, int key0) const {
    if (kMask != kKeyMask) return false;
    const int heads = args.mask.strides[1] ? group() : 1;
    for (int i = 0; i < heads; ++i) {
      if (any_visible(args, head.mask_offset + i * args.mask.strides[1], key0)) return false;
    }
    return true;
  }
  __device__ __forceinline__ int steps_of(const Range<int>& walk) const { return (walk.end - walk.first) * group(); }
  // Step i of a walk: head by head, or in turn, where tiles of keys keep pace if all go through the heads of a tile of
  // queries before the next.
  __device__ __forceinline__ WalkStep step_at(const Range<int>& walk, int i) const {
    if (schedule.turns) return {i % group(), walk.end - 1 - i / group()};
    const int tiles = walk.end - walk.first;
    return {i / tiles, walk.first + i % tiles};
  }

  __device__ __forceinline__ SequenceTile keys_of(const OrderedTile& tile) const {
    const uint32_t head = tile.head * static_cast<uint32_t>(args.layout.group);  // of queries
    if ((kPacked || kMask == kRanges) && order.places) {
      return order.at<kPacked>(args, kPacked ? 0 : hidden.head_of(args.layout.head(head)), head, tile.tile);
    }
    return sequence_tile<kPacked>(args, args.layout.key_starts, head, tile.tile);
  }

  // One thread takes tiles of keys, and copies them and what their walks read.
  __device__ __forceinline__ void produce() const {
    for (int t = 0, step = 0;; ++t) {
      const RingStep kv = ring_step<kStages>(t);
      const uint32_t index = atomicAdd(schedule.tiles_begun(), 1u);
      shared.kv.wait_empty(kv);
      KeyWork& work = shared.work[kv.stage];
      const uint32_t heads = key_heads<kPacked>(args);
      if (index >= heads * tiles_of_head()) {
        work.place.head = kNoHead;
        barrier_arrive(&shared.kv.full[kv.stage]);
        return;
      }
      const OrderedTile tile = ordered_tile(heads, index, schedule.heads_per_group, tiles_of_head());
      wait_for_count(schedule.tiles_taken(tile.head), tile.head / schedule.slots * tiles_of_head());
      const SequenceTile keys = keys_of(tile);
      const HeadState first = head_state<kPacked>(args, keys.head, false);
      const Range<int> walk = walk_of(first, keys.first);
      work.place = tile;
      work.keys = keys;
      work.walk = hides_all(first, keys.first) ? Range<int>{0, 0} : walk;
      work.turns = walk;
      int plain = 0;  // so many tiles are those of which ranges hide nothing
      if (kMask == kRanges) {
        shared.seen_tiles.begin(hidden.row(first.index, keys.first / kKeys), walk);
        plain = shared.seen_tiles.count(kPlainTiles);
        work.walk = {0, plain + shared.seen_tiles.count(kHidingTiles)};
      }
      if (work.walk.first >= work.walk.end) {
        barrier_arrive(&shared.kv.full[kv.stage]);
        continue;
      }
      const MapRows key_rows = key_map_rows<kPacked>(args, first);
      const MapRows query_rows = query_map_rows<kPacked>(args, first);
      const int kv_head = static_cast<int>(first.index.kv_head);
      const int key0 = key_rows.first + keys.first;
      uint64_t* kv_full = shared.kv.expect(kv, 2 * Shape::kKeyBytes);
      copy_tile<kKeys, kHeadDim, kPacked>(k_tile(kv.stage), maps.key, kv_full, kv_head, key0, key_rows.sequence);
      copy_tile<kKeys, kHeadDim, kPacked>(v_tile(kv.stage), maps.value, kv_full, kv_head, key0, key_rows.sequence);
      const BackwardHead<T, float> head = backward_head<T, float, kPacked>(args, keys.head, false);
      for (int i = 0; i < steps_of(work.walk); ++i, ++step) {
        const RingStep to = ring_step<kStages>(step);
        WalkStep at = step_at(work.walk, i);
        if (kMask == kRanges) {
          const int in_list = at.tile;
          if (in_list == 0) shared.seen_tiles.begin(hidden.row(first.index, keys.first / kKeys), walk);
          at.tile = shared.seen_tiles.next();
          at.ranges_hide = in_list >= plain;
        }
        const int h = static_cast<int>(head.index.head) + at.head;
        const int row0 = at.tile * kQueries;
        const int map_row0 = query_rows.first + row0;
        const int64_t statistic = static_cast<int64_t>(at.head) * args.rows_padded + row0;
        shared.q.wait_empty(to);
        shared.steps[to.stage] = at;
        uint64_t* q_full = shared.q.expect(to, Shape::kQueryBytes + 2 * Shape::kStatisticBytes);
        copy_tile<kQueries, kHeadDim, kPacked>(q_tile(to.stage), maps.query, q_full, h, map_row0, query_rows.sequence);
        copy_bytes(lse2_tile(to.stage), head.lse2 + statistic, Shape::kStatisticBytes, q_full);
        copy_bytes(shift2_tile(to.stage), head.shift2 + statistic, Shape::kStatisticBytes, q_full);
        uint64_t* d_out_full = shared.d_out.fill(to, Shape::kQueryBytes + Shape::kStatisticBytes);
        copy_tile<kQueries, kHeadDim, kPacked>(d_out_tile(to.stage), maps.d_out, d_out_full, h, map_row0,
                                               query_rows.sequence);
        copy_bytes(delta_tile(to.stage), head.delta + statistic, Shape::kStatisticBytes, d_out_full);
      }
    }
  }

  // One thread tells other thread blocks of the sums, and hears of theirs.
  __device__ __forceinline__ void exchange() const {
    for (int t = 0;; ++t) {
      const RingStep kv = ring_step<kStages>(t);
      shared.kv.wait_full(kv);
      const uint32_t head = shared.work[kv.stage].place.head;
      if (head == kNoHead) return;
      shared.kv.release_alone(kv);
      const bool takes = head >= static_cast<uint32_t>(schedule.heads_behind);
      const uint32_t from = head - schedule.heads_behind;
      if (takes) wait_for_count(schedule.tiles_added(from), (from / schedule.slots + 1) * tiles_of_head());
      barrier_arrive(&shared.may_take);
      barrier_wait(&shared.added, t % 2);
      add_count(schedule.tiles_added(head));
      barrier_wait(&shared.has_taken, t % 2);
      if (takes) add_count(schedule.tiles_taken(from));
    }
  }

  // Calls f(work, turns) for each tile of keys: `turns` counts those at the tiles of its first head's queries. A whole
  // warp calls it.
  template <class F>
  __device__ __forceinline__ void for_each_walk(F&& f) const {
    for (int t = 0;; ++t) {
      const RingStep kv = ring_step<kStages>(t);
      shared.kv.wait_full(kv);
      const KeyWork work = shared.work[kv.stage];
      if (work.place.head == kNoHead) return;
      shared.kv.release_alone(kv);  // by each thread, for compute-sanitizer
      const int64_t row = row_of(work.place.head, args.layout.head(work.keys.head));
      f(work, schedule.turns_of(args, work.place.head) + row / kQueries);
      __syncwarp();
    }
  }
  __device__ __forceinline__ int64_t turn_index(const WalkStep& at) const {
    return static_cast<int64_t>(at.head) * (args.rows_padded / kQueries) + at.tile;
  }

  // A warp waits for the thread block's turns, and passes over those of keys that a mask hides.
  __device__ __forceinline__ void await_turns() const {
    const int lane = threadIdx.x % 32;
    int step = 0;
    for_each_walk([&](const KeyWork& work, uint32_t* turns) {
      const HeadState head = head_state<kPacked>(args, work.keys.head, false);
      const uint32_t round = work.place.head / schedule.slots;
      const auto wait = [&](const WalkStep& at) {
        const Turn turn = turn_of(head_visibility<kPacked>(args, head), work.keys.first, at.tile * kQueries, kQueries);
        wait_for_count<false>(turns + turn_index(at), round * turn.all + turn.before);  // only adds come after it
      };
      if (work.walk.first >= work.walk.end) {
        for (int i = lane; i < steps_of(work.turns); i += 32) {
          const WalkStep at = step_at(work.turns, i);
          wait(at);
          add_count(turns + turn_index(at));
        }
      }
      for (int i = 0; i < steps_of(work.walk) && lane == 0; ++i, ++step) {
        const RingStep to = ring_step<kStages>(step);
        shared.turn.wait_empty(to);
        wait(step_at(work.walk, i));
        barrier_arrive(&shared.turn.full[to.stage]);
      }
    });
  }

  // A warp tells others that the thread block's turns are over.
  __device__ __forceinline__ void end_turns() const {
    int step = 0;
    for_each_walk([&](const KeyWork& work, uint32_t* turns) {
      for (int i = 0; i < steps_of(work.walk) && threadIdx.x % 32 == 0; ++i, ++step) {
        const RingStep from = ring_step<kStages>(step);
        barrier_wait(&shared.step_added[from.stage], from.round & 1);
        add_count(turns + turn_index(step_at(work.walk, i)));
        shared.turn.release_alone(from);
      }
    });
  }

  // A tile of keys in a computing warp's registers.
  struct KeyTile {
    HeadState head;               // of the first query head that reads it
    int key0;                     // the tile's first key
    int strip;                    // of the warp's 16 keys in the tile
    int mask_head;                // of the query heads, the one whose mask `elements` are
    uint32_t elements[2];         // of a key mask, for the lane's keys
    float dk[kHeadDim / 2] = {};  // [64][D]
    float dv[kHeadDim / 2] = {};  // [64][D]
  };

  __device__ __forceinline__ int64_t mask_offset_of(const KeyTile& tile, int head) const {
    return tile.head.mask_offset + head * args.mask.strides[1];
  }
  __device__ __forceinline__ void load_key_elements(KeyTile& tile, int head) const {
    tile.mask_head = head;
    with_mask_elements(args.mask, [&](const auto* elements) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = min(tile.key0 + tile.strip + lane_row(2 * i), args.visibility.keys - 1);
        tile.elements[i] = mask_bits(&elements[mask_offset_of(tile, head) + key * args.mask.strides[3]]);
      }
    });
  }

  // Makes -inf of the scores s [64 keys][kQueries] of keys that a query from row0 on does not see: by position if
  // `hides`, and by ranges if `ranges_hide`.
  __device__ __forceinline__ void hide_keys(const KeyTile& tile, int row0, bool hides, bool ranges_hide,
                                            float (&s)[kQueries / 2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = tile.key0 + tile.strip + lane_row(2 * half);
      uint32_t seeing = ~0u;  // the lane's queries that do, as bits (lane_columns_before)
      if (hides) {
        const Range<int> queries = head_visibility<kPacked>(args, tile.head).queries_of(key);
        seeing = lane_columns_in(queries.first - row0, queries.end - row0);
      }
      if (ranges_hide) {
        for (int r = 0; r < hidden.ranges_of_key; ++r) {
          seeing &= ~hidden_columns(hidden.ranges_of(tile.head.index, r)[key], row0);
        }
      }
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
        if (!(seeing & 1u << 2 * n)) s[4 * n + 2 * half] = -INFINITY;
        if (!(seeing & 1u << (2 * n + 1))) s[4 * n + 2 * half + 1] = -INFINITY;
      }
    }
  }

  // Scores s [64 keys][kQueries] to probabilities s, and p in 16 bits. Those that dropout drops get a minus sign, in p
  // only where s is not kept.
  __device__ __forceinline__ void probabilities(const KeyTile& tile, int stage, bool large, float (&s)[kQueries / 2],
                                                uint32_t (&p)[kQueries / 16][4]) const {
    const WalkStep at = shared.steps[stage];
    const int row0 = at.tile * kQueries;
    const bool ranges_hide = kMask == kRanges && at.ranges_hide;
    const float* lse2 = lse2_tile(stage);
    const float* shift2 = shift2_tile(stage);
    float added_by_mask[2];  // to the scores of the lane's keys
    if (kMask == kKeyMask) {
      with_added_by_bits(args.mask, [&](auto added_by) {
#pragma unroll
        for (int i = 0; i < 2; ++i) added_by_mask[i] = added_by(tile.elements[i]);
      });
    }
    float to_log2 = kMask == kFullMask ? 1.0f : scale_log2;  // what scores are still to be multiplied with
    const bool hides =
        head_visibility<kPacked>(args, tile.head).hides_any(row0, row0 + kQueries, tile.key0, tile.key0 + kKeys);
    if (kMask == kKeyMask && (large || hides)) {
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) s[i] = fmaf(s[i], scale_log2, added_by_mask[i / 2 % 2]);
      to_log2 = 1.0f;
      added_by_mask[0] = added_by_mask[1] = 0.0f;
    }
    if (large) {
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) {
        const int query = i / 8 * 16 + lane_column(i % 8);
        const float score = kUnmasked ? fmaf(s[i], scale_log2, -shift2[query]) : s[i] - shift2[query];
        s[i] = fminf(score, lse2[query]);  // at most that, however roundings fall
      }
      to_log2 = 1.0f;
    }
    if (hides || ranges_hide) hide_keys(tile, row0, hides, ranges_hide, s);
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
          const float exponent = fmaf(score, kUnmasked ? to_log2 : 1.0f, -(i % 2 ? l.y : l.x));
          piece[e + i] = exp2_of(exponent);
        }
      }
      if (kDrops) {
        uint32_t numbers[8];
        numbers_by_key(tile.head.philox_key, tile.head.index.dropout_head + at.head, tile.key0 + tile.strip,
                       row0 + 16 * m, numbers);
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
  }

  // d_v += P^T d_out; p [64 keys][kQueries].
  __device__ __forceinline__ void start_value_sums(KeyTile& tile, int stage,
                                                   const uint32_t (&p)[kQueries / 16][4]) const {
    pin(tile.dv);
    wgmma_fence();
    const uint64_t d_out_columns = columns_operand(d_out_tile(stage), kQueries * kRowBytes);
#pragma unroll
    for (int m = 0; m < kQueries / 16; ++m) wgmma<T, 1>(tile.dv, p[m], d_out_columns + m * kColumnsStep, 1);
    wgmma_commit();
  }

  // dS^T [64 keys][kQueries], in 16 bits as operands ds and in shared memory, from the probabilities in s or p and dp,
  // the products of values and d_out. Clears the signs of p.
  __device__ __forceinline__ void score_gradients(const KeyTile& tile, int stage, const float (&s)[kQueries / 2],
                                                  uint32_t (&p)[kQueries / 16][4], float (&dp)[kQueries / 2],
                                                  uint32_t (&ds)[kQueries / 16][4]) const {
    const float drop_scale = static_cast<float>(args.drop_scale);
    const float* delta = delta_tile(stage);
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
              score_gradient(kDrops ? fabsf(probability) : probability, d, drop_scale, i % 2 ? rows.y : rows.x);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[m][e] = pack<T>(dp[8 * m + 2 * e], dp[8 * m + 2 * e + 1]);
      store_piece(score_tile(stage) + m / 4 * Shape::kScorePanelBytes, tile.strip, m % 4 * 16, ds[m]);
      if (kSignedOperand) {
#pragma unroll
        for (int e = 0; e < 4; ++e) p[m][e] = clear_negative(p[m][e]);
      }
    }
  }

  // dq = dS k, of 64 queries and 64 head dims, and d_k += dS^T q.
  __device__ __forceinline__ void start_query_and_key_sums(KeyTile& tile, int group, uint64_t k_columns, int stage,
                                                           const uint32_t (&ds)[kQueries / 16][4],
                                                           float (&dq)[32]) const {
    pin(tile.dk);
    pin(dq);
    wgmma_fence();
    const uint64_t scores =
        columns_operand(score_tile(stage) + (kHeadDim > 64 ? 0 : group * Shape::kScorePanelBytes), 0);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      wgmma<T, 1, 1>(dq, scores + k * kColumnsStep, k_columns + k * kColumnsStep, k > 0);
    }
    wgmma_commit();
    const uint64_t q_columns = columns_operand(q_tile(stage), kQueries * kRowBytes);
#pragma unroll
    for (int m = 0; m < kQueries / 16; ++m) wgmma<T, 1>(tile.dk, ds[m], q_columns + m * kColumnsStep, 1);
    wgmma_commit();
  }

  // The walk of a tile of keys, from `step` on, which is moved on by as many steps. `sums`: of d_q of the queries of
  // the first head.
  __device__ __forceinline__ void walk(KeyTile& tile, int warpgroup, int kv_stage, float* sums, int& step) const {
    const uint64_t k_rows = rows_operand(k_tile(kv_stage) + warpgroup * 64 * kRowBytes);
    const uint64_t v_rows = rows_operand(v_tile(kv_stage) + warpgroup * 64 * kRowBytes);
    const uint64_t k_columns =
        columns_operand(k_tile(kv_stage) + (kHeadDim > 64 ? warpgroup * kKeys * kRowBytes : 0), 0);
    const int key0 = tile.key0 + tile.strip;
    float s[kQueries / 2], dp[kQueries / 2];  // [64 keys][kQueries]
    uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
    float dq[32];                          // [64 queries][64]
    uint32_t mask_elements[kQueries / 2];  // of a step, until its dp is begun: there are no registers for both

    const auto fetch = [&](int i) {
      if (kMask != kFullMask) return;
      const WalkStep at = step_at(shared.work[kv_stage].walk, i);
      fetch_mask<true>(args, mask_offset_of(tile, at.head), key0, at.tile * kQueries, mask_elements);
    };
    const int steps = steps_of(shared.work[kv_stage].walk);
    fetch(0);
    for (int i = 0; i < steps; ++i) {
      const RingStep from = ring_step<kStages>(step);
      shared.q.wait_full(from);
      multiply_rows<T, kHeadDim, kQueries>(s, k_rows, rows_operand(q_tile(from.stage)));
      wgmma_commit();
      const bool large = any_large<kQueries>(shift2_tile(from.stage));
      if (kMask == kFullMask) {
        wgmma_wait<0>();
        pin(s);
        const WalkStep at = shared.steps[from.stage];
        add_fetched<true>(args, mask_offset_of(tile, at.head), key0, at.tile * kQueries, scale_log2, mask_elements, s);
      }
      shared.d_out.wait_full(from);
      multiply_rows<T, kHeadDim, kQueries>(dp, v_rows, rows_operand(d_out_tile(from.stage)));
      wgmma_commit();
      if (kMask != kFullMask) {
        wgmma_wait<1>();
        pin(s);
      }
      if (kMask == kKeyMask && args.mask.strides[1] != 0 && tile.mask_head != shared.steps[from.stage].head) {
        load_key_elements(tile, shared.steps[from.stage].head);
      }
      probabilities(tile, from.stage, large, s, p);
      if constexpr (kSignedOperand) {
        wgmma_wait<0>();
      } else {
        start_value_sums(tile, from.stage, p);
        wgmma_wait<1>();
      }
      pin(dp);
      score_gradients(tile, from.stage, s, p, dp, ds);
      if constexpr (kSignedOperand) start_value_sums(tile, from.stage, p);

      shared_proxy_fence();
      named_sync(kScoresBarrier, 256);
      start_query_and_key_sums(tile, warpgroup, k_columns, from.stage, ds, dq);
      wgmma_wait<1>();
      pin(tile.dv);
      pin(dq);
      shared.d_out.release(from);
      const WalkStep at = shared.steps[from.stage];
      float* to = sums + static_cast<int64_t>(at.head) * args.rows_padded * schedule.columns +
                  (at.tile * 2 + warpgroup) * kSumPanel + threadIdx.x % 128 * 4;
      if (schedule.turns) shared.turn.wait_full(from);
#pragma unroll
      for (int e = 0; e < 8; ++e) add_to(to + e * 512, dq[4 * e], dq[4 * e + 1], dq[4 * e + 2], dq[4 * e + 3]);
      if (schedule.turns) release_by_warp<kArrivals>(&shared.step_added[from.stage]);
      fetch(min(i + 1, steps - 1));
      wgmma_wait<0>();
      pin(tile.dk);
      shared.q.release(from);
      ++step;
    }
  }

  // d_k and d_v to their places, through rows of `panel` that are the warp's own.
  __device__ __forceinline__ void store_tile(const KeyTile& tile, char* panel) const {
    const float scale = static_cast<float>(args.score_scale);
    const float drop_scale = static_cast<float>(args.drop_scale);
    const HeadIndex& h = tile.head.index;
    const int keys = head_visibility<kPacked>(args, tile.head).keys;
    store_strip<T, kHeadDim>(tile.dk, scale, scale, panel, tile.strip, args.layout.template key_rows<T>(args.d_key, h),
                             tile.key0 + tile.strip, keys, args.head_dim());
    add_to_bias<kHeadDim>(args, schedule, tile.dv, drop_scale, h, QkvPart::kValue, 0);
    store_strip<T, kHeadDim>(tile.dv, drop_scale, drop_scale, panel, tile.strip,
                             args.layout.template key_rows<T>(args.d_value, h), tile.key0 + tile.strip, keys,
                             args.head_dim());
  }

  // Where one of the query heads of `head` begins in its sums of d_q: a row of [group * rows_padded].
  __device__ __forceinline__ int64_t row_of(uint32_t head, const HeadIndex& h) const {
    return row_statistics<kPacked>(args, h) - head * args.layout.group * args.rows_padded;
  }
  // Its sums: [rows_padded, columns], of packed sequences from its own on.
  __device__ __forceinline__ float* sums_of(uint32_t head, const HeadIndex& h) const {
    return schedule.sums_of(args, head) + row_of(head, h) * schedule.columns;
  }

  // A computing warpgroup.
  __device__ __forceinline__ void consume() const {
    const int warpgroup = threadIdx.x / 128 - 1;
    const int strip = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;
    for (int t = 0, step = 0;; ++t) {
      const RingStep kv = ring_step<kStages>(t);
      shared.kv.wait_full(kv);
      if (shared.work[kv.stage].place.head == kNoHead) return;
      KeyTile tile;
      tile.key0 = shared.work[kv.stage].keys.first;
      tile.strip = strip;
      tile.head = head_state<kPacked>(args, shared.work[kv.stage].keys.head, kDrops);
      if (kMask == kKeyMask) load_key_elements(tile, 0);
      walk(tile, warpgroup, kv.stage, sums_of(shared.work[kv.stage].place.head, tile.head.index), step);
      // Found anew, because there were no registers to keep it.
      const OrderedTile place = shared.work[kv.stage].place;
      tile.head = head_state<kPacked>(args, shared.work[kv.stage].keys.head, false);
      shared.kv.release(kv);
      release_by_warp<kArrivals>(&shared.added);

      // Through the rows of dS^T that this warp alone writes, in the stage that nobody reads any more.
      char* panel = score_tile(ring_step<kStages>(step).stage);
      barrier_wait(&shared.may_take, t % 2);
      const int query_tiles_of_group = query_tiles<kPacked>(args) * group();
      if (place.head >= static_cast<uint32_t>(schedule.heads_behind) && place.tile < query_tiles_of_group) {
        const uint32_t from = place.head - schedule.heads_behind;
        QueryGradient<T, kHeadDim, kPacked> d_q;
        d_q.load(args, schedule, from, place.tile, strip);
        store_tile(tile, panel);  // meanwhile
        for (int taken = place.tile;;) {
          d_q.clear(args, schedule, from, taken, strip);
          d_q.store(args, schedule, from, taken, strip, panel);
          taken += tiles_of_head();
          if (taken >= query_tiles_of_group) break;
          d_q.load(args, schedule, from, taken, strip);
        }
      } else {
        store_tile(tile, panel);
      }
      release_by_warp<kArrivals>(&shared.has_taken);
    }
  }
};

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
