// What stands before the first product: hidden = layer_norm(x) and its gradient, which is added to what the residual
// branch left; or, without a layer norm, x rounded to the type of the products.

namespace pfa::cpu::PFA_ISA {

template <class T, class R, class N>
struct LayerNorm {
  using A = Accumulator<T>;

  struct Memory {
    const A* scale;
    const A* bias;
    ChunkSums<A> d_scale;
    ChunkSums<A> d_bias;
    A* rows;  // [threads][2][E]

    Memory(Arena& arena, const Context& context, const BlockParams& p, bool backward)
        : scale(widened<N>(arena, p.pre_ln_scale, p.embed_dim)),
          bias(widened<N>(arena, p.pre_ln_bias, p.embed_dim)),
          d_scale(arena, p.rows, p.embed_dim, backward && p.d_pre_ln_scale),
          d_bias(arena, p.rows, p.embed_dim, backward && p.d_pre_ln_bias),
          rows(take<A>(arena, context.threads * 2 * p.embed_dim)) {}
  };

  static size_t workspace_bytes(const Context& context, const BlockParams& p, bool backward) {
    Arena arena;
    Memory(arena, context, p, backward);
    return arena.used();
  }

  static void forward(Context& context, const BlockParams& p) {
    const int64_t width = p.embed_dim;
    Arena arena(p.stage_workspace);
    const Memory memory(arena, context, p, false);
    for_row_chunks(context, p.rows, [&](int64_t, int64_t first, int64_t end, int thread) {
      A* row = memory.rows + thread * 2 * width;
      for (int64_t r = first; r < end; ++r) {
        A mean, rstd;
        load_row(static_cast<const R*>(p.x) + r * width, width, row);
        normalize_row(row, width, p.pre_ln_epsilon, memory.scale, memory.bias, mean, rstd);
        store_row(row, width, static_cast<T*>(p.hidden) + r * width);
        if (p.pre_ln_mean) {
          static_cast<A*>(p.pre_ln_mean)[r] = mean;
          static_cast<A*>(p.pre_ln_rstd)[r] = rstd;
        }
      }
    });
  }

  static void narrow_x(Context& context, const BlockParams& p) {
    const int64_t width = p.embed_dim;
    Arena arena(p.stage_workspace);
    const Memory memory(arena, context, p, false);
    for_row_chunks(context, p.rows, [&](int64_t, int64_t first, int64_t end, int thread) {
      A* row = memory.rows + thread * 2 * width;
      for (int64_t r = first; r < end; ++r) {
        load_row(static_cast<const R*>(p.x) + r * width, width, row);
        store_row(row, width, static_cast<T*>(p.hidden) + r * width);
      }
    });
  }

  static void backward(Context& context, const BlockParams& p) {
    const int64_t width = p.embed_dim;
    Arena arena(p.stage_workspace);
    const Memory memory(arena, context, p, true);
    for_row_chunks(context, p.rows, [&](int64_t chunk, int64_t first, int64_t end, int thread) {
      A* input = memory.rows + thread * 2 * width;
      A* gradient = input + width;
      A* d_scale = memory.d_scale.start(chunk);
      A* d_bias = memory.d_bias.start(chunk);
      for (int64_t r = first; r < end; ++r) {
        load_row(static_cast<const R*>(p.x) + r * width, width, input);
        load_row(static_cast<const T*>(p.d_hidden) + r * width, width, gradient);
        const A rstd = static_cast<const A*>(p.pre_ln_rstd)[r];
        standardize_row(input, width, static_cast<const A*>(p.pre_ln_mean)[r], rstd);
        normalize_row_backward(input, gradient, width, rstd, memory.scale, d_scale, d_bias);
        if (!p.d_x) continue;
        if (p.add_residual) {
          const R* d_residual = static_cast<const R*>(p.d_residual) + r * width;
          for (int64_t i = 0; i < width; ++i) gradient[i] += widen(d_residual[i]);
        }
        store_row(gradient, width, static_cast<R*>(p.d_x) + r * width);
      }
    });
    memory.d_scale.finish(context, row_chunks(p.rows), static_cast<N*>(p.d_pre_ln_scale));
    memory.d_bias.finish(context, row_chunks(p.rows), static_cast<N*>(p.d_pre_ln_bias));
  }
};

}  // namespace pfa::cpu::PFA_ISA
