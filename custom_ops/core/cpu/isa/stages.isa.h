// All stages for one instruction set. The including file has defined PFA_ISA, the namespace that they go to, and
// PFA_VECTOR_BYTES; with the instructions for it PFA_WIDE_TILES, PFA_BFLOAT16_PRODUCTS and PFA_TILE_PRODUCTS.
//
// A file that is compiled once for every instruction set ends in .isa.h. It has no include guard and includes nothing:
// here all stand in the order in which they build on each other.

#include "core/cpu/isa/sizes.isa.h"

#include "core/cpu/isa/simd.isa.h"

#include "core/cpu/isa/vectors.isa.h"

#include "core/cpu/isa/exp.isa.h"

#include "core/cpu/isa/activation.isa.h"
#include "core/cpu/isa/numbers.isa.h"
#include "core/cpu/isa/philox.isa.h"

#include "core/cpu/isa/memory.isa.h"

#include "core/cpu/rows/chunks.isa.h"
#include "core/cpu/rows/row_sums.isa.h"

#include "core/cpu/rows/dropout.isa.h"
#include "core/cpu/rows/norm_rows.isa.h"

#include "core/cpu/rows/activation.isa.h"
#include "core/cpu/rows/layer_norm.isa.h"
#include "core/cpu/rows/residual.isa.h"

#include "core/cpu/linear/panels.isa.h"

#include "core/cpu/linear/column_cut.isa.h"
#include "core/cpu/linear/lines.isa.h"
#include "core/cpu/linear/register_tile.isa.h"

#include "core/cpu/linear/wide_tile.isa.h"

#include "core/cpu/linear/micro_gemm.isa.h"

#include "core/cpu/linear/tile_products.isa.h"
#include "core/cpu/linear/weight_stream.isa.h"

#include "core/cpu/linear/matrix_product.isa.h"

#include "core/cpu/linear/linear.isa.h"

#include "core/cpu/attention/coming_rows.isa.h"
#include "core/cpu/attention/tile.isa.h"

#include "core/cpu/attention/dropout.isa.h"
#include "core/cpu/attention/mask.isa.h"

#include "core/cpu/attention/scores.isa.h"

#include "core/cpu/attention/score_gradient.isa.h"
#include "core/cpu/attention/softmax.isa.h"

#include "core/cpu/attention/one_query.isa.h"
#include "core/cpu/attention/residue.isa.h"
#include "core/cpu/attention/weights.isa.h"

#include "core/cpu/attention/backward.isa.h"
#include "core/cpu/attention/forward.isa.h"

#include "core/cpu/attention/mask_gradient.isa.h"

namespace pfa::cpu::PFA_ISA {

template <class T>
struct Type {
  using type = T;
};

// Calls f with the type of a dtype.
template <class F>
auto for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(Type<double>{});
    case DType::kFloat16:
      return f(Type<Float16>{});
    case DType::kBFloat16:
      return f(Type<BFloat16>{});
    default:
      return f(Type<float>{});
  }
}

// Calls f with the element's type and that of the residual stream.
template <class F>
auto for_dtypes(const BlockParams& p, F&& f) {
  return for_dtype(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    if constexpr (std::is_same_v<T, Accumulator<T>>) {
      return f(element, element);
    } else {
      return has_wide_residual(p) ? f(element, Type<float>{}) : f(element, element);
    }
  });
}

// Calls f with these and the type of the layer-norm parameters: that of the residual stream, or float32.
template <class F>
auto for_norm_dtypes(const BlockParams& p, F&& f) {
  return for_dtypes(p, [&](auto element, auto residual) {
    using R = typename decltype(residual)::type;
    if constexpr (std::is_same_v<R, Accumulator<R>>) {
      return f(element, residual, residual);
    } else {
      return p.norm_dtype == p.residual_dtype ? f(element, residual, residual) : f(element, residual, Type<float>{});
    }
  });
}

template <class T>
void attention_gradients(Context& context, const AttentionParams& p) {
  if (p.d_mask && MaskGradient<T>::goes_along(context, p)) return MaskGradient<T>::run_along(context, p);
  AttentionBackward<T>::run(context, p);
  if (p.d_mask) MaskGradient<T>::run(context, p);
}

#define PFA_STAGE(name, P, pass)                                    \
  inline void name(Context& context, const P& p) {                  \
    for_dtypes(p, [&](auto element, auto residual) {                \
      using T = typename decltype(element)::type;                   \
      using R [[maybe_unused]] = typename decltype(residual)::type; \
      pass(context, p);                                             \
    });                                                             \
  }
#define PFA_NORM_STAGE(name, pass)                                   \
  inline void name(Context& context, const BlockParams& p) {         \
    for_norm_dtypes(p, [&](auto element, auto residual, auto norm) { \
      using T = typename decltype(element)::type;                    \
      using R = typename decltype(residual)::type;                   \
      using N = typename decltype(norm)::type;                       \
      pass(context, p);                                              \
    });                                                              \
  }
#define PFA_DTYPE_STAGE(name, P, pass)             \
  inline void name(Context& context, const P& p) { \
    for_dtype(p.dtype, [&](auto element) {         \
      using T = typename decltype(element)::type;  \
      pass(context, p);                            \
    });                                            \
  }

PFA_NORM_STAGE(layer_norm_forward, (LayerNorm<T, R, N>::forward))
PFA_NORM_STAGE(layer_norm_backward, (LayerNorm<T, R, N>::backward))
PFA_NORM_STAGE(narrow_x, (LayerNorm<T, R, N>::narrow_x))
PFA_NORM_STAGE(residual_forward, (Residual<T, R, N>::forward))
PFA_NORM_STAGE(residual_backward, (Residual<T, R, N>::backward))
PFA_STAGE(qkv_linear_forward, AttentionBlockParams, (Linear<T, R>::qkv_linear_forward))
PFA_STAGE(qkv_linear_backward, AttentionBlockParams, (Linear<T, R>::qkv_linear_backward))
PFA_STAGE(output_linear_forward, AttentionBlockParams, (Linear<T, R>::output_linear_forward))
PFA_STAGE(output_linear_backward, AttentionBlockParams, (Linear<T, R>::output_linear_backward))
PFA_STAGE(linear1_forward, FeedForwardParams, (Linear<T, R>::linear1_forward))
PFA_STAGE(linear1_backward, FeedForwardParams, (Linear<T, R>::linear1_backward))
PFA_STAGE(linear2_forward, FeedForwardParams, (Linear<T, R>::linear2_forward))
PFA_STAGE(linear2_backward, FeedForwardParams, (Linear<T, R>::linear2_backward))
PFA_DTYPE_STAGE(attention_forward, AttentionParams, AttentionForward<T>::run)
PFA_DTYPE_STAGE(attention_backward, AttentionParams, attention_gradients<T>)
PFA_DTYPE_STAGE(attention_weights, AttentionParams, AttentionWeights<T>::run)
PFA_DTYPE_STAGE(linear_forward, LinearParams, (Linear<T, T>::linear_forward))
PFA_DTYPE_STAGE(linear_backward, LinearParams, (Linear<T, T>::linear_backward))
PFA_DTYPE_STAGE(activation_backward, LinearParams, ActivationRows<T>::backward)

#undef PFA_STAGE
#undef PFA_NORM_STAGE
#undef PFA_DTYPE_STAGE

// Of the stages that both blocks have.
template <class P>
size_t frame_workspace_bytes(const Context& context, const P& p, Phase phase) {
  return for_norm_dtypes(p, [&](auto element, auto residual_element, auto norm) {
    using T = typename decltype(element)::type;
    using R = typename decltype(residual_element)::type;
    using N = typename decltype(norm)::type;
    const bool backward = phase != Phase::kForward;
    const size_t layer_norm = LayerNorm<T, R, N>::workspace_bytes(context, p, backward);
    const size_t residual = Residual<T, R, N>::workspace_bytes(context, p, backward);
    switch (phase) {
      case Phase::kForward:
        return std::max(layer_norm, residual);
      case Phase::kOutputBackward:
        return residual;
      case Phase::kInputBackward:
        return layer_norm;
      default:
        return size_t{0};
    }
  });
}

inline size_t attention_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase) {
  return for_dtype(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    switch (phase) {
      case Phase::kForward:
        return AttentionForward<T>::workspace_bytes(context, p);
      case Phase::kAttentionBackward:
        return std::max(AttentionBackward<T>::workspace_bytes(context, p),
                        p.d_mask ? MaskGradient<T>::workspace_bytes(context, p) : 0);
      default:
        return size_t{0};
    }
  });
}

inline size_t attention_block_workspace_bytes(const Context& context, const AttentionBlockParams& p, Phase phase) {
  const size_t linear = for_dtypes(p, [&](auto element, auto residual) {
    return Linear<typename decltype(element)::type, typename decltype(residual)::type>::workspace_bytes(context, p,
                                                                                                        phase);
  });
  const size_t attention = attention_workspace_bytes(context, attention_of(p), phase);
  return std::max({linear, attention, frame_workspace_bytes(context, p, phase)});
}

inline size_t feed_forward_workspace_bytes(const Context& context, const FeedForwardParams& p, Phase phase) {
  const size_t own = for_dtypes(p, [&](auto element, auto residual) {
    return Linear<typename decltype(element)::type, typename decltype(residual)::type>::workspace_bytes(context, p,
                                                                                                        phase);
  });
  return std::max(own, frame_workspace_bytes(context, p, phase));
}

inline size_t residual_norm_workspace_bytes(const Context& context, const ResidualNormParams& p, Phase phase) {
  return frame_workspace_bytes(context, p, phase);
}

inline size_t linear_workspace_bytes(const Context& context, const LinearParams& p, Phase phase) {
  return for_dtype(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return Linear<T, T>::workspace_bytes(context, p, phase);
  });
}

// constexpr, and so is what it gives: code that filled that in at start would be of this instruction set.
constexpr Implementation make_implementation(const char* name, const char* (*why_not)(),
                                             bool has_tile_products = false) {
#define PFA_ADDRESS(name, P) name,
  return {name,
          why_not,
          has_tile_products,
          PFA_CPU_STAGES(PFA_ADDRESS) attention_workspace_bytes,
          attention_block_workspace_bytes,
          feed_forward_workspace_bytes,
          residual_norm_workspace_bytes,
          linear_workspace_bytes};
#undef PFA_ADDRESS
}

}  // namespace pfa::cpu::PFA_ISA
