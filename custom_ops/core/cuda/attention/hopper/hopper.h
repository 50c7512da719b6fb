// The Hopper kernels' host side. They serve float16 and bfloat16 with head dims up to 128 that are multiples of 8.
#pragma once

#include "core/cuda/attention/common.cuh"

namespace pfa {
namespace cuda {

#if CUDART_VERSION >= 12010  // older toolkits have no tensor maps, warpgroup products or vector additions to memory

// Whether the kernels can take this call: a device of compute capability 9.0, and device code built for it (sm_90a).
bool hopper_serves(const Context& context, const AttentionArgs& args, DType dtype);

void attention_forward_hopper(const Context& context, const AttentionArgs& args, DType dtype);

// Sets dq_columns, dq_slots and dq_lag.
void attention_backward_hopper_plan(const Context& context, AttentionArgs& args);

// delta, lse2 and shift2 must have been computed, and the sums of d_q, bias_sums and progress cleared. Blocks add to
// sums in no fixed order.
void attention_backward_hopper(const Context& context, const AttentionArgs& args, DType dtype);

#else

inline bool hopper_serves(const Context&, const AttentionArgs&, DType) { return false; }
inline void attention_forward_hopper(const Context&, const AttentionArgs&, DType) {}
inline void attention_backward_hopper_plan(const Context&, AttentionArgs&) {}
inline void attention_backward_hopper(const Context&, const AttentionArgs&, DType) {}

#endif

}  // namespace cuda
}  // namespace pfa
