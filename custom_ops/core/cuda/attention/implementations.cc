#include "core/cuda/attention/implementations.h"

#include "core/cuda/attention/args.h"
#include "core/cuda/attention/passes.h"

namespace pfa {
namespace cuda {
namespace {

const char* why_not_one_query(const Context& context, const AttentionParams& p, Pass pass) {
  if (p.queries != 1) return "it takes one query";
  if (pass == Pass::kBackward) return "it has no backward pass";
  if (context.compute_capability < 80) return "it needs compute capability 8.0";
  if (!mma_is_built(context)) return "it was not compiled: build for 8.0 or later";
  if (!is_16bit_float(p.dtype)) return "it computes float16 and bfloat16 only";
  if (p.head_dim > 128) return "it takes a head_dim up to 128";
  if (p.batch * p.keys == 0) return "it needs keys";
  if (p.query_starts) return "it takes no packed sequences";
  if (p.hidden_ranges.data) return "it knows no ranges of hidden queries";
  if (p.dropout.threshold > 0) return "it drops nothing";
  if (!(p.scale > 0)) return "it takes a positive scale only";
  if (!has_vectors(p)) return "it takes a head_dim that is a multiple of 8, in tensors aligned to 16 bytes";
  return nullptr;
}

#if CUDART_VERSION >= 12010
// Whether a tensor map can describe what the copy engine reads.
bool has_tensor_maps(const AttentionParams& p) {
  const auto fits = [](int64_t count, int64_t stride) {
    return count <= 1 || (stride > 0 && stride * 2 < int64_t{1} << 34);  // 2: bytes of a number
  };
  const auto all_fit = [&](const Heads<const void>& heads, int64_t count, int64_t rows) {
    return fits(count, heads.head_stride) && fits(rows, heads.token_stride) &&
           (p.query_starts || fits(p.batch, heads.batch_stride));
  };
  return all_fit(p.query, p.num_heads, p.queries) && all_fit(p.key, p.num_kv_heads, p.keys) &&
         all_fit(p.value, p.num_kv_heads, p.keys) && (!p.d_out.data || all_fit(p.d_out, p.num_heads, p.queries));
}

const char* why_not_hopper(const Context& context, const AttentionParams& p, Pass pass) {
  if (context.compute_capability != 90) return "it runs on compute capability 9.0 only";
  if (!hopper_is_built(context)) return "it was not compiled: build for 9.0a";
  if (!is_16bit_float(p.dtype)) return "it computes float16 and bfloat16 only";
  if (p.head_dim > 128) return "it takes a head_dim up to 128";
  if (p.batch * p.queries * p.keys == 0) return "it needs queries and keys";
  if (p.query_starts && p.packed_queries * p.packed_keys == 0) return "it needs queries and keys";
  if (p.query_starts && p.mask.data) return "it takes no mask beside packed sequences";
  if (p.hidden_ranges.data && (p.query_starts || p.mask.data)) {
    return "it takes no mask and no packed sequences beside ranges of hidden queries";
  }
  if (p.hidden_ranges.data && p.keys > int64_t{1} << 21) {
    return "it takes up to 2097152 keys beside ranges of hidden queries";
  }
  if (!(p.scale > 0)) return "it takes a positive scale only";
  if (pass == Pass::kBackward && p.d_out.data && (!p.d_query.data || !p.d_key.data || !p.d_value.data)) {
    return "it makes the gradients of query, key and value together only";
  }
  if (!has_tensor_maps(p)) return "it takes tensors with strides above 0 and below 16 GiB only";
  if (!has_vectors(p)) return "it takes a head_dim that is a multiple of 8, in tensors aligned to 16 bytes";
  if (pass == Pass::kBackward && context.deterministic && p.hidden_ranges.data) {
    return "it adds gradients in no fixed order beside ranges of hidden queries, and deterministic ones are asked for";
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

size_t no_workspace(const Context&, const AttentionParams&) { return 0; }

}  // namespace

const AttentionImplementation kOneQueryAttention{"one_query",
                                                 why_not_one_query,
                                                 one_query_attention_forward_workspace_bytes,
                                                 one_query_attention_forward,
                                                 no_workspace,
                                                 nullptr};
#if CUDART_VERSION >= 12010
const AttentionImplementation kHopperAttention{"hopper",
                                               why_not_hopper,
                                               hopper_attention_forward_workspace_bytes,
                                               hopper_attention_forward,
                                               hopper_attention_backward_workspace_bytes,
                                               hopper_attention_backward};
#else  // no tensor maps, warpgroup products or vector additions to memory
const AttentionImplementation kHopperAttention{
    "hopper",
    [](const Context&, const AttentionParams&, Pass) { return "it was not compiled: that takes CUDA 12.1 or later"; },
    no_workspace,
    nullptr,
    no_workspace,
    nullptr};
#endif
const AttentionImplementation kMmaAttention{
    "mma", why_not_mma, no_workspace, mma_attention_forward, row_statistics_workspace_bytes, mma_attention_backward};
const AttentionImplementation kPlainAttention{"plain",
                                              why_not_plain,
                                              no_workspace,
                                              plain_attention_forward,
                                              row_statistics_workspace_bytes,
                                              plain_attention_backward};

}  // namespace cuda
}  // namespace pfa
