// d_q on its way from the sums that thread blocks add to (schedule.h) to its place, and what gradients add to that of
// the QKV bias.
#pragma once

#include "core/cuda/attention/hopper/schedule.h"
#include "core/cuda/attention/hopper/store.cuh"
#include "core/cuda/attention/hopper/tile_order.h"

namespace pfa {
namespace cuda {
namespace hopper {

#if PFA_HOPPER_CODE

// kReads: what comes after it reads what others wrote. Else an acquiring load would but empty the L1 cache.
template <bool kReads = true>
__device__ __forceinline__ void wait_for_count(const uint32_t* count, uint32_t expected) {
  while (true) {
    uint32_t value;
    if (kReads) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
    } else {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
    }
    if (value >= expected) return;
    __nanosleep(50);
  }
}

// What the thread block has done before is done for whoever sees the count.
__device__ __forceinline__ void add_count(uint32_t* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

// What `values` of d_q or d_v add to the gradient of the QKV bias.
template <int kHeadDim>
__device__ __forceinline__ void add_to_bias(const BackwardArgs& args, const BackwardSchedule& schedule,
                                            const float (&values)[kHeadDim / 2], float factor, const HeadIndex& h,
                                            QkvPart part, int column0) {
  if (!schedule.bias_sums) return;
  float* sums =
      schedule.bias_sums + blockIdx.x % kBiasCopies * args.layout.bias_numbers() + args.layout.bias_offset(h, part);
  add_column_sums<kHeadDim>(values, factor, sums + column0, args.head_dim() - column0);
}

// A warpgroup's 64 queries of a tile of d_q on their way from the sums of a head (schedule.h) to their place. The tiles
// of the head's query heads are counted through; `strip` is the first of the warp's 16 rows of one.
template <class T, int kHeadDim, bool kPacked>
struct QueryGradient {
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  float values[kPanels][32];

  static __device__ __forceinline__ float4* sums(const BackwardArgs& args, const BackwardSchedule& schedule,
                                                 uint32_t head, int tile, int strip) {
    const int64_t row = static_cast<int64_t>(tile) * kQueryTile + strip / 64 * 64;
    return reinterpret_cast<float4*>(schedule.sums_of(args, head) + row * kHeadDim) + threadIdx.x % 128;
  }

  __device__ __forceinline__ void load(const BackwardArgs& args, const BackwardSchedule& schedule, uint32_t head,
                                       int tile, int strip) {
    const float4* from = sums(args, schedule, head, tile, strip);
#pragma unroll
    for (int i = 0; i < 8 * kPanels; ++i)
      *reinterpret_cast<float4*>(&values[i / 8][i % 8 * 4]) = __ldcg(from + i * 128);
  }

  __device__ __forceinline__ void clear(const BackwardArgs& args, const BackwardSchedule& schedule, uint32_t head,
                                        int tile, int strip) const {
    float4* to = sums(args, schedule, head, tile, strip);
#pragma unroll
    for (int i = 0; i < 8 * kPanels; ++i) __stcg(to + i * 128, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }

  // Through the rows `strip`.. of `panel`, which are the warp's own.
  __device__ __forceinline__ void store(const BackwardArgs& args, const BackwardSchedule& schedule, uint32_t head,
                                        int tile, int strip, char* panel) const {
    const float scale = static_cast<float>(args.score_scale);
    const int tiles = query_tiles<kPacked>(args);
    const uint32_t query_head = head * static_cast<uint32_t>(args.layout.group) + tile / tiles;
    const SequenceTile place = sequence_tile<kPacked>(args, args.layout.query_starts, query_head, tile % tiles);
    const HeadState state = head_state<kPacked>(args, place.head, false);
    const int queries = head_visibility<kPacked>(args, state).queries;
    if (kPacked && place.first >= queries) return;  // nobody's sums
    const HeadRows<T> d_q = args.layout.template query_rows<T>(args.d_query, state.index);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      const int column0 = i * kPanelColumns;
      add_to_bias<kPanelColumns>(args, schedule, values[i], scale, state.index, QkvPart::kQuery, column0);
      store_strip<T, kPanelColumns>(values[i], scale, scale, panel, strip, {d_q.data + column0, d_q.stride},
                                    place.first + strip, queries, args.head_dim() - column0);
    }
  }
};

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
