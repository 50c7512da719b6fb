// Activation and dropout of the hidden numbers of a feed-forward block, or behind a linear layer, and their gradients,
// on pieces of rows. A product calls them on its sums while they are in the caches (matrix_product.isa.h).

namespace pfa::cpu::PFA_ISA {

// The most numbers of a piece: those whose random numbers one call of Philox gives with the widest vectors.
constexpr int64_t kPiece = 128;

// values[i] = activation(values[i]); slopes[i] its derivative there, unless null. As exact as numbers of T need them.
template <class T>
void activate(Activation activation, int64_t count, Accumulator<T>* __restrict values,
              Accumulator<T>* __restrict slopes) {
  using A = Accumulator<T>;
  for_activation(activation, [&](auto constant) {
    constexpr Activation kActivation = decltype(constant)::value;
    constexpr int64_t together = kTogether * kLanes<A>;
    int64_t i = 0;
    for (; i + together <= count; i += together) {
      const auto result = value_and_slope<kActivation, sizeof(T) == 2>(load_vectors<kTogether>(values + i));
      store(values + i, result.value);
      if (slopes) store(slopes + i, result.slope);
    }
    if (i == count) return;
    A last[together] = {};
    std::copy(values + i, values + count, last);
    const auto result = value_and_slope<kActivation, sizeof(T) == 2>(load_vectors<kTogether>(last));
    store(last, result.value);
    std::copy(last, last + (count - i), values + i);
    store(last, result.slope);
    if (slopes) std::copy(last, last + (count - i), slopes + i);
  });
}

// u = dropout(activation(h)) and its gradient. Rows are of `width` numbers in memory, of `width_in_all` numbers, from
// `first` on, where dropout counts them.
template <class T>
struct ActivationStep {
  using A = Accumulator<T>;

  Activation activation;
  ElementDropout dropout;
  int64_t width;
  int64_t first;
  int64_t width_in_all;
  // Forward: h is kept in `product` unless that is null. Backward: what comes in is the gradient of u. The gradient of
  // h comes from `product` and u goes to `activated`, unless null; without `product` it comes from u in `activated`,
  // which is not 0 where relu and dropout let it pass.
  bool is_backward;
  T* product;
  T* activated;

  explicit ActivationStep(const FeedForwardParams& p, bool is_backward)
      : activation(p.activation),
        dropout(p.hidden_dropout, p.random_state, DropoutStage::kHidden),
        width(p.hidden_dim),
        first(p.first_hidden),
        width_in_all(p.hidden_in_all()),
        is_backward(is_backward),
        product(static_cast<T*>(p.pre_activation)),
        activated(static_cast<T*>(p.activated)) {}

  explicit ActivationStep(const LinearParams& p, bool is_backward)
      : activation(p.activation),
        dropout(Dropout{}, nullptr, DropoutStage::kHidden),
        width(p.out_features),
        first(0),
        width_in_all(p.out_features),
        is_backward(is_backward),
        product(static_cast<T*>(p.pre_activation)),
        activated(nullptr) {}

  int64_t element(int64_t row, int64_t column) const { return row * width_in_all + first + column; }

  // values [kPiece]: `count` numbers from (row, column) on.
  void run(int64_t row, int64_t column, int64_t count, A* values) const {
    if (is_backward) {
      backward(row, column, count, values);
    } else {
      forward(row, column, count, values);
    }
  }

  void forward(int64_t row, int64_t column, int64_t count, A* values) const {
    if (product) store_row(values, count, product + row * width + column);
    activate<T>(activation, count, values, nullptr);
    drop(row, column, count, values);
  }

  void drop(int64_t row, int64_t column, int64_t count, A* values) const {
    A keep[kPiece];
    drop_row(dropout, element(row, column), count, values, keep);
  }

  // What dropout multiplies with.
  void factors(int64_t row, int64_t column, int64_t count, A* keep) const {
    const A scale = static_cast<A>(dropout.scale);
    if (dropout.threshold) {
      keep_row(dropout.random, element(row, column), count, dropout.threshold, scale, keep);
    } else {
      std::fill(keep, keep + count, scale);
    }
  }

  void backward(int64_t row, int64_t column, int64_t count, A* values) const {
    const int64_t at = row * width + column;
    if (!product) {
      const T* u = activated + at;
      const A scale = static_cast<A>(dropout.scale);
      for (int64_t i = 0; i < count; ++i) values[i] = widen(u[i]) > A(0) ? values[i] * scale : A(0);
      return;
    }
    A keep[kPiece];
    A u[kPiece];
    A slopes[kPiece];
    load_row(product + at, count, u);
    activate<T>(activation, count, u, slopes);
    factors(row, column, count, keep);
    for (int64_t i = 0; i < count; ++i) values[i] *= slopes[i] * keep[i];
    if (!activated) return;
    for (int64_t i = 0; i < count; ++i) u[i] *= keep[i];
    store_row(u, count, activated + at);
  }
};

// Calls f(row, first, count) for the pieces of all rows of `width` numbers.
template <class F>
void for_pieces(const Context& context, int64_t rows, int64_t width, F&& f) {
  for_row_chunks(context, rows, [&](int64_t, int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r) {
      for (int64_t i = 0; i < width; i += kPiece) f(r, i, std::min(kPiece, width - i));
    }
  });
}

template <class T>
struct ActivationRows {
  using A = Accumulator<T>;

  // The gradient of a linear layer's product from that of its result.
  static void backward(Context& context, const LinearParams& p) {
    const ActivationStep<T> step(p, true);
    for_pieces(context, p.rows, p.out_features, [&](int64_t row, int64_t column, int64_t count) {
      A values[kPiece];
      const int64_t at = row * p.out_features + column;
      load_row(static_cast<const T*>(p.d_out) + at, count, values);
      step.run(row, column, count, values);
      store_row(values, count, static_cast<T*>(p.d_pre_activation) + at);
    });
  }

  // The hidden activations from the first product.
  static void hidden(Context& context, const FeedForwardParams& p) {
    const ActivationStep<T> step(p, false);
    for_pieces(context, p.rows, p.hidden_dim, [&](int64_t row, int64_t column, int64_t count) {
      A values[kPiece], gate[kPiece];
      const T* product = static_cast<const T*>(p.pre_activation) + row * p.linear1_dim() + column;
      load_row(product, count, values);
      activate<T>(p.activation, count, values, nullptr);
      if (p.gated) {
        load_row(product + p.hidden_dim, count, gate);
        for (int64_t i = 0; i < count; ++i) values[i] *= gate[i];
      }
      step.drop(row, column, count, values);
      store_row(values, count, static_cast<T*>(p.activated) + row * p.hidden_dim + column);
    });
  }

  // The gradient of a gated block's first product, from that of the hidden activations, which stands where these are to
  // be once more.
  static void gated_backward(Context& context, const FeedForwardParams& p) {
    const ActivationStep<T> step(p, true);
    const int64_t width = p.hidden_dim;
    for_pieces(context, p.rows, width, [&](int64_t row, int64_t column, int64_t count) {
      A left[kPiece], right[kPiece], slopes[kPiece], keep[kPiece], d_left[kPiece], d_right[kPiece];
      const int64_t at = row * 2 * width + column;
      const T* product = static_cast<const T*>(p.pre_activation) + at;
      T* d_product = static_cast<T*>(p.d_pre_activation) + at;
      T* u = static_cast<T*>(p.activated) + row * width + column;
      load_row(product, count, left);
      load_row(product + width, count, right);
      load_row(u, count, d_left);
      activate<T>(p.activation, count, left, slopes);
      step.factors(row, column, count, keep);
      for (int64_t i = 0; i < count; ++i) {
        const A d = d_left[i] * keep[i];
        d_right[i] = d * left[i];
        d_left[i] = d * right[i] * slopes[i];
        left[i] *= right[i] * keep[i];
      }
      store_row(d_left, count, d_product);
      store_row(d_right, count, d_product + width);
      store_row(left, count, u);
    });
  }
};

}  // namespace pfa::cpu::PFA_ISA
