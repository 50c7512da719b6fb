// The stages of the block (stages.md) on CUDA. Each queues its kernels on the context's stream and returns.
//
// The output projection adds the bias, and x where there is no output dropout; so without a final layer norm nothing
// may be left for the residual stage. In backward it rounds, where x is of a wider type. d_qkv_bias belongs to
// attention_backward.
#pragma once

#include <cstddef>

#include "core/cuda/context.h"
#include "core/params.h"

namespace pfa {
namespace cuda {

inline bool residual_has_forward_kernel(const AttentionParams& p) { return p.final_layer_norm || has_output_dropout(p); }
inline bool residual_has_backward_kernel(const AttentionParams& p) { return p.final_layer_norm || has_own_d_linear(p); }

void narrow_x(Context& context, const AttentionParams& p);
void layer_norm_forward(Context& context, const AttentionParams& p);
void layer_norm_backward(Context& context, const AttentionParams& p);
size_t layer_norm_backward_workspace_bytes(const Context& context, const AttentionParams& p);

void qkv_linear_forward(Context& context, const AttentionParams& p);
void qkv_linear_backward(Context& context, const AttentionParams& p);

void attention_forward(Context& context, const AttentionParams& p);
void attention_backward(Context& context, const AttentionParams& p);
size_t attention_backward_workspace_bytes(const Context& context, const AttentionParams& p);

void output_linear_forward(Context& context, const AttentionParams& p);
void output_linear_backward(Context& context, const AttentionParams& p);
size_t linear_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase);

void residual_forward(Context& context, const AttentionParams& p);
void residual_backward(Context& context, const AttentionParams& p);
size_t residual_backward_workspace_bytes(const Context& context, const AttentionParams& p);

size_t stage_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase);

}  // namespace cuda
}  // namespace pfa
