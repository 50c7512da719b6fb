// Dropout, residual sum and final layer norm, forward and backward, as work on rows (norm_rows.h). The output
// projection has added the bias; and x too where there is no dropout.
#include "core/cuda/rows/norm_rows.h"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {

void residual_forward(Context& context, const AttentionParams& p) {
  if (!residual_has_forward_kernel(p)) return;
  NormRowsForward args;
  args.dtype = args.out_dtype = p.residual_dtype;
  args.norm_dtype = p.norm_dtype;
  args.rows = p.rows;
  args.cols = p.embed_dim;
  args.y = p.residual;
  if (has_output_dropout(p)) {
    args.x = p.add_residual ? p.x : nullptr;
    args.dropout = p.dropout;
    args.random_state = p.random_state;
    if (!p.final_layer_norm) {
      args.z = p.residual;
    } else if (p.residual != p.out) {
      args.normalized = p.residual;
    }
  }
  if (p.final_layer_norm) {
    args.out = p.out;
    args.scale = p.ln_scale;
    args.bias = p.ln_bias;
    args.epsilon = p.ln_epsilon;
    args.mean = p.ln_mean;
    args.rstd = p.ln_rstd;
  }
  norm_rows_forward(context, args);
}

void residual_backward(Context& context, const AttentionParams& p) {
  if (!residual_has_backward_kernel(p)) return;
  NormRowsBackward args;
  args.dtype = args.d_out_dtype = p.residual_dtype;
  args.d_y_dtype = p.dtype;
  args.norm_dtype = p.norm_dtype;
  args.rows = p.rows;
  args.cols = p.embed_dim;
  args.d_out = p.d_out;
  args.has_norm = p.final_layer_norm;
  if (p.final_layer_norm) {
    args.z = p.residual;
    args.mean = has_output_dropout(p) ? nullptr : p.ln_mean;
    args.rstd = p.ln_rstd;
    args.scale = p.ln_scale;
    args.d_z = p.d_residual;
    args.d_scale = p.d_ln_scale;
    args.d_bias = p.d_ln_bias;
  }
  if (has_output_dropout(p)) {
    args.dropout = p.dropout;
    args.random_state = p.random_state;
  }
  if (has_own_d_linear(p)) args.d_y = p.d_linear;
  args.d_y_sum = p.d_linear_bias;
  norm_rows_backward(context, args, p.stage_workspace);
}

size_t residual_backward_workspace_bytes(const Context& context, const AttentionParams& p) {
  return residual_has_backward_kernel(p) ? norm_rows_backward_workspace_bytes(context, p.dtype, p.embed_dim) : 0;
}

}  // namespace cuda
}  // namespace pfa
