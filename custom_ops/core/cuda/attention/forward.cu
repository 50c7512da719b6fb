// Attention, forward: softmax(q k^T * D^-0.5 + mask) v of every head, in tiles, with an online softmax. Chooses the
// kernel.
#include "core/cuda/attention/hopper/hopper.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/mma.cuh"
#include "core/cuda/attention/plain.cuh"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

template <class T, class Acc>
void forward_plain(const Context& context, const AttentionArgs& args) {
  with_head_dim<64, 128, 256>(args.head_dim, [&](auto head_dim) {
    const int64_t blocks = ceil_div(args.seq_len, plain::Tile<Acc>::kRows) * args.batch * args.num_heads;
    launch(context, "attention_forward_plain", plain::attention_forward_plain<T, Acc, decltype(head_dim)::value>,
           blocks, plain::kThreads, 0, args);
  });
}

template <class T, int... kHeadDims>
void forward_mma(const Context& context, const AttentionArgs& args) {
  with_head_dim<kHeadDims...>(args.head_dim, [&](auto head_dim) {
    with_bool(args.mask.data || args.drops, [&](auto general) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      constexpr bool kGeneral = decltype(general)::value;
      using Shape = tensor::ForwardShape<T, kHeadDim>;
      const int64_t blocks = ceil_div(args.seq_len, Shape::kQueries) * args.batch * args.num_heads;
      launch(context, "attention_forward_mma", tensor::attention_forward_mma<T, kHeadDim, kGeneral>, blocks,
             tensor::kThreads, Shape::kSharedBytes, args);
    });
  });
}

template <class T>
void forward_16bit(const Context& context, const AttentionArgs& args) {
  if (tensor_cores_serve(context)) {
    forward_mma<T, 64, 96, 128, 192, 256>(context, args);
  } else {
    forward_plain<T, float>(context, args);
  }
}

}  // namespace

bool tensor_cores_serve(const Context& context) {
  const void* kernel = reinterpret_cast<const void*>(tensor::attention_forward_mma<__half, 64, false>);
  return context.compute_capability >= 80 && kernel_attributes(context, kernel).ptxVersion >= 80;
}

void attention_forward(Context& context, const Params& p) {
  const AttentionArgs args = attention_args(p);
  if (p.rows() == 0) return;
  if (hopper_serves(context, args, p.dtype)) return attention_forward_hopper(context, args, p.dtype);
  switch (p.dtype) {
    case DType::kFloat16:
      return forward_16bit<__half>(context, args);
    case DType::kBFloat16:
      return forward_16bit<__nv_bfloat16>(context, args);
    case DType::kFloat64:
      return forward_plain<double, double>(context, args);
    default:
      if (tensor::tf32_serves(context, args)) return forward_mma<float, 64, 128>(context, args);
      return forward_plain<float, float>(context, args);
  }
}

}  // namespace cuda
}  // namespace pfa
