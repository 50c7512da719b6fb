// The two projections and their gradients, by the GEMM of the context. The result is cut into blocks by its shape alone and each
// block is one single-threaded GEMM, so that the bits do not depend on the number of threads. 16-bit operands are widened to float32
// first, unless the context has a GEMM that takes them as they are, and every block is narrowed as soon as it is done.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct Linear {
  using A = Accumulator<T>;
  static constexpr bool kNarrows = !std::is_same_v<T, A>;
  static constexpr int64_t kBlockRows = 256;
  static constexpr int64_t kBlockColumns = 384;

  // c [m, n] = op(a) [m, k] @ op(b) [k, n] + bias [n] + addend [m, n]; the last two may be null, and addend may be c.
  struct Product {
    bool trans_a, trans_b;
    int64_t m, n, k;
    const T* a;
    const T* b;
    const T* bias;
    const T* addend;
    T* c;
  };

  struct Memory {
    A* a = nullptr;
    A* b = nullptr;
    A* blocks = nullptr;  // [threads][kBlockRows * kBlockColumns]

    Memory(Arena& arena, const Context& context, const Product& product) {
      if constexpr (kNarrows) {
        if (!multiplies_narrow(context)) {
          a = static_cast<A*>(arena.take(product.m * product.k * sizeof(A)));
          b = static_cast<A*>(arena.take(product.k * product.n * sizeof(A)));
        }
        blocks = static_cast<A*>(arena.take(context.threads * kBlockRows * kBlockColumns * sizeof(A)));
      }
    }
  };

  static bool multiplies_narrow(const Context& context) { return std::is_same_v<T, BFloat16> && context.bgemm; }

  // target [rows, columns] (+)= op(a) @ op(b), the block of the product at (row, column).
  static void multiply_block(const Context& context, const Product& product, const Memory& memory, int64_t row, int64_t column,
                             int64_t rows, int64_t columns, A beta, A* target, int64_t stride) {
    const int64_t lda = product.trans_a ? product.m : product.k;
    const int64_t ldb = product.trans_b ? product.k : product.n;
    const int64_t a_offset = row * (product.trans_a ? 1 : lda);
    const int64_t b_offset = column * (product.trans_b ? ldb : 1);
    const auto run = [&](auto gemm, const auto* a, const auto* b) {
      gemm(product.trans_a, product.trans_b, rows, columns, product.k, a + a_offset, lda, b + b_offset, ldb, beta, target,
           stride);
    };
    if constexpr (std::is_same_v<T, double>) {
      run(context.dgemm, product.a, product.b);
    } else if constexpr (std::is_same_v<T, float>) {
      run(context.sgemm, product.a, product.b);
    } else if (multiplies_narrow(context)) {
      run(context.bgemm, reinterpret_cast<const uint16_t*>(product.a), reinterpret_cast<const uint16_t*>(product.b));
    } else {
      run(context.sgemm, memory.a, memory.b);
    }
  }

  static void widen_all(const Context& context, const T* source, int64_t count, A* target) {
    constexpr int64_t block = 1 << 15;
    parallel_for((count + block - 1) / block, context.threads, [&](int64_t index, int) {
      const int64_t first = index * block;
      load_row(source + first, std::min(block, count - first), target + first);
    });
  }

  static void multiply(const Context& context, const Product& product, void* workspace) {
    const int64_t row_blocks = (product.m + kBlockRows - 1) / kBlockRows;
    const int64_t column_blocks = (product.n + kBlockColumns - 1) / kBlockColumns;
    Arena arena(workspace);
    const Memory memory(arena, context, product);
    if constexpr (kNarrows) {
      if (!multiplies_narrow(context)) {
        widen_all(context, product.a, product.m * product.k, memory.a);
        widen_all(context, product.b, product.k * product.n, memory.b);
      }
    }
    parallel_for(row_blocks * column_blocks, context.threads, [&](int64_t index, int thread) {
      const int64_t row = index / column_blocks * kBlockRows;
      const int64_t column = index % column_blocks * kBlockColumns;
      const int64_t rows = std::min(kBlockRows, product.m - row);
      const int64_t columns = std::min(kBlockColumns, product.n - column);
      T* c = product.c + row * product.n + column;
      A* block;
      int64_t block_stride;
      if constexpr (kNarrows) {
        block = memory.blocks + thread * kBlockRows * kBlockColumns;
        block_stride = kBlockColumns;
      } else {
        block = c;
        block_stride = product.n;
      }
      const bool starts_empty = !product.bias && !product.addend;
      if (!starts_empty || product.k == 0) {
        for (int64_t r = 0; r < rows; ++r) start_row(product, row + r, column, columns, block + r * block_stride);
      }
      if (product.k > 0) {
        multiply_block(context, product, memory, row, column, rows, columns, starts_empty ? A(0) : A(1), block, block_stride);
      }
      if constexpr (kNarrows) {
        for (int64_t r = 0; r < rows; ++r) store_row(block + r * block_stride, columns, c + r * product.n);
      }
    });
  }

  static void start_row(const Product& product, int64_t row, int64_t column, int64_t columns, A* target) {
    const T* addend = product.addend ? product.addend + row * product.n + column : nullptr;
    const T* bias = product.bias ? product.bias + column : nullptr;
    for (int64_t i = 0; i < columns; ++i) {
      target[i] = (addend ? to_float(addend[i]) : A(0)) + (bias ? to_float(bias[i]) : A(0));
    }
  }

  // sums [n] of the columns of source [m, n].
  static void column_sums(const Context& context, const T* source, int64_t m, int64_t n, T* sums) {
    constexpr int64_t block = 128;
    constexpr int64_t run = 64;  // rows summed before they join the total: keeps the rounding error of long columns low
    parallel_for((n + block - 1) / block, context.threads, [&](int64_t index, int) {
      const int64_t first = index * block;
      const int64_t size = std::min(block, n - first);
      A total[block] = {};
      for (int64_t start = 0; start < m; start += run) {
        A part[block] = {};
        for (int64_t r = start; r < std::min(start + run, m); ++r) {
          const T* row = source + r * n + first;
          for (int64_t i = 0; i < size; ++i) part[i] += to_float(row[i]);
        }
        for (int64_t i = 0; i < size; ++i) total[i] += part[i];
      }
      store_row(total, size, sums + first);
    });
  }

  static Product qkv_forward(const Params& p) {
    return {false,
            true,
            p.rows(),
            3 * p.heads_dim(),
            p.embed_dim,
            static_cast<const T*>(p.hidden),
            static_cast<const T*>(p.qkv_weight),
            static_cast<const T*>(p.qkv_bias),
            nullptr,
            static_cast<T*>(p.qkv)};
  }

  static Product qkv_backward_weight(const Params& p) {
    return {true,
            false,
            3 * p.heads_dim(),
            p.embed_dim,
            p.rows(),
            static_cast<const T*>(p.d_qkv),
            static_cast<const T*>(p.hidden),
            nullptr,
            nullptr,
            static_cast<T*>(p.d_qkv_weight)};
  }

  // Without a layer norm before it, x gets the gradient of both branches here.
  static Product qkv_backward_input(const Params& p) {
    const bool adds = !p.pre_layer_norm && p.add_residual;
    return {false,
            false,
            p.rows(),
            p.embed_dim,
            3 * p.heads_dim(),
            static_cast<const T*>(p.d_qkv),
            static_cast<const T*>(p.qkv_weight),
            nullptr,
            adds ? static_cast<const T*>(p.d_residual) : nullptr,
            static_cast<T*>(p.pre_layer_norm ? p.d_hidden : p.d_x)};
  }

  static Product output_forward(const Params& p) {
    return {false,
            false,
            p.rows(),
            p.embed_dim,
            p.heads_dim(),
            static_cast<const T*>(p.attn_out),
            static_cast<const T*>(p.linear_weight),
            nullptr,
            nullptr,
            static_cast<T*>(p.residual)};
  }

  static Product output_backward_weight(const Params& p) {
    return {true,
            false,
            p.heads_dim(),
            p.embed_dim,
            p.rows(),
            static_cast<const T*>(p.attn_out),
            static_cast<const T*>(p.d_linear),
            nullptr,
            nullptr,
            static_cast<T*>(p.d_linear_weight)};
  }

  static Product output_backward_input(const Params& p) {
    return {false,
            true,
            p.rows(),
            p.heads_dim(),
            p.embed_dim,
            static_cast<const T*>(p.d_linear),
            static_cast<const T*>(p.linear_weight),
            nullptr,
            nullptr,
            static_cast<T*>(p.d_attn_out)};
  }

  static size_t workspace_bytes(const Context& context, const Params& p, Phase phase) {
    const auto bytes = [&](const Product& product) {
      Arena arena;
      Memory(arena, context, product);
      return arena.used();
    };
    switch (phase) {
      case Phase::kForward:
        return std::max(bytes(qkv_forward(p)), bytes(output_forward(p)));
      case Phase::kOutputBackward:
        return std::max(bytes(output_backward_weight(p)), bytes(output_backward_input(p)));
      case Phase::kInputBackward:
        return std::max(bytes(qkv_backward_weight(p)), bytes(qkv_backward_input(p)));
      default:
        return 0;
    }
  }

  static void qkv_linear_forward(Context& context, const Params& p) { multiply(context, qkv_forward(p), p.stage_workspace); }

  static void qkv_linear_backward(Context& context, const Params& p) {
    if (p.d_qkv_weight) multiply(context, qkv_backward_weight(p), p.stage_workspace);
    if (p.d_qkv_bias) {
      column_sums(context, static_cast<const T*>(p.d_qkv), p.rows(), 3 * p.heads_dim(), static_cast<T*>(p.d_qkv_bias));
    }
    if (needs_d_hidden(p)) multiply(context, qkv_backward_input(p), p.stage_workspace);
  }

  static void output_linear_forward(Context& context, const Params& p) {
    multiply(context, output_forward(p), p.stage_workspace);
  }

  static void output_linear_backward(Context& context, const Params& p) {
    if (p.d_linear_weight) multiply(context, output_backward_weight(p), p.stage_workspace);
    if (p.d_attn_out) multiply(context, output_backward_input(p), p.stage_workspace);
  }
};

}  // namespace pfa::cpu::PFA_ISA
