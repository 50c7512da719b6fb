// The two passes of each family of kernels, as implementations.cc lists them.
#pragma once

#include <cstddef>

#include "core/cuda/context.h"
#include "core/params.h"

namespace pfa {
namespace cuda {

// forward.cu and backward.cu
void plain_attention_forward(Context& context, const AttentionParams& p);
void plain_attention_backward(Context& context, const AttentionParams& p);
void mma_attention_forward(Context& context, const AttentionParams& p);
void mma_attention_backward(Context& context, const AttentionParams& p);
size_t row_statistics_workspace_bytes(const Context& context, const AttentionParams& p);
// d_qkv_bias, if it is wanted, from the gradients of query, key and value.
size_t qkv_bias_workspace_bytes(const Context& context, const AttentionParams& p);
void qkv_bias_gradient(Context& context, const AttentionParams& p);
// out_residue, if it is wanted, of a family that does not make it.
void clear_out_residue(Context& context, const AttentionParams& p);
bool mma_is_built(const Context& context);  // for 8.0 or later, not for 7.0 and compiled anew by the driver

// one_query.cu
size_t one_query_attention_forward_workspace_bytes(const Context& context, const AttentionParams& p);
void one_query_attention_forward(Context& context, const AttentionParams& p);

// mask_gradient.cu, beside any family.
void mask_gradient(Context& context, const AttentionParams& p);
size_t mask_gradient_workspace_bytes(const Context& context, const AttentionParams& p);

// weights.cu: d_query and d_key from d_weights. The workspace is that of row_statistics_workspace_bytes.
void weights_attention_backward(Context& context, const AttentionParams& p);

// hopper/
size_t hopper_attention_forward_workspace_bytes(const Context& context, const AttentionParams& p);
void hopper_attention_forward(Context& context, const AttentionParams& p);
void hopper_attention_backward(Context& context, const AttentionParams& p);
size_t hopper_attention_backward_workspace_bytes(const Context& context, const AttentionParams& p);
bool hopper_is_built(const Context& context);  // for sm_90a

}  // namespace cuda
}  // namespace pfa
