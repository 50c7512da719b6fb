// A block's last stage, in one pass over the rows: z = x + dropout(y + linear_bias), out = layer_norm(z), and its
// gradient. y may stand where z, or with dropout the normalised z, will: in p.residual.

namespace pfa::cpu::PFA_ISA {

template <class T, class R, class N>
struct Residual {
  using A = Accumulator<T>;

  struct Memory {
    const A* linear_bias;
    const A* scale;
    const A* bias;
    ChunkSums<A> d_scale;
    ChunkSums<A> d_bias;
    ChunkSums<A> d_linear_bias;
    A* rows;  // [threads][2][E]
    A* keep;  // [threads][E]

    Memory(Arena& arena, const Context& context, const BlockParams& p, bool backward)
        : linear_bias(widened<T>(arena, p.linear_bias, p.embed_dim)),
          scale(widened<N>(arena, p.ln_scale, p.embed_dim)),
          bias(widened<N>(arena, p.ln_bias, p.embed_dim)),
          d_scale(arena, p.rows, p.embed_dim, backward && p.d_ln_scale),
          d_bias(arena, p.rows, p.embed_dim, backward && p.d_ln_bias),
          d_linear_bias(arena, p.rows, p.embed_dim, backward && p.d_linear_bias),
          rows(take<A>(arena, context.threads * 2 * p.embed_dim)),
          keep(take<A>(arena, context.threads * p.embed_dim)) {}
  };

  static size_t workspace_bytes(const Context& context, const BlockParams& p, bool backward) {
    Arena arena;
    Memory(arena, context, p, backward);
    return arena.used();
  }

  // Multiplies row r by its dropout factors.
  static void drop(const BlockParams& p, int64_t r, A* row, A* keep) {
    drop_row(ElementDropout(p.dropout, p.random_state, DropoutStage::kOutput), r * p.embed_dim, p.embed_dim, row, keep);
  }

  static void forward(Context& context, const BlockParams& p) {
    const int64_t width = p.embed_dim;
    Arena arena(p.stage_workspace);
    const Memory memory(arena, context, p, false);
    for_row_chunks(context, p.rows, [&](int64_t, int64_t first, int64_t end, int thread) {
      A* row = memory.rows + thread * 2 * width;
      A* keep = memory.keep + thread * width;
      for (int64_t r = first; r < end; ++r) {
        R* residual = static_cast<R*>(p.residual) + r * width;
        load_row(static_cast<const R*>(p.y) + r * width, width, row);
        if (memory.linear_bias) {
          for (int64_t i = 0; i < width; ++i) row[i] += memory.linear_bias[i];
        }
        drop(p, r, row, keep);
        if (p.add_residual) {
          const R* x = static_cast<const R*>(p.x) + r * width;
          for (int64_t i = 0; i < width; ++i) row[i] += widen(x[i]);
        }
        if (!p.final_layer_norm) {
          store_row(row, width, residual);
          continue;
        }
        A mean, rstd;
        if (has_output_dropout(p)) {
          normalize_row<A>(row, width, p.ln_epsilon, nullptr, nullptr, mean, rstd);
          if (p.residual != p.out) store_row(row, width, residual);
          scale_row(row, width, memory.scale, memory.bias);
        } else {
          // The statistics are those of z as it is kept, so that backward finds the same normalised row; and whether it
          // is kept makes no difference to the result.
          if (!std::is_same_v<R, A> || p.residual != p.out) store_row(row, width, residual);
          if (!std::is_same_v<R, A>) load_row(residual, width, row);
          normalize_row(row, width, p.ln_epsilon, memory.scale, memory.bias, mean, rstd);
        }
        store_row(row, width, static_cast<R*>(p.out) + r * width);
        if (p.ln_mean) static_cast<A*>(p.ln_mean)[r] = mean;
        if (p.ln_rstd) static_cast<A*>(p.ln_rstd)[r] = rstd;
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
      A* keep = memory.keep + thread * width;
      A* d_scale = memory.d_scale.start(chunk);
      A* d_bias = memory.d_bias.start(chunk);
      A* d_linear_bias = memory.d_linear_bias.start(chunk);
      for (int64_t r = first; r < end; ++r) {
        load_row(static_cast<const R*>(p.d_out) + r * width, width, gradient);
        if (p.final_layer_norm) {
          load_row(static_cast<const R*>(p.residual) + r * width, width, input);
          const A rstd = static_cast<const A*>(p.ln_rstd)[r];
          if (!has_output_dropout(p)) standardize_row(input, width, static_cast<const A*>(p.ln_mean)[r], rstd);
          normalize_row_backward(input, gradient, width, rstd, memory.scale, d_scale, d_bias);
          if (p.d_residual) store_row(gradient, width, static_cast<R*>(p.d_residual) + r * width);
        }
        if (!p.d_linear) continue;
        if (p.d_linear != p.d_residual) {
          drop(p, r, gradient, keep);
          store_row(gradient, width, static_cast<T*>(p.d_linear) + r * width);
        }
        if (d_linear_bias) {
          for (int64_t i = 0; i < width; ++i) d_linear_bias[i] += gradient[i];
        }
      }
    });
    const int64_t chunks = row_chunks(p.rows);
    memory.d_scale.finish(context, chunks, static_cast<N*>(p.d_ln_scale));
    memory.d_bias.finish(context, chunks, static_cast<N*>(p.d_ln_bias));
    memory.d_linear_bias.finish(context, chunks, static_cast<T*>(p.d_linear_bias));
  }
};

}  // namespace pfa::cpu::PFA_ISA
