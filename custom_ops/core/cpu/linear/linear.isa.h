// Linear layers and their gradients, as matrix products: the projections of the attention block, the two layers of the
// feed-forward block, and one by itself. R is the type of what lies on the residual stream, T that of all else.

namespace pfa::cpu::PFA_ISA {

// The matrix of what is read as rows [count, depth], and as columns: [depth, count].
template <class T>
MatrixView<T> by_rows(const void* data, int64_t depth) {
  return {static_cast<const T*>(data), depth, 1};
}
template <class T>
MatrixView<T> by_columns(const void* data, int64_t count) {
  return {static_cast<const T*>(data), 1, count};
}

template <class T, class R>
struct Linear {
  using A = Accumulator<T>;

  // sums [n] of the columns of source [m, n].
  static void column_sums(const Context& context, const T* source, int64_t m, int64_t n, T* sums) {
    constexpr int64_t columns = 128;
    constexpr int64_t run = 64;  // rows summed before they join the total: keeps the rounding error of long columns low
    parallel_for(ceil_div(n, columns), context.threads, [&](int64_t index, int) {
      const int64_t first = index * columns;
      const int64_t size = std::min(columns, n - first);
      A total[columns] = {};
      for (int64_t start = 0; start < m; start += run) {
        A part[columns] = {};
        for (int64_t r = start; r < std::min(start + run, m); ++r) {
          const T* row = source + r * n + first;
          for (int64_t i = 0; i < size; ++i) part[i] += widen(row[i]);
        }
        for (int64_t i = 0; i < size; ++i) total[i] += part[i];
      }
      store_row(total, size, sums + first);
    });
  }

  template <class C>
  static size_t bytes(const Context& context, const Product<T, C>& product) {
    return MatrixProduct<T, C>::workspace_bytes(context, product);
  }

  template <class C>
  static void multiply(const Context& context, void* workspace, const Product<T, C>& product) {
    MatrixProduct<T, C>::run(context, product, workspace);
  }

  // y = x @ weight, for x [rows, in] and weight [in, out]; each may be stored the other way round.
  struct Layer {
    int64_t rows, in, out;
    const void* x;
    const void* weight;
    bool transpose_weight = false;
    bool transpose_x = false;
    bool is_weight_arranged = false;  // for forward

    MatrixView<T> x_by_rows() const { return transpose_x ? by_columns<T>(x, rows) : by_rows<T>(x, in); }
    MatrixView<T> x_by_columns() const { return transpose_x ? by_rows<T>(x, rows) : by_columns<T>(x, in); }
    MatrixView<T> weight_by_in() const {
      return transpose_weight ? by_columns<T>(weight, in) : by_rows<T>(weight, out);
    }
    MatrixView<T> weight_by_out() const {
      return transpose_weight ? by_rows<T>(weight, in) : by_columns<T>(weight, out);
    }

    // The layer's result in C.
    template <class C>
    Product<T, C> forward(const void* bias, void* y) const {
      Product<T, C> product{
          rows, out, in, x_by_rows(), weight_by_out(), static_cast<const T*>(bias), nullptr, static_cast<C*>(y)};
      product.is_b_arranged = is_weight_arranged;
      return product;
    }

    Product<T, T> d_weight(const void* d_y, void* target) const {
      const MatrixView<T> d_y_by_columns = by_columns<T>(d_y, out);
      if (transpose_weight) {
        return {out, in, rows, d_y_by_columns, x_by_columns(), nullptr, nullptr, static_cast<T*>(target)};
      }
      return {in, out, rows, x_by_columns(), d_y_by_columns, nullptr, nullptr, static_cast<T*>(target)};
    }

    // The gradient of x in C; `addend` joins it.
    template <class C>
    Product<T, C> d_x(const void* d_y, const void* addend, void* target) const {
      const MatrixView<T> d_y_by_rows = by_rows<T>(d_y, out);
      const C* added = static_cast<const C*>(addend);
      if (transpose_x) return {in, rows, out, weight_by_in(), d_y_by_rows, nullptr, added, static_cast<C*>(target)};
      return {rows, in, out, d_y_by_rows, weight_by_in(), nullptr, added, static_cast<C*>(target)};
    }
  };

  // What is common to the first layers of the two blocks: that which reads hidden, whose gradient goes to d_hidden or,
  // with that of the residual, to d_x.
  static size_t first_backward_bytes(const Context& context, const BlockParams& p, const Layer& layer) {
    const size_t input = p.pre_layer_norm ? bytes(context, layer.template d_x<T>(nullptr, nullptr, nullptr))
                                          : bytes(context, layer.template d_x<R>(nullptr, nullptr, nullptr));
    return std::max(bytes(context, layer.d_weight(nullptr, nullptr)), input);
  }

  static void first_backward(const Context& context, const BlockParams& p, const Layer& layer, const void* d_y,
                             void* d_weight, void* d_bias) {
    if (d_weight) multiply(context, p.stage_workspace, layer.d_weight(d_y, d_weight));
    if (d_bias) column_sums(context, static_cast<const T*>(d_y), p.rows, layer.out, static_cast<T*>(d_bias));
    if (!needs_d_hidden(p)) return;
    if (p.pre_layer_norm) {
      multiply(context, p.stage_workspace, layer.template d_x<T>(d_y, nullptr, p.d_hidden));
    } else {
      multiply(context, p.stage_workspace, layer.template d_x<R>(d_y, p.add_residual ? p.d_residual : nullptr, p.d_x));
    }
  }

  static Layer qkv_layer(const AttentionBlockParams& p) {
    return {p.rows, p.embed_dim, p.qkv_dim(), p.hidden, p.qkv_weight, true, false, p.has_arranged_weights};
  }
  static Layer output_layer(const AttentionBlockParams& p) {
    return {p.rows, p.heads_dim(), p.embed_dim, p.attn_out, p.linear_weight, false, false, p.has_arranged_weights};
  }

  static void qkv_linear_forward(Context& context, const AttentionBlockParams& p) {
    multiply(context, p.stage_workspace, qkv_layer(p).template forward<T>(p.qkv_bias, p.qkv));
  }

  static void qkv_linear_backward(Context& context, const AttentionBlockParams& p) {
    first_backward(context, p, qkv_layer(p), p.d_qkv, p.d_qkv_weight, p.d_qkv_bias);
    // What is added to all keys alike moves all scores of a query alike: their bias has no gradient.
    if (p.d_qkv_bias) std::fill_n(static_cast<T*>(p.d_qkv_bias) + p.heads_dim(), p.num_kv_heads * p.head_dim, T());
  }

  static void output_linear_forward(Context& context, const AttentionBlockParams& p) {
    multiply(context, p.stage_workspace, output_layer(p).template forward<R>(nullptr, p.residual));
  }

  static void output_linear_backward(Context& context, const AttentionBlockParams& p) {
    const Layer layer = output_layer(p);
    if (p.d_linear_weight) multiply(context, p.stage_workspace, layer.d_weight(p.d_linear, p.d_linear_weight));
    if (p.d_attn_out) multiply(context, p.stage_workspace, layer.template d_x<T>(p.d_linear, nullptr, p.d_attn_out));
  }

  // Pointers are not placed yet, so what depends on them is not asked.
  static size_t workspace_bytes(const Context& context, const AttentionBlockParams& p, Phase phase) {
    return workspace_bytes_of(context, p, phase, qkv_layer(p), output_layer(p));
  }

  static size_t workspace_bytes_of(const Context& context, const BlockParams& p, Phase phase, const Layer& first,
                                   const Layer& last) {
    switch (phase) {
      case Phase::kForward:
        return std::max(bytes(context, first.template forward<T>(nullptr, nullptr)),
                        bytes(context, last.template forward<R>(nullptr, nullptr)));
      case Phase::kOutputBackward:
        return std::max(bytes(context, last.d_weight(nullptr, nullptr)),
                        bytes(context, last.template d_x<T>(nullptr, nullptr, nullptr)));
      case Phase::kInputBackward:
        return first_backward_bytes(context, p, first);
      default:
        return 0;
    }
  }

  static Layer linear1(const FeedForwardParams& p) {
    return {p.rows, p.embed_dim, p.linear1_dim(), p.hidden, p.linear1_weight, false, false, p.has_arranged_weights};
  }
  static Layer linear2(const FeedForwardParams& p) {
    return {p.rows, p.hidden_dim, p.embed_dim, p.activated, p.linear2_weight, false, false, p.has_arranged_weights};
  }

  static void linear1_forward(Context& context, const FeedForwardParams& p) {
    if (p.gated) {
      multiply(context, p.stage_workspace, linear1(p).template forward<T>(p.linear1_bias, p.pre_activation));
      ActivationRows<T>::hidden(context, p);
      return;
    }
    const ActivationStep<T> step(p, false);
    Product<T, T> product = linear1(p).template forward<T>(p.linear1_bias, p.activated);
    product.step = &step;
    multiply(context, p.stage_workspace, product);
  }

  static void linear1_backward(Context& context, const FeedForwardParams& p) {
    first_backward(context, p, linear1(p), p.d_pre_activation, p.d_linear1_weight, p.d_linear1_bias);
  }

  static void linear2_forward(Context& context, const FeedForwardParams& p) {
    multiply(context, p.stage_workspace, linear2(p).template forward<R>(nullptr, p.residual));
  }

  static void linear2_backward(Context& context, const FeedForwardParams& p) {
    const Layer layer = linear2(p);
    if (!needs_d_pre_activation(p)) {
      if (!saves_activated(p)) ActivationRows<T>::hidden(context, p);
    } else if (p.gated) {
      multiply(context, p.stage_workspace, layer.template d_x<T>(p.d_linear, nullptr, p.activated));
      ActivationRows<T>::gated_backward(context, p);
    } else {
      const ActivationStep<T> step(p, true);
      Product<T, T> product = layer.template d_x<T>(p.d_linear, nullptr, p.d_pre_activation);
      product.step = &step;
      multiply(context, p.stage_workspace, product);
    }
    if (p.d_linear2_weight) multiply(context, p.stage_workspace, layer.d_weight(p.d_linear, p.d_linear2_weight));
  }

  static size_t workspace_bytes(const Context& context, const FeedForwardParams& p, Phase phase) {
    return workspace_bytes_of(context, p, phase, linear1(p), linear2(p));
  }

  static Layer layer_of(const LinearParams& p) {
    return {p.rows,   p.in_features,      p.out_features, p.x,
            p.weight, p.transpose_weight, p.transpose_x,  p.has_arranged_weights};
  }

  static void linear_forward(Context& context, const LinearParams& p) {
    const ActivationStep<T> step(p, false);
    Product<T, T> product = layer_of(p).template forward<T>(p.bias, p.out);
    if (p.activation != Activation::kNone) product.step = &step;
    multiply(context, p.stage_workspace, product);
  }

  static void linear_backward(Context& context, const LinearParams& p) {
    const Layer layer = layer_of(p);
    const void* d_y = p.d_pre_activation;
    if (p.d_weight) multiply(context, p.stage_workspace, layer.d_weight(d_y, p.d_weight));
    if (p.d_bias) {
      column_sums(context, static_cast<const T*>(d_y), p.rows, p.out_features, static_cast<T*>(p.d_bias));
    }
    if (p.d_x) multiply(context, p.stage_workspace, layer.template d_x<T>(d_y, nullptr, p.d_x));
  }

  static size_t workspace_bytes(const Context& context, const LinearParams& p, Phase phase) {
    const Layer layer = layer_of(p);
    if (phase == Phase::kForward) return bytes(context, layer.template forward<T>(nullptr, nullptr));
    return std::max(bytes(context, layer.d_weight(nullptr, nullptr)),
                    bytes(context, layer.template d_x<T>(nullptr, nullptr, nullptr)));
  }
};

}  // namespace pfa::cpu::PFA_ISA
