// The launches of the mma family's backward kernels for one dtype. Each file that includes this instantiates `backward`
// once, so that compilers can share the work.
#pragma once

#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/mma.cuh"
#include "core/cuda/attention/mma_passes.h"

namespace pfa {
namespace cuda {
namespace mma {

template <class T, int... kHeadDims>
void backward(const Context& context, const BackwardArgs& args) {
  with_head_dim<kHeadDims...>(args.head_dim(), [&](auto head_dim) {
    with_bool(args.has_mask_or_dropout(), [&](auto mask_or_dropout) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      constexpr bool kMaskOrDropout = decltype(mask_or_dropout)::value;
      using Shape = BackwardShape<T, kHeadDim>;
      const auto run = [&](const char* name, void (*kernel)(BackwardArgs), int rows, int64_t heads) {
        launch(context, name, kernel, ceil_div(rows, Shape::kOuter) * heads, kThreads, Shape::kSharedBytes, args);
      };
      const auto run_kv = [&](auto key_gradient, auto value_gradient) {
        with_bool(args.is_packed_or_grouped(), [&](auto packed_or_grouped) {
          run("attention_backward_kv_mma",
              attention_backward_kv_mma<T, kHeadDim, kMaskOrDropout, decltype(packed_or_grouped)::value,
                                        decltype(key_gradient)::value, decltype(value_gradient)::value>,
              args.visibility.keys, args.kv_heads());
        });
      };
      if constexpr (Shape::kSplit) {
        if (args.d_key.data) run_kv(std::true_type{}, std::false_type{});
        if (args.d_value.data) run_kv(std::false_type{}, std::true_type{});
      } else {
        if (args.d_key.data || args.d_value.data) run_kv(std::true_type{}, std::true_type{});
      }
      if (!args.d_query.data) return;
      with_bool(args.is_packed(), [&](auto packed) {
        run("attention_backward_q_mma", attention_backward_q_mma<T, kHeadDim, kMaskOrDropout, decltype(packed)::value>,
            args.visibility.queries, args.heads());
      });
    });
  });
}

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
