// The launches of the mma family's forward kernels for one dtype. Each file that includes this instantiates `forward`
// once, so that compilers can share the work.
#pragma once

#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/mma.cuh"
#include "core/cuda/attention/mma_passes.h"

namespace pfa {
namespace cuda {
namespace mma {

template <class T, int... kHeadDims>
void forward(const Context& context, const ForwardArgs& args) {
  with_head_dim<kHeadDims...>(args.head_dim(), [&](auto head_dim) {
    with_bool(args.has_mask_or_dropout() || !(static_cast<float>(args.score_scale * kLog2e) > 0.0f),
              [&](auto mask_or_dropout) {
                with_bool(args.is_packed(), [&](auto packed) {
                  constexpr int kHeadDim = decltype(head_dim)::value;
                  constexpr bool kMaskOrDropout = decltype(mask_or_dropout)::value;
                  constexpr bool kPacked = decltype(packed)::value;
                  using Shape = ForwardShape<T, kHeadDim>;
                  launch(context, "attention_forward_mma", attention_forward_mma<T, kHeadDim, kMaskOrDropout, kPacked>,
                         ceil_div(args.visibility.queries, Shape::kQueries) * args.heads(), kThreads,
                         Shape::kSharedBytes, args);
                });
              });
  });
}

template <class T>
bool is_built(const Context& context) {
  const void* kernel = reinterpret_cast<const void*>(attention_forward_mma<T, 64, false, false>);
  return kernel_attributes(context, kernel).ptxVersion >= 80;
}

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
