// What mma_forward.cuh and mma_backward.cuh are instantiated for, each in a file of its own: mma_forward_float16.cu and
// its like.
#pragma once

#include "core/cuda/attention/args.h"
#include "core/cuda/context.h"

namespace pfa {
namespace cuda {
namespace mma {

// T: __half, __nv_bfloat16 or float. kHeadDims: what head_dim may be rounded up to. For 16-bit T forward has 64, 96,
// 128, 192, 256, backward either the first three of these or the last two; for float both have 64, 128.
template <class T, int... kHeadDims>
void forward(const Context& context, const ForwardArgs& args);
// After the row statistics.
template <class T, int... kHeadDims>
void backward(const Context& context, const BackwardArgs& args);

// Whether the kernels' code is more than the empty one for other targets. Of __half.
template <class T>
bool is_built(const Context& context);

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
