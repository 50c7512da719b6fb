// All stages for one instruction set. The including file has defined PFA_ISA, the namespace that they go to, and
// PFA_VECTOR_BYTES; with the instructions for it PFA_BFLOAT16_PRODUCTS and PFA_TILE_PRODUCTS.
//
// A file that is compiled once for every instruction set ends in .isa.h. It has no include guard and includes nothing:
// here all stand in the order in which they build on each other.

#include "core/cpu/isa/sizes.isa.h"

#include "core/cpu/isa/simd.isa.h"

#include "core/cpu/isa/exp.isa.h"
#include "core/cpu/isa/numbers.isa.h"
#include "core/cpu/isa/philox.isa.h"

#include "core/cpu/isa/memory.isa.h"

#include "core/cpu/rows/chunks.isa.h"
#include "core/cpu/rows/row_sums.isa.h"

#include "core/cpu/rows/norm_rows.isa.h"

#include "core/cpu/rows/layer_norm.isa.h"
#include "core/cpu/rows/residual.isa.h"

#include "core/cpu/linear/micro_gemm.isa.h"
#include "core/cpu/linear/panels.isa.h"

#include "core/cpu/linear/tile_products.isa.h"

#include "core/cpu/linear/matrix_product.isa.h"

#include "core/cpu/linear/linear.isa.h"

#include "core/cpu/attention/tile.isa.h"

#include "core/cpu/attention/dropout.isa.h"
#include "core/cpu/attention/mask.isa.h"

#include "core/cpu/attention/scores.isa.h"

#include "core/cpu/attention/score_gradient.isa.h"
#include "core/cpu/attention/softmax.isa.h"

#include "core/cpu/attention/backward.isa.h"
#include "core/cpu/attention/forward.isa.h"

namespace pfa::cpu::PFA_ISA {

template <class T>
struct Type {
  using type = T;
};

// Calls f with the element's type and that of the residual stream.
template <class F>
auto for_dtypes(const AttentionParams& p, F&& f) {
  const auto with_residual = [&](auto element) {
    return has_wide_residual(p) ? f(element, Type<float>{}) : f(element, element);
  };
  switch (p.dtype) {
    case DType::kFloat64:
      return f(Type<double>{}, Type<double>{});
    case DType::kFloat16:
      return with_residual(Type<Float16>{});
    case DType::kBFloat16:
      return with_residual(Type<BFloat16>{});
    default:
      return f(Type<float>{}, Type<float>{});
  }
}

// Calls f with these and the type of the layer-norm parameters: that of the residual stream, or float32.
template <class F>
auto for_norm_dtypes(const AttentionParams& p, F&& f) {
  return for_dtypes(p, [&](auto element, auto residual) {
    using R = typename decltype(residual)::type;
    if constexpr (std::is_same_v<R, Accumulator<R>>) {
      return f(element, residual, residual);
    } else {
      return p.norm_dtype == p.residual_dtype ? f(element, residual, residual) : f(element, residual, Type<float>{});
    }
  });
}

#define PFA_STAGE(name, pass)                                       \
  inline void name(Context& context, const AttentionParams& p) {             \
    for_dtypes(p, [&](auto element, auto residual) {                \
      using T = typename decltype(element)::type;                   \
      using R [[maybe_unused]] = typename decltype(residual)::type; \
      pass(context, p);                                             \
    });                                                             \
  }
#define PFA_NORM_STAGE(name, pass)                                   \
  inline void name(Context& context, const AttentionParams& p) {              \
    for_norm_dtypes(p, [&](auto element, auto residual, auto norm) { \
      using T = typename decltype(element)::type;                    \
      using R = typename decltype(residual)::type;                   \
      using N = typename decltype(norm)::type;                       \
      pass(context, p);                                              \
    });                                                              \
  }

PFA_NORM_STAGE(layer_norm_forward, (LayerNorm<T, R, N>::forward))
PFA_NORM_STAGE(layer_norm_backward, (LayerNorm<T, R, N>::backward))
PFA_NORM_STAGE(narrow_x, (LayerNorm<T, R, N>::narrow_x))
PFA_STAGE(qkv_linear_forward, (Linear<T, R>::qkv_linear_forward))
PFA_STAGE(qkv_linear_backward, (Linear<T, R>::qkv_linear_backward))
PFA_STAGE(attention_forward, AttentionForward<T>::run)
PFA_STAGE(attention_backward, AttentionBackward<T>::run)
PFA_STAGE(output_linear_forward, (Linear<T, R>::output_linear_forward))
PFA_STAGE(output_linear_backward, (Linear<T, R>::output_linear_backward))
PFA_NORM_STAGE(residual_forward, (Residual<T, R, N>::forward))
PFA_NORM_STAGE(residual_backward, (Residual<T, R, N>::backward))

#undef PFA_STAGE
#undef PFA_NORM_STAGE

inline size_t stage_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase) {
  return for_norm_dtypes(p, [&](auto element, auto residual_element, auto norm) {
    using T = typename decltype(element)::type;
    using R = typename decltype(residual_element)::type;
    using N = typename decltype(norm)::type;
    const bool backward = phase != Phase::kForward;
    const size_t layer_norm = LayerNorm<T, R, N>::workspace_bytes(context, p, backward);
    const size_t residual = Residual<T, R, N>::workspace_bytes(context, p, backward);
    switch (phase) {
      case Phase::kForward:
        return std::max({layer_norm, Linear<T, R>::workspace_bytes(context, p, phase),
                         AttentionForward<T>::workspace_bytes(context, p), residual});
      case Phase::kOutputBackward:
        return std::max(residual, Linear<T, R>::workspace_bytes(context, p, phase));
      case Phase::kAttentionBackward:
        return AttentionBackward<T>::workspace_bytes(context, p);
      case Phase::kInputBackward:
        return std::max(layer_norm, Linear<T, R>::workspace_bytes(context, p, phase));
    }
    return size_t{0};
  });
}

// constexpr, and so is what it gives: code that filled that in at start would be of this instruction set.
constexpr Implementation make_implementation(const char* name, const char* (*why_not)(),
                                             bool has_tile_products = false) {
  return {name,
          why_not,
          has_tile_products,
          layer_norm_forward,
          layer_norm_backward,
          narrow_x,
          qkv_linear_forward,
          qkv_linear_backward,
          attention_forward,
          attention_backward,
          output_linear_forward,
          output_linear_backward,
          residual_forward,
          residual_backward,
          stage_workspace_bytes};
}

}  // namespace pfa::cpu::PFA_ISA
