// The stages of the blocks (stages.md) on CUDA. Each queues its kernels on the context's stream and returns.
//
// A block's last product adds the bias, and x where there is no output dropout; so without a final layer norm nothing
// may be left for the residual stage. In backward it rounds, where x is of a wider type, and sums up the bias's
// gradient. d_qkv_bias belongs to attention_backward.
#pragma once

#include <cstddef>

#include "core/cuda/context.h"
#include "core/params.h"

namespace pfa {
namespace cuda {

void store_random_state(Context& context, const BlockParams& p);
void copy(Context& context, const void* from, void* to, size_t bytes);

void narrow_x(Context& context, const BlockParams& p);
void layer_norm_forward(Context& context, const BlockParams& p);
void layer_norm_backward(Context& context, const BlockParams& p);
size_t layer_norm_backward_workspace_bytes(const Context& context, const BlockParams& p);

void residual_forward(Context& context, const BlockParams& p);
void residual_forward(Context& context, const ResidualNormParams& p);  // where no product has added the bias
void residual_backward(Context& context, const BlockParams& p);
size_t residual_backward_workspace_bytes(const Context& context, const BlockParams& p);

void qkv_linear_forward(Context& context, const AttentionBlockParams& p);
void qkv_linear_backward(Context& context, const AttentionBlockParams& p);
void attention_forward(Context& context, const AttentionParams& p);
void attention_backward(Context& context, const AttentionParams& p);
void attention_weights(Context& context, const AttentionParams& p);
size_t attention_forward_workspace_bytes(const Context& context, const AttentionParams& p);
size_t attention_backward_workspace_bytes(const Context& context, const AttentionParams& p);
void output_linear_forward(Context& context, const AttentionBlockParams& p);
void output_linear_backward(Context& context, const AttentionBlockParams& p);
size_t linear_workspace_bytes(const Context& context, const AttentionBlockParams& p, Phase phase);

void linear1_forward(Context& context, const FeedForwardParams& p);
void linear1_backward(Context& context, const FeedForwardParams& p);
void linear2_forward(Context& context, const FeedForwardParams& p);
void linear2_backward(Context& context, const FeedForwardParams& p);
int64_t activated_columns(const Context& context, const FeedForwardParams& p);
size_t linear_workspace_bytes(const Context& context, const FeedForwardParams& p, Phase phase);

void linear_forward(Context& context, const LinearParams& p);
void activation_backward(Context& context, const LinearParams& p);
void linear_backward(Context& context, const LinearParams& p);
size_t linear_workspace_bytes(const Context& context, const LinearParams& p, Phase phase);

size_t stage_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase);
size_t stage_workspace_bytes(const Context& context, const AttentionBlockParams& p, Phase phase);
size_t stage_workspace_bytes(const Context& context, const FeedForwardParams& p, Phase phase);
size_t stage_workspace_bytes(const Context& context, const ResidualNormParams& p, Phase phase);
size_t stage_workspace_bytes(const Context& context, const LinearParams& p, Phase phase);

}  // namespace cuda
}  // namespace pfa
