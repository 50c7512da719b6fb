// Attention, backward: d_q, d_k, d_v from d_out (score_gradient.cuh), with the probabilities computed anew; their sums
// over the tokens are the gradient of the QKV bias. The stage, and the launches of the plain and the mma kernels.
#include <algorithm>

#include "core/arena.h"
#include "core/cuda/attention/implementations.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/mma.cuh"
#include "core/cuda/attention/passes.h"
#include "core/cuda/attention/plain.cuh"
#include "core/cuda/attention/row_statistics.cuh"
#include "core/cuda/rows/column_sums.h"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

template <class T, int... kHeadDims>
void backward_mma(const Context& context, const BackwardArgs& args) {
  make_row_statistics<T, float>(context, args);
  with_head_dim<kHeadDims...>(args.head_dim(), [&](auto head_dim) {
    with_bool(args.mask.data || args.drops, [&](auto mask_or_dropout) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      constexpr bool kMaskOrDropout = decltype(mask_or_dropout)::value;
      using Shape = mma::BackwardShape<T, kHeadDim>;
      const auto run = [&](const char* name, void (*kernel)(BackwardArgs), int rows) {
        launch(context, name, kernel, ceil_div(rows, Shape::kOuter) * args.heads(), mma::kThreads, Shape::kSharedBytes,
               args);
      };
      const auto run_kv = [&](auto key_gradient, auto value_gradient) {
        run("attention_backward_kv_mma",
            mma::attention_backward_kv_mma<T, kHeadDim, kMaskOrDropout, decltype(key_gradient)::value,
                                           decltype(value_gradient)::value>,
            args.visibility.keys);
      };
      if constexpr (Shape::kSplit) {
        run_kv(std::true_type{}, std::false_type{});
        run_kv(std::false_type{}, std::true_type{});
      } else {
        run_kv(std::true_type{}, std::true_type{});
      }
      run("attention_backward_q_mma", mma::attention_backward_q_mma<T, kHeadDim, kMaskOrDropout>,
          args.visibility.queries);
    });
  });
}

template <class T>
void backward_plain(const Context& context, const BackwardArgs& args) {
  using Acc = Accumulator<T>;
  make_row_statistics<T, Acc>(context, args);
  with_head_dim<64, 128, 256>(args.head_dim(), [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    const auto run = [&](const char* name, void (*kernel)(BackwardArgs), int rows) {
      launch(context, name, kernel, ceil_div(rows, plain::Tile<Acc>::kRows) * args.heads(), plain::kThreads, 0, args);
    };
    run("attention_backward_kv_plain", plain::attention_backward_kv_plain<T, Acc, kHeadDim>, args.visibility.keys);
    run("attention_backward_q_plain", plain::attention_backward_q_plain<T, Acc, kHeadDim>, args.visibility.queries);
  });
}

BackwardArgs placed_args(const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  Arena arena(p.stage_workspace);
  place_row_statistics(arena, p, args);
  return args;
}

void sum_bias(Context& context, const AttentionParams& p) {
  if (!p.d_qkv_bias) return;
  column_sums(context, p.dtype, p.d_query.data, p.batch * p.queries, p.d_query.token_stride, p.d_qkv_bias,
              p.stage_workspace);
}

}  // namespace

size_t row_statistics_workspace_bytes(const Context& context, const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  Arena arena;
  place_row_statistics(arena, p, args);
  return !p.d_qkv_bias
             ? arena.used()
             : std::max(arena.used(), column_sums_workspace_bytes(context, p.dtype, p.batch * p.queries,
                                                                  p.d_query.token_stride));
}

void mma_attention_backward(Context& context, const AttentionParams& p) {
  const BackwardArgs args = placed_args(p);
  if (p.dtype == DType::kFloat32) {
    backward_mma<float, 64, 128>(context, args);
  } else {
    dispatch_16bit(p.dtype, [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      backward_mma<T, 64, 96, 128, 192, 256>(context, args);
    });
  }
  sum_bias(context, p);
}

void plain_attention_backward(Context& context, const AttentionParams& p) {
  const BackwardArgs args = placed_args(p);
  dispatch_float(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    backward_plain<T>(context, args);
  });
  sum_bias(context, p);
}

size_t attention_backward_workspace_bytes(const Context& context, const AttentionParams& p) {
  if (p.batch * p.num_heads * p.queries == 0) return 0;
  // Addresses that are not known yet may rule out the first that serves: each that comes after it must find room too.
  size_t bytes = 0;
  for (const AttentionImplementation* implementation : kAttentionImplementations) {
    if (implementation->why_not(context, p, Pass::kBackward)) continue;
    bytes = std::max(bytes, implementation->backward_workspace_bytes(context, p));
  }
  return bytes;
}

void attention_backward(Context& context, const AttentionParams& p) {
  if (p.batch * p.num_heads * p.queries > 0) {
    attention_implementation(context, p, Pass::kBackward).backward(context, p);
  } else {
    sum_bias(context, p);
  }
}

}  // namespace cuda
}  // namespace pfa
