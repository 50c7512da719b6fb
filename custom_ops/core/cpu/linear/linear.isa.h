// The two projections and their gradients. R is the type of what lies on the residual stream, T that of all else.

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

  static Product<T, T> qkv_forward(const AttentionParams& p) {
    return {p.rows,
            3 * p.heads_dim(),
            p.embed_dim,
            by_rows<T>(p.hidden, p.embed_dim),
            by_rows<T>(p.qkv_weight, p.embed_dim),
            static_cast<const T*>(p.qkv_bias),
            nullptr,
            static_cast<T*>(p.qkv)};
  }

  static Product<T, T> qkv_backward_weight(const AttentionParams& p) {
    return {3 * p.heads_dim(),
            p.embed_dim,
            p.rows,
            by_columns<T>(p.d_qkv, 3 * p.heads_dim()),
            by_columns<T>(p.hidden, p.embed_dim),
            nullptr,
            nullptr,
            static_cast<T*>(p.d_qkv_weight)};
  }

  // The gradient of hidden in C; `addend` joins it.
  template <class C>
  static Product<T, C> qkv_backward_input(const AttentionParams& p, const void* addend, void* target) {
    return {p.rows,
            p.embed_dim,
            3 * p.heads_dim(),
            by_rows<T>(p.d_qkv, 3 * p.heads_dim()),
            by_columns<T>(p.qkv_weight, p.embed_dim),
            nullptr,
            static_cast<const C*>(addend),
            static_cast<C*>(target)};
  }

  static Product<T, T> qkv_backward_hidden(const AttentionParams& p) { return qkv_backward_input<T>(p, nullptr, p.d_hidden); }

  // Without a layer norm before it, x gets the gradient of both branches here.
  static Product<T, R> qkv_backward_x(const AttentionParams& p) {
    return qkv_backward_input<R>(p, p.add_residual ? p.d_residual : nullptr, p.d_x);
  }

  static Product<T, R> output_forward(const AttentionParams& p) {
    return {p.rows,
            p.embed_dim,
            p.heads_dim(),
            by_rows<T>(p.attn_out, p.heads_dim()),
            by_columns<T>(p.linear_weight, p.embed_dim),
            nullptr,
            nullptr,
            static_cast<R*>(p.residual)};
  }

  static Product<T, T> output_backward_weight(const AttentionParams& p) {
    return {p.heads_dim(),
            p.embed_dim,
            p.rows,
            by_columns<T>(p.attn_out, p.heads_dim()),
            by_columns<T>(p.d_linear, p.embed_dim),
            nullptr,
            nullptr,
            static_cast<T*>(p.d_linear_weight)};
  }

  static Product<T, T> output_backward_input(const AttentionParams& p) {
    return {p.rows,
            p.heads_dim(),
            p.embed_dim,
            by_rows<T>(p.d_linear, p.embed_dim),
            by_rows<T>(p.linear_weight, p.embed_dim),
            nullptr,
            nullptr,
            static_cast<T*>(p.d_attn_out)};
  }

  template <class C>
  static size_t bytes(const Context& context, const Product<T, C>& product) {
    return MatrixProduct<T, C>::workspace_bytes(context, product);
  }

  // Pointers are not placed yet, so what depends on them is not asked.
  static size_t workspace_bytes(const Context& context, const AttentionParams& p, Phase phase) {
    switch (phase) {
      case Phase::kForward:
        return std::max(bytes(context, qkv_forward(p)), bytes(context, output_forward(p)));
      case Phase::kOutputBackward:
        return std::max(bytes(context, output_backward_weight(p)), bytes(context, output_backward_input(p)));
      case Phase::kInputBackward:
        return std::max(bytes(context, qkv_backward_weight(p)),
                        p.pre_layer_norm ? bytes(context, qkv_backward_hidden(p)) : bytes(context, qkv_backward_x(p)));
      default:
        return 0;
    }
  }

  template <class C>
  static void multiply(const Context& context, const AttentionParams& p, const Product<T, C>& product) {
    MatrixProduct<T, C>::run(context, product, p.stage_workspace);
  }

  static void qkv_linear_forward(Context& context, const AttentionParams& p) { multiply(context, p, qkv_forward(p)); }

  static void qkv_linear_backward(Context& context, const AttentionParams& p) {
    if (p.d_qkv_weight) multiply(context, p, qkv_backward_weight(p));
    if (p.d_qkv_bias) {
      column_sums(context, static_cast<const T*>(p.d_qkv), p.rows, 3 * p.heads_dim(), static_cast<T*>(p.d_qkv_bias));
    }
    if (!needs_d_hidden(p)) return;
    if (p.pre_layer_norm) {
      multiply(context, p, qkv_backward_hidden(p));
    } else {
      multiply(context, p, qkv_backward_x(p));
    }
  }

  static void output_linear_forward(Context& context, const AttentionParams& p) { multiply(context, p, output_forward(p)); }

  static void output_linear_backward(Context& context, const AttentionParams& p) {
    if (p.d_linear_weight) multiply(context, p, output_backward_weight(p));
    if (p.d_attn_out) multiply(context, p, output_backward_input(p));
  }
};

}  // namespace pfa::cpu::PFA_ISA
