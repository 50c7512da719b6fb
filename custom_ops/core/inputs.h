// The inputs of each block: one list, in the order of the operator, from which bindings make names, enumerations and
// pointers.
#pragma once

#include "core/attention_weights.h"
#include "core/bare_attention.h"
#include "core/params.h"

// DO(Name, name, field) for each, separated by commas: the operator's name of it, that in errors, and the field of the
// struct. First those that have gradients, which attn_mask has only where it is of a float type.
#define PFA_ATTENTION_PARAMETERS(DO)                                                                  \
  DO(X, x, x), DO(QKVWeight, qkv_weight, qkv_weight), DO(LinearWeight, linear_weight, linear_weight), \
      DO(PreLnScale, pre_ln_scale, pre_ln_scale), DO(PreLnBias, pre_ln_bias, pre_ln_bias),            \
      DO(LnScale, ln_scale, ln_scale), DO(LnBias, ln_bias, ln_bias), DO(QKVBias, qkv_bias, qkv_bias), \
      DO(LinearBias, linear_bias, linear_bias)
#define PFA_ATTENTION_DIFFERENTIABLE_INPUTS(DO) PFA_ATTENTION_PARAMETERS(DO), DO(AttnMask, attn_mask, attn_mask)
#define PFA_ATTENTION_INPUTS(DO) PFA_ATTENTION_DIFFERENTIABLE_INPUTS(DO), DO(CuSeqlens, cu_seqlens, starts)

#define PFA_FEED_FORWARD_INPUTS(DO)                                                                                  \
  DO(X, x, x), DO(Linear1Weight, linear1_weight, linear1_weight), DO(Linear2Weight, linear2_weight, linear2_weight), \
      DO(Ln1Scale, ln1_scale, pre_ln_scale), DO(Ln1Bias, ln1_bias, pre_ln_bias), DO(Ln2Scale, ln2_scale, ln_scale),  \
      DO(Ln2Bias, ln2_bias, ln_bias), DO(Linear1Bias, linear1_bias, linear1_bias),                                   \
      DO(Linear2Bias, linear2_bias, linear_bias)

#define PFA_RESIDUAL_NORM_INPUTS(DO)                                                                    \
  DO(X, x, y), DO(Residual, residual, x), DO(Bias, bias, linear_bias), DO(LnScale, ln_scale, ln_scale), \
      DO(LnBias, ln_bias, ln_bias)

#define PFA_LINEAR_INPUTS(DO) DO(X, x, x), DO(Weight, weight, weight), DO(Bias, bias, bias)

#define PFA_BARE_ATTENTION_DIFFERENTIABLE_INPUTS(DO) \
  DO(Query, query, query), DO(Key, key, key), DO(Value, value, value), DO(AttnMask, attn_mask, attn_mask)
#define PFA_BARE_ATTENTION_INPUTS(DO)                                                       \
  PFA_BARE_ATTENTION_DIFFERENTIABLE_INPUTS(DO), DO(CuSeqlensQ, cu_seqlens_q, query_starts), \
      DO(CuSeqlensK, cu_seqlens_k, key_starts), DO(StartendRowIndices, startend_row_indices, hidden_ranges)

#define PFA_ATTENTION_WEIGHTS_DIFFERENTIABLE_INPUTS(DO) \
  DO(Query, query, query), DO(Key, key, key), DO(AttnMask, attn_mask, attn_mask)
#define PFA_ATTENTION_WEIGHTS_INPUTS(DO)                                                                        \
  PFA_ATTENTION_WEIGHTS_DIFFERENTIABLE_INPUTS(DO), DO(StartendRowIndices, startend_row_indices, hidden_ranges), \
      DO(Statistics, statistics, statistics)

namespace pfa {

// The name of a differentiable input, and where a block's struct points to it and to its gradient.
template <class P>
struct InputPointers {
  const char* name;
  const void* P::* value;
  void* P::* gradient;
};

#define PFA_ENUMERATOR(Name, name, field) k##Name
#define PFA_ATTENTION_POINTERS(Name, name, field) \
  {#name, &AttentionBlockParams::field, &AttentionBlockParams::d_##field}
#define PFA_BARE_ATTENTION_POINTERS(Name, name, field) \
  {#name, &BareAttentionParams::field, &BareAttentionParams::d_##field}
#define PFA_ATTENTION_WEIGHTS_POINTERS(Name, name, field) \
  {#name, &AttentionWeightsParams::field, &AttentionWeightsParams::d_##field}
#define PFA_FEED_FORWARD_POINTERS(Name, name, field) {#name, &FeedForwardParams::field, &FeedForwardParams::d_##field}
#define PFA_RESIDUAL_NORM_POINTERS(Name, name, field) \
  {#name, &ResidualNormParams::field, &ResidualNormParams::d_##field}
#define PFA_LINEAR_POINTERS(Name, name, field) {#name, &LinearParams::field, &LinearParams::d_##field}

namespace attention {
enum Input : int { PFA_ATTENTION_INPUTS(PFA_ENUMERATOR), kInputCount };
constexpr int kGradientCount = kCuSeqlens;
constexpr InputPointers<AttentionBlockParams> kParameters[] = {PFA_ATTENTION_PARAMETERS(PFA_ATTENTION_POINTERS)};
constexpr InputPointers<AttentionBlockParams> kInputs[kGradientCount] = {
    PFA_ATTENTION_DIFFERENTIABLE_INPUTS(PFA_ATTENTION_POINTERS)};
constexpr char kMaskName[] = "attn_mask";
}  // namespace attention

namespace bare_attention {
enum Input : int { PFA_BARE_ATTENTION_INPUTS(PFA_ENUMERATOR), kInputCount };
constexpr int kGradientCount = kCuSeqlensQ;
constexpr InputPointers<BareAttentionParams> kInputs[kGradientCount] = {
    PFA_BARE_ATTENTION_DIFFERENTIABLE_INPUTS(PFA_BARE_ATTENTION_POINTERS)};
}  // namespace bare_attention

namespace attention_weights {
enum Input : int { PFA_ATTENTION_WEIGHTS_INPUTS(PFA_ENUMERATOR), kInputCount };
constexpr int kGradientCount = kStartendRowIndices;
constexpr InputPointers<AttentionWeightsParams> kInputs[kGradientCount] = {
    PFA_ATTENTION_WEIGHTS_DIFFERENTIABLE_INPUTS(PFA_ATTENTION_WEIGHTS_POINTERS)};
}  // namespace attention_weights

namespace feed_forward {
enum Input : int { PFA_FEED_FORWARD_INPUTS(PFA_ENUMERATOR), kInputCount };
constexpr InputPointers<FeedForwardParams> kInputs[kInputCount] = {PFA_FEED_FORWARD_INPUTS(PFA_FEED_FORWARD_POINTERS)};
}  // namespace feed_forward

namespace residual_norm {
enum Input : int { PFA_RESIDUAL_NORM_INPUTS(PFA_ENUMERATOR), kInputCount };
constexpr InputPointers<ResidualNormParams> kInputs[kInputCount] = {
    PFA_RESIDUAL_NORM_INPUTS(PFA_RESIDUAL_NORM_POINTERS)};
}  // namespace residual_norm

namespace linear {
enum Input : int { PFA_LINEAR_INPUTS(PFA_ENUMERATOR), kInputCount };
constexpr InputPointers<LinearParams> kInputs[kInputCount] = {PFA_LINEAR_INPUTS(PFA_LINEAR_POINTERS)};
}  // namespace linear

#undef PFA_ENUMERATOR
#undef PFA_ATTENTION_POINTERS
#undef PFA_BARE_ATTENTION_POINTERS
#undef PFA_ATTENTION_WEIGHTS_POINTERS
#undef PFA_FEED_FORWARD_POINTERS
#undef PFA_RESIDUAL_NORM_POINTERS
#undef PFA_LINEAR_POINTERS

}  // namespace pfa
