#include "core/cuda/attention/implementations.h"

#include "core/cuda/attention/args.h"
#include "core/cuda/attention/passes.h"

namespace pfa {
namespace cuda {
namespace {

#if CUDART_VERSION >= 12010
const char* why_not_hopper(const Context& context, const AttentionParams& p, Pass pass) {
  if (context.compute_capability != 90) return "it runs on compute capability 9.0 only";
  if (!hopper_is_built(context)) return "it was not compiled: build for 9.0a";
  if (!is_16bit_float(p.dtype)) return "it computes float16 and bfloat16 only";
  if (p.head_dim > 128) return "it takes a head_dim up to 128";
  if (!is_packed_projection(p)) return "it reads query, key and value of one packed projection only";
  if (p.window_left >= 0 || p.window_right >= 0) return "it knows no windows";
  if (p.hidden_ranges.data) return "it knows no ranges of hidden queries";
  if (!(p.scale > 0)) return "it takes a positive scale only";
  if (pass == Pass::kBackward && p.d_out.data && (!p.d_query.data || !p.d_key.data || !p.d_value.data)) {
    return "it makes the gradients of query, key and value together only";
  }
  if (!has_vectors(p)) return "it takes a head_dim that is a multiple of 8, in tensors aligned to 16 bytes";
  if (pass == Pass::kBackward && context.deterministic) {
    return "it adds gradients in no fixed order, and deterministic ones are asked for";
  }
  return nullptr;
}
#endif

const char* why_not_mma(const Context& context, const AttentionParams& p, Pass) {
  if (context.compute_capability < 80) return "it needs compute capability 8.0";
  if (!mma_is_built(context)) return "it was not compiled: build for 8.0 or later";
  if (p.dtype == DType::kFloat64) return "it does not compute float64";
  if (p.head_dim > (p.dtype == DType::kFloat32 ? 128 : kMaxHeadDimOnGpu))
    return "it takes a head_dim up to 256, 128 in float32";
  if (p.dtype == DType::kFloat32 && !context.allow_tf32) return "it rounds float32 to TF32, which is not allowed";
  return nullptr;
}

const char* why_not_plain(const Context&, const AttentionParams& p, Pass) {
  return p.head_dim > kMaxHeadDimOnGpu ? "it takes a head_dim up to 256" : nullptr;
}

}  // namespace

#if CUDART_VERSION >= 12010
const AttentionImplementation kHopperAttention{"hopper", why_not_hopper, hopper_attention_forward,
                                               hopper_attention_backward_workspace_bytes, hopper_attention_backward};
#else  // no tensor maps, warpgroup products or vector additions to memory
const AttentionImplementation kHopperAttention{
    "hopper",
    [](const Context&, const AttentionParams&, Pass) { return "it was not compiled: that takes CUDA 12.1 or later"; },
    nullptr, [](const Context&, const AttentionParams&) { return size_t{0}; }, nullptr};
#endif
const AttentionImplementation kMmaAttention{"mma", why_not_mma, mma_attention_forward, row_statistics_workspace_bytes,
                                            mma_attention_backward};
const AttentionImplementation kPlainAttention{"plain", why_not_plain, plain_attention_forward,
                                              row_statistics_workspace_bytes, plain_attention_backward};

}  // namespace cuda
}  // namespace pfa
