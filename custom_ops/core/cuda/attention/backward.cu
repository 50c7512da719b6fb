// Attention, backward: d_q, d_k, d_v from d_out (score_gradient.cuh), with the probabilities computed anew; their sums
// over the tokens are the gradient of the QKV bias. The stage, and the launches of the plain kernels.
#include <algorithm>

#include "core/arena.h"
#include "core/cuda/attention/implementations.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/mma_passes.h"
#include "core/cuda/attention/passes.h"
#include "core/cuda/attention/plain.cuh"
#include "core/cuda/attention/row_statistics.cuh"
#include "core/cuda/rows/column_sums.h"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

template <class T>
void backward_plain(const Context& context, const BackwardArgs& args) {
  using Acc = Accumulator<T>;
  make_row_statistics<T, Acc>(context, args);
  with_head_dim<64, 128, 256>(args.head_dim(), [&](auto head_dim) {
    with_bool(args.is_packed_or_grouped() || args.hidden_ranges.data, [&](auto general) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      constexpr bool kGeneral = decltype(general)::value;
      const auto run = [&](const char* name, void (*kernel)(BackwardArgs), int rows, int64_t heads) {
        launch(context, name, kernel, ceil_div(rows, plain::Tile<Acc>::kRows) * heads, plain::kThreads, 0, args);
      };
      if (args.d_key.data || args.d_value.data) {
        run("attention_backward_kv_plain", plain::attention_backward_kv_plain<T, Acc, kHeadDim, kGeneral>,
            args.visibility.keys, args.kv_heads());
      }
      if (args.d_query.data) {
        run("attention_backward_q_plain", plain::attention_backward_q_plain<T, Acc, kHeadDim, kGeneral>,
            args.visibility.queries, args.heads());
      }
    });
  });
}

BackwardArgs placed_args(const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  Arena arena(p.stage_workspace);
  place_row_statistics(arena, p, args);
  return args;
}

bool has_rows(const AttentionParams& p) { return p.batch * p.num_heads * std::max(p.queries, p.keys) > 0; }

}  // namespace

size_t qkv_bias_workspace_bytes(const Context& context, const AttentionParams& p) {
  return column_sums_workspace_bytes(context, p.dtype, p.queries_in_all(), p.d_query.token_stride);
}

void qkv_bias_gradient(Context& context, const AttentionParams& p) {
  if (!p.d_qkv_bias) return;
  column_sums(context, p.dtype, p.d_query.data, p.queries_in_all(), p.d_query.token_stride, p.d_qkv_bias,
              p.stage_workspace);
  // What is added to all keys alike moves all scores of a query alike: their bias has no gradient.
  const size_t head_bytes = p.head_dim * size_of(p.dtype);
  check(cudaMemsetAsync(static_cast<char*>(p.d_qkv_bias) + p.num_heads * head_bytes, 0, p.num_kv_heads * head_bytes,
                        context.stream),
        "qkv_bias_gradient: cudaMemsetAsync");
}

size_t row_statistics_workspace_bytes(const Context& context, const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  Arena arena;
  place_row_statistics(arena, p, args);
  return p.d_qkv_bias ? std::max(arena.used(), qkv_bias_workspace_bytes(context, p)) : arena.used();
}

void mma_attention_backward(Context& context, const AttentionParams& p) {
  const BackwardArgs args = placed_args(p);
  if (p.dtype == DType::kFloat32) {
    make_row_statistics<float, float>(context, args);
    mma::backward<float, 64, 128>(context, args);
  } else {
    dispatch_16bit(p.dtype, [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      make_row_statistics<T, float>(context, args);
      if (p.head_dim > 128) return mma::backward<T, 192, 256>(context, args);
      mma::backward<T, 64, 96, 128>(context, args);
    });
  }
  qkv_bias_gradient(context, p);
}

void plain_attention_backward(Context& context, const AttentionParams& p) {
  const BackwardArgs args = placed_args(p);
  dispatch_float(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    backward_plain<T>(context, args);
  });
  qkv_bias_gradient(context, p);
}

size_t attention_backward_workspace_bytes(const Context& context, const AttentionParams& p) {
  // The gradient of the mask comes when all else is done.
  const size_t bytes = p.d_mask ? mask_gradient_workspace_bytes(context, p) : 0;
  return has_rows(p) ? std::max(bytes, most_workspace(context, p, Pass::kBackward)) : bytes;
}

void attention_backward(Context& context, const AttentionParams& p) {
  if (!has_rows(p)) {
    qkv_bias_gradient(context, p);
  } else if (p.of_weights) {
    weights_attention_backward(context, p);
  } else if (p.d_query.data || p.d_key.data || p.d_value.data) {
    attention_implementation(context, p, Pass::kBackward).backward(context, p);
  }
  if (p.d_mask) mask_gradient(context, p);
}

}  // namespace cuda
}  // namespace pfa
