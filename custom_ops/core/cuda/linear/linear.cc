// The two projections and their gradients, as matrix products. M = rows, N = 3*H*D, E = embed_dim.
//
//   forward   qkv [M, N] = hidden @ qkv_weight^T + qkv_bias;  residual [M, E] = attn_out @ linear_weight + linear_bias
//   (+ x) backward  d_qkv_weight = d_qkv^T @ hidden, d_hidden = d_qkv @ qkv_weight (+ d_residual)
//             d_linear_weight = attn_out^T @ d_linear, d_attn_out = d_linear @ linear_weight^T
//
// Biases ride on the products, and so does the residual where there is no dropout between. Their gradients do not:
// cuBLASLt's own sums take longer on large matrices than the product and column_sums one after the other. That of
// qkv_bias belongs to attention.
#include "core/cuda/linear/matrix_product.h"

#include <algorithm>

#include "core/arena.h"
#include "core/cuda/rows/column_sums.h"
#include "core/cuda/rows/convert.h"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

MatrixProduct qkv_product(const AttentionParams& p) {
  MatrixProduct product;
  product.dtype = product.result_dtype = p.dtype;
  product.m = p.rows;
  product.n = 3 * p.heads_dim();
  product.k = p.embed_dim;
  product.a = p.hidden;
  product.b = p.qkv_weight;
  product.b_transposed = true;
  product.d = p.qkv;
  product.has_bias = p.qkv_bias != nullptr;
  product.bias = p.qkv_bias;
  return product;
}

MatrixProduct output_product(const AttentionParams& p) {
  MatrixProduct product;
  product.dtype = p.dtype;
  product.result_dtype = p.residual_dtype;
  product.m = p.rows;
  product.n = p.embed_dim;
  product.k = p.heads_dim();
  product.a = p.attn_out;
  product.b = p.linear_weight;
  product.d = p.residual;
  product.has_bias = p.linear_bias != nullptr;
  product.bias = p.linear_bias;
  product.adds_c = p.add_residual && !has_output_dropout(p);
  product.c = product.adds_c ? p.x : nullptr;
  return product;
}

MatrixProduct d_qkv_weight_product(const AttentionParams& p) {
  MatrixProduct product;
  product.dtype = product.result_dtype = p.dtype;
  product.m = 3 * p.heads_dim();
  product.n = p.embed_dim;
  product.k = p.rows;
  product.a = p.d_qkv;
  product.a_transposed = true;
  product.b = p.hidden;
  product.d = p.d_qkv_weight;
  return product;
}

MatrixProduct d_hidden_product(const AttentionParams& p) {
  MatrixProduct product;
  product.dtype = p.dtype;
  product.result_dtype = p.pre_layer_norm ? p.dtype : p.residual_dtype;
  product.m = p.rows;
  product.n = p.embed_dim;
  product.k = 3 * p.heads_dim();
  product.a = p.d_qkv;
  product.b = p.qkv_weight;
  product.d = p.pre_layer_norm ? p.d_hidden : p.d_x;
  product.adds_c = p.add_residual && !p.pre_layer_norm;
  product.c = product.adds_c ? p.d_residual : nullptr;
  return product;
}

MatrixProduct d_linear_weight_product(const AttentionParams& p) {
  MatrixProduct product;
  product.dtype = product.result_dtype = p.dtype;
  product.m = p.heads_dim();
  product.n = p.embed_dim;
  product.k = p.rows;
  product.a = p.attn_out;
  product.a_transposed = true;
  product.b = p.d_linear;
  product.d = p.d_linear_weight;
  return product;
}

MatrixProduct d_attn_out_product(const AttentionParams& p) {
  MatrixProduct product;
  product.dtype = product.result_dtype = p.dtype;
  product.m = p.rows;
  product.n = p.heads_dim();
  product.k = p.embed_dim;
  product.a = p.d_linear;
  product.b = p.linear_weight;
  product.b_transposed = true;
  product.d = p.d_attn_out;
  return product;
}

// The size of a copy of the linear bias in residual_dtype: a product takes a bias of its result's type.
size_t wide_bias_bytes(const AttentionParams& p) {
  return p.linear_bias && has_wide_residual(p) ? Arena::aligned(p.embed_dim * size_of(p.residual_dtype)) : 0;
}

}  // namespace

void qkv_linear_forward(Context& context, const AttentionParams& p) {
  matrix_product(context, qkv_product(p), p.stage_workspace);
}

void output_linear_forward(Context& context, const AttentionParams& p) {
  MatrixProduct product = output_product(p);
  char* workspace = static_cast<char*>(p.stage_workspace);
  if (const size_t bytes = wide_bias_bytes(p)) {
    convert(context, p.dtype, p.linear_bias, p.residual_dtype, workspace, p.embed_dim);
    product.bias = workspace;
    workspace += bytes;
  }
  matrix_product(context, product, workspace);
}

void qkv_linear_backward(Context& context, const AttentionParams& p) {
  if (p.d_qkv_weight) matrix_product(context, d_qkv_weight_product(p), p.stage_workspace);
  if (needs_d_hidden(p)) matrix_product(context, d_hidden_product(p), p.stage_workspace);
}

void output_linear_backward(Context& context, const AttentionParams& p) {
  if (p.d_linear_bias && !residual_has_backward_kernel(p)) {
    column_sums(context, p.dtype, p.d_linear, p.rows, p.embed_dim, p.d_linear_bias, p.stage_workspace);
  }
  if (p.d_linear_weight) matrix_product(context, d_linear_weight_product(p), p.stage_workspace);
  if (needs_d_qkv(p)) matrix_product(context, d_attn_out_product(p), p.stage_workspace);
}

size_t linear_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase) {
  const auto bytes = [&](bool needed, const MatrixProduct& product) {
    return needed ? matrix_product_workspace_bytes(context, product) : 0;
  };
  switch (phase) {
    case Phase::kForward:
      return std::max(bytes(true, qkv_product(p)), wide_bias_bytes(p) + bytes(true, output_product(p)));
    case Phase::kOutputBackward:
      return std::max({p.d_linear_bias ? column_sums_workspace_bytes(context, p.dtype, p.rows, p.embed_dim) : 0,
                       bytes(p.d_linear_weight, d_linear_weight_product(p)),
                       bytes(needs_d_qkv(p), d_attn_out_product(p))});
    case Phase::kInputBackward:
      return std::max(bytes(p.d_qkv_weight, d_qkv_weight_product(p)), bytes(needs_d_hidden(p), d_hidden_product(p)));
    default:
      return 0;
  }
}

}  // namespace cuda
}  // namespace pfa
