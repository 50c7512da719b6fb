// Linear layers and their gradients, as matrix products: the two projections of the attention block, the two layers of
// the feed-forward block, and one by itself.
//
//   forward   y = x @ weight + bias
//   backward  d_weight = x^T @ d_y, d_x = d_y @ weight^T
//
// Biases ride on the products, and so does a block's residual where there is no dropout between. Their gradients do
// not: cuBLASLt's own sums take longer on large matrices than the product and column_sums one after the other. That of
// qkv_bias belongs to attention, that of a block's last bias to the residual, and that of a bias before an activation
// to the activation. Activations are kernels of their own, but for that of the feed-forward block where it is relu
// without dropout.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "core/arena.h"
#include "core/cuda/linear/matrix_product.h"
#include "core/cuda/rows/activation.h"
#include "core/cuda/rows/column_sums.h"
#include "core/cuda/rows/convert.h"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

// x [rows, in] and weight [in, out], each of which may be stored the other way round.
struct Layer {
  DType dtype;
  int64_t rows, in, out;
  const void* x;
  const void* weight;
  bool transpose_weight = false;
  bool transpose_x = false;

  MatrixProduct forward(DType y_dtype, const void* bias, void* y) const {
    MatrixProduct product = of_sizes(rows, out, in, y_dtype, y);
    product.a = x;
    product.a_transposed = transpose_x;
    product.b = weight;
    product.b_transposed = transpose_weight;
    product.has_bias = bias != nullptr;
    product.bias = bias;
    return product;
  }

  MatrixProduct weight_gradient(const void* d_y, void* d_weight) const {
    MatrixProduct product = of_sizes(in, out, rows, dtype, d_weight);
    product.a = x;
    product.a_transposed = !transpose_x;
    product.b = d_y;
    return transpose_weight ? transposed(product) : product;
  }

  MatrixProduct x_gradient(const void* d_y, DType d_x_dtype, void* d_x) const {
    MatrixProduct product = of_sizes(rows, in, out, d_x_dtype, d_x);
    product.a = d_y;
    product.b = weight;
    product.b_transposed = !transpose_weight;
    return transpose_x ? transposed(product) : product;
  }

 private:
  MatrixProduct of_sizes(int64_t m, int64_t n, int64_t k, DType result_dtype, void* result) const {
    MatrixProduct product;
    product.dtype = dtype;
    product.result_dtype = result_dtype;
    product.m = m;
    product.n = n;
    product.k = k;
    product.d = result;
    return product;
  }

  // The product that gives the result the other way round.
  static MatrixProduct transposed(MatrixProduct product) {
    std::swap(product.m, product.n);
    std::swap(product.a, product.b);
    std::swap(product.a_transposed, product.b_transposed);
    product.a_transposed = !product.a_transposed;
    product.b_transposed = !product.b_transposed;
    return product;
  }
};

size_t bytes_if(bool needed, const Context& context, const MatrixProduct& product) {
  return needed ? matrix_product_workspace_bytes(context, product) : 0;
}

// A block's first layer, which reads hidden; the gradient of hidden goes to d_hidden or, with that of the residual, to
// d_x.

MatrixProduct d_hidden_product(const BlockParams& p, const Layer& layer, const void* d_y) {
  if (p.pre_layer_norm) return layer.x_gradient(d_y, p.dtype, p.d_hidden);
  MatrixProduct product = layer.x_gradient(d_y, p.residual_dtype, p.d_x);
  product.adds_c = p.add_residual;
  product.c = p.add_residual ? p.d_residual : nullptr;
  return product;
}

void first_layer_backward(Context& context, const BlockParams& p, const Layer& layer, const void* d_y, void* d_weight) {
  if (d_weight) matrix_product(context, layer.weight_gradient(d_y, d_weight), p.stage_workspace);
  if (needs_d_hidden(p)) matrix_product(context, d_hidden_product(p, layer, d_y), p.stage_workspace);
}

size_t first_layer_backward_bytes(const Context& context, const BlockParams& p, const Layer& layer, bool has_d_weight) {
  return std::max(bytes_if(has_d_weight, context, layer.weight_gradient(nullptr, nullptr)),
                  bytes_if(needs_d_hidden(p), context, d_hidden_product(p, layer, nullptr)));
}

// A block's last layer, which makes y, and z where there is no dropout between.

MatrixProduct y_product(const BlockParams& p, const Layer& layer) {
  MatrixProduct product = layer.forward(p.residual_dtype, p.linear_bias, p.residual);
  product.adds_c = p.add_residual && !has_output_dropout(p);
  product.c = product.adds_c ? p.x : nullptr;
  return product;
}

// The size of a copy of the bias in residual_dtype: a product takes a bias of its result's type.
size_t wide_bias_bytes(const BlockParams& p) {
  return p.linear_bias && has_wide_residual(p) ? Arena::aligned(p.embed_dim * size_of(p.residual_dtype)) : 0;
}

void last_layer_forward(Context& context, const BlockParams& p, const Layer& layer) {
  MatrixProduct product = y_product(p, layer);
  char* workspace = static_cast<char*>(p.stage_workspace);
  if (const size_t bytes = wide_bias_bytes(p)) {
    convert(context, p.dtype, p.linear_bias, p.residual_dtype, workspace, p.embed_dim);
    product.bias = workspace;
    workspace += bytes;
  }
  matrix_product(context, product, workspace);
}

size_t last_layer_forward_bytes(const Context& context, const BlockParams& p, const Layer& layer) {
  return wide_bias_bytes(p) + matrix_product_workspace_bytes(context, y_product(p, layer));
}

size_t last_layer_backward_bytes(const Context& context, const Layer& layer, bool has_d_weight, bool has_d_x) {
  return std::max(bytes_if(has_d_weight, context, layer.weight_gradient(nullptr, nullptr)),
                  bytes_if(has_d_x, context, layer.x_gradient(nullptr, layer.dtype, nullptr)));
}

Layer qkv_linear(const AttentionBlockParams& p) {
  return {p.dtype, p.rows, p.embed_dim, p.qkv_dim(), p.hidden, p.qkv_weight, true};
}

Layer output_linear(const AttentionBlockParams& p) {
  return {p.dtype, p.rows, p.heads_dim(), p.embed_dim, p.attn_out, p.linear_weight};
}

Layer linear1(const FeedForwardParams& p) {
  return {p.dtype, p.rows, p.embed_dim, p.linear1_dim(), p.hidden, p.linear1_weight};
}

Layer linear2(const FeedForwardParams& p) {
  return {p.dtype, p.rows, p.hidden_dim, p.embed_dim, p.activated, p.linear2_weight};
}

// Its backward pass by so many of the hidden numbers at a time, which are rows of the weight.
Layer part_of_linear2(const FeedForwardParams& p, int64_t columns) {
  Layer layer = linear2(p);
  layer.in = columns;
  return layer;
}

Layer linear(const LinearParams& p) {
  return {p.dtype, p.rows, p.in_features, p.out_features, p.x, p.weight, p.transpose_weight, p.transpose_x};
}

MatrixProduct linear1_product(const FeedForwardParams& p) {
  void* const product_memory = p.pre_activation ? p.pre_activation : p.activated;
  MatrixProduct product = linear1(p).forward(p.dtype, p.linear1_bias, product_memory);
  product.has_relu = saves_activated(p) && p.hidden_dropout.threshold == 0 && p.hidden_dropout.scale == 1.0;
  return product;
}

// In forward, without memory of its own, the product waits where its result will be.
ActivationRows activation_of(const FeedForwardParams& p) {
  ActivationRows rows;
  rows.dtype = p.dtype;
  rows.activation = p.activation;
  rows.gated = p.gated;
  rows.rows = p.rows;
  rows.cols = p.hidden_dim;
  rows.dropout = p.hidden_dropout;
  rows.random_state = p.random_state;
  rows.first_element = p.first_hidden;
  rows.elements_in_row = p.hidden_in_all();
  rows.h = p.pre_activation ? p.pre_activation : p.activated;
  rows.u = p.activated;
  return rows;
}

// relu does not ride on it: whether the product is kept must not change its bits.
MatrixProduct linear_product(const LinearParams& p) {
  return linear(p).forward(p.dtype, p.bias, p.pre_activation ? p.pre_activation : p.out);
}

ActivationRows activation_of(const LinearParams& p) {
  ActivationRows rows;
  rows.dtype = p.dtype;
  rows.activation = p.activation;
  rows.rows = p.rows;
  rows.cols = p.out_features;
  return rows;
}

}  // namespace

void qkv_linear_forward(Context& context, const AttentionBlockParams& p) {
  matrix_product(context, qkv_linear(p).forward(p.dtype, p.qkv_bias, p.qkv), p.stage_workspace);
}

void qkv_linear_backward(Context& context, const AttentionBlockParams& p) {
  first_layer_backward(context, p, qkv_linear(p), p.d_qkv, p.d_qkv_weight);
}

void output_linear_forward(Context& context, const AttentionBlockParams& p) {
  last_layer_forward(context, p, output_linear(p));
}

void output_linear_backward(Context& context, const AttentionBlockParams& p) {
  const Layer layer = output_linear(p);
  if (p.d_linear_weight) {
    matrix_product(context, layer.weight_gradient(p.d_linear, p.d_linear_weight), p.stage_workspace);
  }
  if (needs_d_qkv(p)) matrix_product(context, layer.x_gradient(p.d_linear, p.dtype, p.d_attn_out), p.stage_workspace);
}

size_t linear_workspace_bytes(const Context& context, const AttentionBlockParams& p, Phase phase) {
  switch (phase) {
    case Phase::kForward:
      return std::max(matrix_product_workspace_bytes(context, qkv_linear(p).forward(p.dtype, p.qkv_bias, p.qkv)),
                      last_layer_forward_bytes(context, p, output_linear(p)));
    case Phase::kOutputBackward:
      return last_layer_backward_bytes(context, output_linear(p), p.d_linear_weight, needs_d_qkv(p));
    case Phase::kInputBackward:
      return first_layer_backward_bytes(context, p, qkv_linear(p), p.d_qkv_weight);
    default:
      return 0;
  }
}

void linear1_forward(Context& context, const FeedForwardParams& p) {
  const MatrixProduct product = linear1_product(p);
  matrix_product(context, product, p.stage_workspace);
  if (!product.has_relu) activate(context, activation_of(p));
}

void linear1_backward(Context& context, const FeedForwardParams& p) {
  first_layer_backward(context, p, linear1(p), p.d_pre_activation, p.d_linear1_weight);
}

void linear2_forward(Context& context, const FeedForwardParams& p) { last_layer_forward(context, p, linear2(p)); }

// Halved until little memory is left to win, or the gradient of the part of the weight has too few tiles for the whole
// card.
int64_t activated_columns(const Context&, const FeedForwardParams& p) {
  constexpr int64_t kMostParts = 4;
  constexpr int64_t kLeastNumbersOfWeight = 256 * 128 * 128;
  constexpr int64_t kLeastBytes = int64_t{16} << 20;
  int64_t columns = p.hidden_dim;
  if (saves_activated(p) || !needs_d_pre_activation(p) || !(p.d_linear2_weight || p.gated)) return columns;
  const int64_t column_bytes = p.rows * static_cast<int64_t>(size_of(p.dtype));
  while (columns % 16 == 0 && p.hidden_dim / columns < kMostParts &&
         columns / 2 * p.embed_dim >= kLeastNumbersOfWeight && columns / 2 * column_bytes >= kLeastBytes) {
    columns /= 2;
  }
  return columns;
}

void linear2_backward(Context& context, const FeedForwardParams& p) {
  const int64_t columns = activated_columns(context, p);
  // The gradient of the hidden activations lies where these will.
  const bool in_activated = p.activated && !saves_activated(p);
  for (int64_t first = 0; first < p.hidden_dim; first += columns) {
    const auto from = [&](auto* data, int64_t stride) {
      using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>, const char, char>;
      return data ? static_cast<Byte*>(data) + first * stride * size_of(p.dtype) : nullptr;
    };
    Layer layer = part_of_linear2(p, columns);
    layer.weight = from(p.linear2_weight, p.embed_dim);
    if (needs_d_pre_activation(p)) {
      ActivationRows rows = activation_of(p);
      rows.cols = columns;
      rows.all_cols = p.hidden_dim;
      rows.first_element += first;
      rows.h = from(rows.h, 1);
      rows.d_h = from(p.d_pre_activation, 1);
      rows.d_u = in_activated ? p.activated : rows.d_h;
      rows.d_h_sums = from(p.d_linear1_bias, 1);
      rows.workspace = p.stage_workspace;
      matrix_product(context, layer.x_gradient(p.d_linear, p.dtype, const_cast<void*>(rows.d_u)), p.stage_workspace);
      if (saves_activated(p)) {
        relu_backward(context, rows);
      } else {
        if (!p.d_linear2_weight) rows.u = nullptr;
        activate_backward(context, rows);
      }
    } else if (!saves_activated(p)) {
      activate(context, activation_of(p));
    }
    if (p.d_linear2_weight) {
      void* const d_weight = from(p.d_linear2_weight, p.embed_dim);
      matrix_product(context, layer.weight_gradient(p.d_linear, d_weight), p.stage_workspace);
    }
  }
}

size_t linear_workspace_bytes(const Context& context, const FeedForwardParams& p, Phase phase) {
  switch (phase) {
    case Phase::kForward:
      return std::max(matrix_product_workspace_bytes(context, linear1_product(p)),
                      last_layer_forward_bytes(context, p, linear2(p)));
    case Phase::kOutputBackward: {
      ActivationRows rows = activation_of(p);
      rows.cols = activated_columns(context, p);
      return std::max(p.d_linear1_bias ? activation_sums_workspace_bytes(context, rows) : 0,
                      last_layer_backward_bytes(context, part_of_linear2(p, rows.cols), p.d_linear2_weight,
                                                needs_d_pre_activation(p)));
    }
    case Phase::kInputBackward:
      return first_layer_backward_bytes(context, p, linear1(p), p.d_linear1_weight);
    default:
      return 0;
  }
}

void linear_forward(Context& context, const LinearParams& p) {
  const MatrixProduct product = linear_product(p);
  matrix_product(context, product, p.stage_workspace);
  if (p.activation == Activation::kNone) return;
  ActivationRows rows = activation_of(p);
  rows.h = product.d;
  rows.u = p.out;
  activate(context, rows);
}

void activation_backward(Context& context, const LinearParams& p) {
  ActivationRows rows = activation_of(p);
  rows.h = p.pre_activation;
  rows.d_u = p.d_out;
  rows.d_h = p.d_pre_activation;
  rows.d_h_sums = p.d_bias;
  rows.workspace = p.stage_workspace;
  activate_backward(context, rows);
}

void linear_backward(Context& context, const LinearParams& p) {
  const Layer layer = linear(p);
  if (p.d_bias && p.activation == Activation::kNone) {
    column_sums(context, p.dtype, p.d_pre_activation, p.rows, p.out_features, p.d_bias, p.stage_workspace);
  }
  if (p.d_weight) matrix_product(context, layer.weight_gradient(p.d_pre_activation, p.d_weight), p.stage_workspace);
  if (p.d_x) matrix_product(context, layer.x_gradient(p.d_pre_activation, p.dtype, p.d_x), p.stage_workspace);
}

size_t linear_workspace_bytes(const Context& context, const LinearParams& p, Phase phase) {
  if (phase == Phase::kForward) return matrix_product_workspace_bytes(context, linear_product(p));
  const size_t sums = !p.d_bias ? 0
                      : p.activation == Activation::kNone
                          ? column_sums_workspace_bytes(context, p.dtype, p.rows, p.out_features)
                          : activation_sums_workspace_bytes(context, activation_of(p));
  return std::max(sums, last_layer_backward_bytes(context, linear(p), p.d_weight, p.d_x));
}

}  // namespace cuda
}  // namespace pfa
