// Dropout, residual sum and final layer norm, forward and backward, as work on rows (norm_rows.h). A block's last
// product has added the bias; and x too where there is no dropout.
#include "core/cuda/rows/column_sums.h"
#include "core/cuda/rows/norm_rows.h"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

// Whether there is more to do than to sum up the bias's gradient.
bool has_backward_kernel(const BlockParams& p) { return p.final_layer_norm || p.d_linear != p.d_residual; }

// All but what a product may have added already.
NormRowsForward forward_rows(const BlockParams& p) {
  NormRowsForward args;
  args.dtype = args.out_dtype = p.residual_dtype;
  args.norm_dtype = p.norm_dtype;
  args.rows = p.rows;
  args.cols = p.embed_dim;
  args.y = p.y;
  if (has_output_dropout(p)) {
    args.dropout = p.dropout;
    args.random_state = p.random_state;
  }
  if (p.final_layer_norm) {
    args.out = p.out;
    args.scale = p.ln_scale;
    args.bias = p.ln_bias;
    args.epsilon = p.ln_epsilon;
    args.mean = p.ln_mean;
    args.rstd = p.ln_rstd;
    if (p.residual != p.out && has_output_dropout(p)) args.normalized = p.residual;
  } else {
    args.z = p.residual;
  }
  return args;
}

}  // namespace

void residual_forward(Context& context, const BlockParams& p) {
  if (!p.final_layer_norm && !has_output_dropout(p)) return;
  NormRowsForward args = forward_rows(p);
  if (has_output_dropout(p) && p.add_residual) args.x = p.x;
  norm_rows_forward(context, args);
}

void residual_forward(Context& context, const ResidualNormParams& p) {
  NormRowsForward args = forward_rows(p);
  args.y_bias = p.linear_bias;
  if (p.add_residual) args.x = p.x;
  if (p.residual != p.out && !args.normalized) args.z = p.residual;
  norm_rows_forward(context, args);
}

void residual_backward(Context& context, const BlockParams& p) {
  if (!has_backward_kernel(p)) {
    if (p.d_linear_bias) {
      column_sums(context, p.dtype, p.d_linear, p.rows, p.embed_dim, p.d_linear_bias, p.stage_workspace);
    }
    return;
  }
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
  if (p.d_linear != p.d_residual) args.d_y = p.d_linear;
  args.d_y_sum = p.d_linear_bias;
  norm_rows_backward(context, args, p.stage_workspace);
}

size_t residual_backward_workspace_bytes(const Context& context, const BlockParams& p) {
  return norm_rows_backward_workspace_bytes(context, p.dtype, p.embed_dim);
}

}  // namespace cuda
}  // namespace pfa
