// The block's last stage, in one pass over the rows: z = x + dropout(y + linear_bias), out = layer_norm(z), and its
// gradient. y, the output projection, stands where z, or with dropout the normalised z, will: in p.residual.

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

    Memory(Arena& arena, const Context& context, const AttentionParams& p, bool backward)
        : linear_bias(widened<T>(arena, p.linear_bias, p.embed_dim)),
          scale(widened<N>(arena, p.ln_scale, p.embed_dim)),
          bias(widened<N>(arena, p.ln_bias, p.embed_dim)),
          d_scale(arena, p.rows, p.embed_dim, backward && p.d_ln_scale),
          d_bias(arena, p.rows, p.embed_dim, backward && p.d_ln_bias),
          d_linear_bias(arena, p.rows, p.embed_dim, backward && p.d_linear_bias),
          rows(take<A>(arena, context.threads * 2 * p.embed_dim)),
          keep(take<A>(arena, context.threads * p.embed_dim)) {}
  };

  static size_t workspace_bytes(const Context& context, const AttentionParams& p, bool backward) {
    Arena arena;
    Memory(arena, context, p, backward);
    return arena.used();
  }

  // Multiplies row r by its dropout factors.
  static void drop(const AttentionParams& p, int64_t r, A* __restrict row, A* __restrict keep) {
    const int64_t width = p.embed_dim;
    const A scale = static_cast<A>(p.dropout.scale);
    if (p.dropout.threshold) {
      const PhiloxState random = philox_state(p.random_state[0], p.random_state[1], DropoutStage::kOutput);
      keep_row(random, r * width, width, p.dropout.threshold, scale, keep);
      for (int64_t i = 0; i < width; ++i) row[i] *= keep[i];
    } else if (scale != A(1)) {
      for (int64_t i = 0; i < width; ++i) row[i] *= scale;
    }
  }

  // keep[i] = scale where output element first + i is kept, else 0.
  static void keep_row(PhiloxState random, int64_t first, int64_t count, uint32_t threshold, A scale, A* keep) {
    constexpr int lanes = kLanes<uint32_t>;
    const int64_t last_call = (first + count + 7) / 8;
    for (int64_t call = first / 8; call < last_call; call += lanes) {
      const Vec<uint32_t> low = lane_numbers() + static_cast<uint32_t>(call);
      const Vec<uint32_t> carry = low < static_cast<uint32_t>(call) ? broadcast(1u) : Vec<uint32_t>{};
      const PhiloxVectors words =
          philox_vector(random, low, carry + static_cast<uint32_t>(static_cast<uint64_t>(call) >> 32), 0);
      // In memory the words of a call, and the halves of a word, follow each other in the order of the elements.
      uint32_t sequence[4 * lanes];
      for (int i = 0; i < 4; ++i) {
        uint32_t column[lanes];
        store(column, words.w[i]);
        for (int l = 0; l < lanes; ++l) sequence[4 * l + i] = column[l];
      }
      uint16_t numbers[8 * lanes];
      std::memcpy(numbers, sequence, sizeof numbers);
      const int64_t begin = std::max(call * 8, first);
      const int64_t end = std::min((call + lanes) * 8, first + count);
      for (int64_t e = begin; e < end; ++e) keep[e - first] = numbers[e - call * 8] >= threshold ? scale : A(0);
    }
  }

  static void forward(Context& context, const AttentionParams& p) {
    const int64_t width = p.embed_dim;
    Arena arena(p.stage_workspace);
    const Memory memory(arena, context, p, false);
    for_row_chunks(context, p.rows, [&](int64_t, int64_t first, int64_t end, int thread) {
      A* row = memory.rows + thread * 2 * width;
      A* keep = memory.keep + thread * width;
      for (int64_t r = first; r < end; ++r) {
        R* residual = static_cast<R*>(p.residual) + r * width;
        load_row(residual, width, row);
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

  static void backward(Context& context, const AttentionParams& p) {
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
