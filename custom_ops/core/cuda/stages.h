// The stages of block.h on CUDA. Each queues its kernels on the context's stream and returns.
//
// What lies between the output projection and the result is shared out: without output dropout the projection adds bias and
// x itself, and without a final layer norm nothing is left for the residual stage; but backward rounds, where x is of a wider type.
#pragma once

#include <cstddef>

#include "core/cuda/context.h"
#include "core/params.h"

namespace pfa {
namespace cuda {

inline bool residual_has_forward_kernel(const Params& p) { return p.final_layer_norm || has_output_dropout(p); }
inline bool residual_has_backward_kernel(const Params& p) { return p.final_layer_norm || has_own_d_linear(p); }

void narrow_x(Context& context, const Params& p);             // x -> hidden
void layer_norm_forward(Context& context, const Params& p);   // x -> hidden, pre_ln_mean, pre_ln_rstd
void layer_norm_backward(Context& context, const Params& p);  // d_hidden (+ d_residual) -> d_x, d_pre_ln_scale, d_pre_ln_bias
size_t layer_norm_backward_workspace_bytes(const Context& context, const Params& p);

void qkv_linear_forward(Context& context, const Params& p);   // hidden -> qkv
void qkv_linear_backward(Context& context, const Params& p);  // d_qkv -> d_qkv_weight, d_hidden or d_x

void attention_forward(Context& context, const Params& p);   // qkv -> attn_out, log_sum_exp, score_shift, random_state
void attention_backward(Context& context, const Params& p);  // d_attn_out -> d_qkv, d_qkv_bias
size_t attention_backward_workspace_bytes(const Context& context, const Params& p);

// attn_out -> residual; that is y, or already z where there is no dropout.
void output_linear_forward(Context& context, const Params& p);
void output_linear_backward(Context& context, const Params& p);  // d_linear -> d_linear_weight, d_attn_out
size_t linear_workspace_bytes(const Context& context, const Params& p, Phase phase);

void residual_forward(Context& context, const Params& p);   // residual (y) -> residual, out, ln_mean, ln_rstd
void residual_backward(Context& context, const Params& p);  // d_out -> d_residual, d_linear, d_ln_*, d_linear_bias
size_t residual_backward_workspace_bytes(const Context& context, const Params& p);

// The most that one stage of the phase needs.
size_t stage_workspace_bytes(const Context& context, const Params& p, Phase phase);

}  // namespace cuda
}  // namespace pfa
