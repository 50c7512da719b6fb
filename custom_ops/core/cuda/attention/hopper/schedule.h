// How the Hopper backward's thread blocks share the sums of d_q: memory for the sums, and counts that tell who waits
// for whom.
//
// d_q is added up in float32 in device memory, in the order in which threads hold it. A head here is a head of keys
// with the group of query heads that read it, of one sequence or of all packed ones. There are sums for as many heads
// as thread blocks can be working on, few enough for the L2 cache: head h has slot h % slots of them. The thread block
// that has done the t-th of head h's T tiles of keys brings the tiles t, t + T, ... of d_q of head h - heads_behind to
// their places and clears their sums; the last heads_behind heads are left to a kernel of their own. Thread blocks take
// tiles in the order of heads, and only when they run, so that whatever one waits for is under way in another.
//
// Where gradients are to have the same bits each time, tiles of keys add to a tile of queries in turn: the first of
// those that visit it, then the next. They walk from the last query to the first, so that under a causal mask too all
// begin with queries that their predecessors begin with; and so many heads go together (backward.cu) that a
// predecessor has begun a while before.
#pragma once

#include "core/cuda/attention/args.h"

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kBiasCopies = 8;  // so that thread blocks rarely add to the same number at once

// All zero where no thread blocks add to sums together.
struct BackwardSchedule {
  int slots;
  int lent_slots;    // the first slots lie in memory that will be another result's
  int columns;       // head_dim rounded up to whole panels
  int heads_behind;  // see above
  int heads_per_group;
  float* lent_sums;    // [lent_slots, group, rows_padded, columns]
  float* sums;         // [slots - lent_slots, group, rows_padded, columns]
  uint32_t* progress;  // [1 + 2 * slots]: tiles begun; of each slot, tiles in the sums, and tiles that have left them
  uint32_t* turns;   // [slots, group, rows_padded / turn_queries]: of all heads that a slot has had, how many tiles of
                     // keys have had their turn at a tile of queries; or null: they add as they come
  int turn_queries;  // of a tile of queries
  float* bias_sums;  // [kBiasCopies, H + 2 * num_kv_heads, D]: parts of the QKV bias's gradient; or null: not wanted

#if defined(__CUDACC__)
  // The sums of a head: [group, rows_padded, columns].
  __device__ __forceinline__ float* sums_of(const BackwardArgs& args, uint32_t head) const {
    const int slot = static_cast<int>(head % slots);
    const bool is_lent = slot < lent_slots;
    return (is_lent ? lent_sums : sums) +
           static_cast<int64_t>(is_lent ? slot : slot - lent_slots) * args.layout.group * args.rows_padded * columns;
  }

  __device__ __forceinline__ uint32_t* tiles_begun() const { return progress; }
  // These count the tiles of all heads that a head's slot has had.
  __device__ __forceinline__ uint32_t* tiles_added(uint32_t head) const { return progress + 1 + head % slots; }
  __device__ __forceinline__ uint32_t* tiles_taken(uint32_t head) const { return progress + 1 + slots + head % slots; }
  // Of a head: [group, rows_padded / turn_queries].
  __device__ __forceinline__ uint32_t* turns_of(const BackwardArgs& args, uint32_t head) const {
    return turns + head % slots * turn_count(args);
  }
#endif

  // Of a slot.
  __host__ __device__ int64_t turn_count(const BackwardArgs& args) const {
    return turn_queries ? args.layout.group * args.rows_padded / turn_queries : 0;
  }
};

#if defined(__CUDACC__)
// Called by all threads of backward's first kernel: zeros for the counts and the sums of the bias.
__device__ __forceinline__ void clear_counts(const BackwardArgs& args, const BackwardSchedule& schedule) {
  static_assert(kBiasCopies * 3 / 4 <= 16, "a thread for each vector: there are at least 16 H D threads");
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (schedule.slots > 0 && thread < 1 + 2 * schedule.slots) schedule.progress[thread] = 0;
  if (schedule.turns && thread < schedule.slots * schedule.turn_count(args)) schedule.turns[thread] = 0;
  if (schedule.bias_sums && thread < kBiasCopies * args.layout.bias_numbers() / 4) {
    reinterpret_cast<float4*>(schedule.bias_sums)[thread] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

// Called by `lanes` neighbouring threads for each row of a head of queries: zeros for the row's sums.
__device__ __forceinline__ void clear_sums(const BackwardArgs& args, const BackwardSchedule& schedule, uint32_t head,
                                           int row, int lane, int lanes) {
  const auto group = static_cast<uint32_t>(args.layout.group);
  const uint32_t key_head = head / group;
  if (key_head >= static_cast<uint32_t>(schedule.slots)) return;
  const int64_t of_key_head = static_cast<int64_t>(head % group) * args.rows_padded + row;
  float4* sums = reinterpret_cast<float4*>(schedule.sums_of(args, key_head) + of_key_head * schedule.columns);
#pragma unroll 4
  for (int i = lane; i < schedule.columns / 4; i += lanes) sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}
#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
