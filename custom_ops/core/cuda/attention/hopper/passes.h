// What forward_kernel.cuh and backward_kernel.cuh are instantiated for, each in a file of its own:
// forward_float16_64.cu and its like.
#pragma once

#include "core/cuda/attention/hopper/hidden_tiles.h"
#include "core/cuda/attention/hopper/schedule.h"
#include "core/cuda/context.h"

namespace pfa {
namespace cuda {
namespace hopper {

// T: __half or __nv_bfloat16. kHeadDim: 64 or 128, what head_dim is rounded up to.
template <class T, int kHeadDim>
void forward(const Context& context, const ForwardArgs& args, const HiddenTiles& hidden, const TileOrder& order);
// After the row statistics.
template <class T, int kHeadDim>
void backward(const Context& context, const BackwardArgs& args, const BackwardSchedule& schedule,
              const HiddenTiles& hidden, const TileOrder& order);
// The queries of a tile of backward.
constexpr int backward_queries(int64_t head_dim) { return head_dim > 64 ? 64 : 128; }

// Whether the kernels' code is more than the empty one for other targets. Of __half and 64.
template <class T, int kHeadDim>
bool is_built(const Context& context);

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
