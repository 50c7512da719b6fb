// Attention, forward: softmax(q k^T * scale + mask) v of every head, in tiles, with an online softmax. The stage, and
// the launches of the plain and the mma kernels.
#include "core/cuda/attention/implementations.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/mma.cuh"
#include "core/cuda/attention/passes.h"
#include "core/cuda/attention/plain.cuh"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

template <class T, int... kHeadDims>
void forward_mma(const Context& context, const ForwardArgs& args) {
  with_head_dim<kHeadDims...>(args.head_dim(), [&](auto head_dim) {
    with_bool(args.has_mask_or_dropout() || !(static_cast<float>(args.score_scale * kLog2e) > 0.0f),
              [&](auto mask_or_dropout) {
                with_bool(args.is_packed(), [&](auto packed) {
                  constexpr int kHeadDim = decltype(head_dim)::value;
                  constexpr bool kMaskOrDropout = decltype(mask_or_dropout)::value;
                  constexpr bool kPacked = decltype(packed)::value;
                  using Shape = mma::ForwardShape<T, kHeadDim>;
                  launch(context, "attention_forward_mma",
                         mma::attention_forward_mma<T, kHeadDim, kMaskOrDropout, kPacked>,
                         ceil_div(args.visibility.queries, Shape::kQueries) * args.heads(), mma::kThreads,
                         Shape::kSharedBytes, args);
                });
              });
  });
}

}  // namespace

bool mma_is_built(const Context& context) {
  const void* kernel = reinterpret_cast<const void*>(mma::attention_forward_mma<__half, 64, false, false>);
  return kernel_attributes(context, kernel).ptxVersion >= 80;
}

void mma_attention_forward(Context& context, const AttentionParams& p) {
  const ForwardArgs args = forward_args(p);
  if (p.dtype == DType::kFloat32) return forward_mma<float, 64, 128>(context, args);
  dispatch_16bit(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    forward_mma<T, 64, 96, 128, 192, 256>(context, args);
  });
}

void plain_attention_forward(Context& context, const AttentionParams& p) {
  const ForwardArgs args = forward_args(p);
  dispatch_float(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Acc = Accumulator<T>;
    with_head_dim<64, 128, 256>(args.head_dim(), [&](auto head_dim) {
      with_bool(args.is_packed_or_grouped() || args.hidden_ranges.data, [&](auto general) {
        launch(context, "attention_forward_plain",
               plain::attention_forward_plain<T, Acc, decltype(head_dim)::value, decltype(general)::value>,
               ceil_div(args.visibility.queries, plain::Tile<Acc>::kRows) * args.heads(), plain::kThreads, 0, args);
      });
    });
  });
}

void attention_forward(Context& context, const AttentionParams& p) {
  if (p.batch * p.num_heads * p.queries > 0) attention_implementation(context, p, Pass::kForward).forward(context, p);
}

}  // namespace cuda
}  // namespace pfa
