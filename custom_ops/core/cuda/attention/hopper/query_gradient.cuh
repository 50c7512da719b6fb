// d_q on its way from the sums that thread blocks add to (schedule.h) to its place, and what gradients add to that of
// the QKV bias.
#pragma once

#include "core/cuda/attention/hopper/schedule.h"
#include "core/cuda/attention/hopper/store.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

#if PFA_HOPPER_CODE

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

// What `values` of d_q or d_v add to the gradient of the QKV bias.
template <int kHeadDim>
__device__ __forceinline__ void add_to_bias(const BackwardArgs& args, const BackwardSchedule& schedule,
                                            const float (&values)[kHeadDim / 2], float factor, const HeadIndex& h,
                                            QkvPart part, int column0) {
  if (!schedule.bias_sums) return;
  float* sums =
      schedule.bias_sums + blockIdx.x % kBiasCopies * 3 * args.layout.heads_dim() + args.layout.bias_offset(h, part);
  add_column_sums<kHeadDim>(values, factor, sums + column0, args.head_dim() - column0);
}

// A warpgroup's 64 queries of d_q on their way from the sums of their head to their place.
template <class T, int kHeadDim>
struct QueryGradient {
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  float values[kPanels][32];

  __device__ __forceinline__ float4* sums(const BackwardArgs& args, const BackwardSchedule& schedule, uint32_t head,
                                          int row0) const {
    return reinterpret_cast<float4*>(schedule.sums_of(args, head) + row0 * kHeadDim) + threadIdx.x % 128;
  }

  __device__ __forceinline__ void load(const BackwardArgs& args, const BackwardSchedule& schedule, uint32_t head,
                                       int row0) {
    const float4* from = sums(args, schedule, head, row0);
#pragma unroll
    for (int i = 0; i < 8 * kPanels; ++i)
      *reinterpret_cast<float4*>(&values[i / 8][i % 8 * 4]) = __ldcg(from + i * 128);
  }

  __device__ __forceinline__ void clear(const BackwardArgs& args, const BackwardSchedule& schedule, uint32_t head,
                                        int row0) const {
    float4* to = sums(args, schedule, head, row0);
#pragma unroll
    for (int i = 0; i < 8 * kPanels; ++i) __stcg(to + i * 128, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }

  // `strip`: the rows of `panel` that belong to the warp.
  __device__ __forceinline__ void store(const BackwardArgs& args, const BackwardSchedule& schedule, uint32_t head,
                                        int row0, char* panel, int strip) const {
    const float scale = static_cast<float>(args.score_scale);
    const HeadIndex h = args.layout.head(head);
    const HeadRows<T> d_q = args.layout.template query_rows<T>(args.d_query, h);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      const int column0 = i * kPanelColumns;
      add_to_bias<kPanelColumns>(args, schedule, values[i], scale, h, QkvPart::kQuery, column0);
      store_strip<T, kPanelColumns>(values[i], scale, scale, panel, strip, {d_q.data + column0, d_q.stride},
                                    row0 + strip % 64, args.visibility.queries, args.head_dim() - column0);
    }
  }
};

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
