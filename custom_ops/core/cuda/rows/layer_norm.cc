// A block's first layer norm, forward and backward, as work on rows (norm_rows.h), and what takes its place.
#include "core/cuda/rows/convert.h"
#include "core/cuda/rows/norm_rows.h"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {

void layer_norm_forward(Context& context, const BlockParams& p) {
  NormRowsForward args;
  args.dtype = p.residual_dtype;
  args.out_dtype = p.dtype;
  args.norm_dtype = p.norm_dtype;
  args.rows = p.rows;
  args.cols = p.embed_dim;
  args.y = p.x;
  args.out = p.hidden;
  args.scale = p.pre_ln_scale;
  args.bias = p.pre_ln_bias;
  args.epsilon = p.pre_ln_epsilon;
  args.mean = p.pre_ln_mean;
  args.rstd = p.pre_ln_rstd;
  norm_rows_forward(context, args);
}

void narrow_x(Context& context, const BlockParams& p) {
  convert(context, p.residual_dtype, p.x, p.dtype, p.hidden, p.rows * p.embed_dim);
}

void layer_norm_backward(Context& context, const BlockParams& p) {
  NormRowsBackward args;
  args.dtype = args.d_y_dtype = p.residual_dtype;
  args.d_out_dtype = p.dtype;
  args.norm_dtype = p.norm_dtype;
  args.rows = p.rows;
  args.cols = p.embed_dim;
  args.d_out = p.d_hidden;
  args.z = p.x;
  args.mean = p.pre_ln_mean;
  args.rstd = p.pre_ln_rstd;
  args.scale = p.pre_ln_scale;
  args.d_added = p.add_residual ? p.d_residual : nullptr;
  args.d_z = p.d_x;
  args.d_scale = p.d_pre_ln_scale;
  args.d_bias = p.d_pre_ln_bias;
  norm_rows_backward(context, args, p.stage_workspace);
}

size_t layer_norm_backward_workspace_bytes(const Context& context, const BlockParams& p) {
  return p.pre_layer_norm ? norm_rows_backward_workspace_bytes(context, p.dtype, p.embed_dim) : 0;
}

}  // namespace cuda
}  // namespace pfa
