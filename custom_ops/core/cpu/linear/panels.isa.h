// Operands of a matrix product, packed into panels: kWidth operands of one k after another, of kWidth rows of the
// matrix, with zeros beyond it. Loops of the product read them from the first to the last.

namespace pfa::cpu::PFA_ISA {

// A matrix [count, depth] whose element (i, k) lies at data[i * stride + k * depth_stride]; one of the strides is 1.
// The product sums over the depth.
template <class T>
struct MatrixView {
  const T* data;
  int64_t stride;
  int64_t depth_stride;
};

template <class T>
constexpr int kArrangedNumbers = arranged_numbers(std::is_same_v<T, BFloat16> ? DType::kBFloat16 : DType::kFloat32);

// A matrix [count, depth] that is an arranged weight, by its columns.
template <class T>
struct ArrangedMatrix {
  using P = Operand<T>;
  // Whether products can read operands where they lie.
  static constexpr bool kReadInPlace = kPaired<T> || std::is_same_v<T, P>;

  const T* data;
  int64_t depth;

  // Where the numbers of row `first` begin at k, for as many rows as share its panel. They lie beside each other, and
  // for each k, or each two of bfloat16, kArrangedColumns after the last.
  const T* at(int64_t first, int64_t k) const {
    constexpr int numbers = kArrangedNumbers<T>;
    return data + (first / kArrangedColumns * (depth / numbers) + k / numbers) * (kArrangedColumns * numbers) +
           first % kArrangedColumns * numbers;
  }

  // Packs the rows first..first + kWidth - 1, all of which there are, as PanelPacker does; kWidth divides
  // kArrangedColumns and `first`.
  template <int kWidth>
  void pack(int64_t first, int64_t k0, int64_t k_count, P* out) const {
    for (int64_t k = 0; k < k_count; k += kArrangedNumbers<T>) {
      const T* source = at(first, k0 + k);
      P* row = out + k * kWidth;
      if constexpr (kArrangedNumbers<T> == 1) {
        load_row(source, kWidth, row);
      } else {
        constexpr int lanes = kLanes<uint32_t>;
        for (int64_t i = 0; i < kWidth; i += lanes) {
          Vec<uint32_t> pairs;
          std::memcpy(&pairs, source + 2 * i, sizeof pairs);
          store(row + i, bit_cast<Vec<float>>(pairs << 16));
          store(row + kWidth + i, bit_cast<Vec<float>>(pairs & 0xFFFF0000u));
        }
      }
    }
  }
};

// Packs the k_count numbers from k0 on of rows first..first + count - 1: out [panels][depth][kWidth] operands, where
// depth is operands(k_count) or more. A vector more than that may be written.
template <int kWidth, class T>
struct PanelPacker {
  using P = Operand<T>;
  static constexpr int kLanesOfP = kLanes<P>;

  static void pack(const MatrixView<T>& view, int64_t first, int64_t count, int64_t k0, int64_t k_count, int64_t depth,
                   P* out) {
    const T* source = view.data + first * view.stride + k0 * view.depth_stride;
    const int64_t filled = operands<T>(k_count);
    if (view.depth_stride == 1) {
      for (int64_t i = 0; i < count; i += kWidth) {
        transpose_panel(source + i * view.stride, view.stride, std::min<int64_t>(kWidth, count - i), k_count,
                        out + i * depth);
        std::fill(out + (i * depth + filled * kWidth), out + (i + kWidth) * depth, P(0));
      }
      return;
    }
    for (int64_t i = 0; i < count; i += kWidth) {
      std::fill(out + (i * depth + filled * kWidth), out + (i + kWidth) * depth, P(0));
    }
    // Some panels side by side: what is read lies together.
    for (int64_t k = 0; k < filled; ++k) {
      const T* low = source + k * kNumbers<T> * view.depth_stride;
      const T* high = (k + 1) * kNumbers<T> <= k_count ? low + view.depth_stride : nullptr;
      for (int64_t i = 0; i < count; i += kWidth) {
        copy_row(low + i, high ? high + i : nullptr, std::min<int64_t>(kWidth, count - i),
                 out + (i * depth + k * kWidth));
      }
    }
  }

 private:
  // A row of a panel from the numbers of one k or, for pairs, of two, of which the second may be missing.
  static void copy_row(const T* __restrict low, const T* __restrict high, int64_t rows, P* __restrict out) {
    if constexpr (kPaired<T>) {
      if (rows == kWidth && high) {
        constexpr int lanes = kLanes<uint16_t>;
        constexpr auto indices = std::make_integer_sequence<int, lanes>{};
        for (int64_t i = 0; i + lanes <= kWidth; i += lanes) {
          const auto a = bit_cast<Vec<uint16_t>>(load_operands(low + i));
          const auto b = bit_cast<Vec<uint16_t>>(load_operands(high + i));
          store(out + i, bit_cast<Vec<P>>(zip<0, uint16_t>(a, b, indices)));
          store(out + i + kLanesOfP, bit_cast<Vec<P>>(zip<lanes / 2, uint16_t>(a, b, indices)));
        }
        for (int64_t i = kWidth / lanes * lanes; i < kWidth; ++i) {
          out[i] = low[i].bits | static_cast<uint32_t>(high[i].bits) << 16;
        }
        return;
      }
      for (int64_t i = 0; i < rows; ++i) out[i] = low[i].bits | (high ? static_cast<uint32_t>(high[i].bits) << 16 : 0u);
    } else {
      if (rows == kWidth) return load_row(low, kWidth, out);
      load_row(low, rows, out);
    }
    for (int64_t i = rows; i < kWidth; ++i) out[i] = P(0);
  }

  // Element (i, k) at source[i * stride + k].
  static void transpose_panel(const T* source, int64_t stride, int64_t rows, int64_t k_count, P* out) {
    constexpr int lanes = kLanesOfP;
    constexpr int64_t numbers = lanes * kNumbers<T>;
    int64_t k = 0;
    for (; k + numbers <= k_count; k += numbers) {
      // From the end: where lanes do not divide the width, a row's last vector runs into the start of the next row.
      for (int64_t i = (kWidth - 1) / lanes * lanes; i >= 0; i -= lanes) {
        Vec<P> vectors[lanes];
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l)
          vectors[l] = i + l < rows ? load_operands(source + (i + l) * stride + k) : Vec<P>{};
        transpose_lanes<P>(vectors);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) store(out + l * kWidth + i, vectors[l]);
      }
      out += lanes * kWidth;
    }
    for (; k < k_count; k += kNumbers<T>) {
      for (int64_t i = 0; i < kWidth; ++i) out[i] = i < rows ? operand(source + i * stride + k, k_count - k) : P(0);
      out += kWidth;
    }
  }

  static P operand(const T* source, int64_t count) {
    if constexpr (kPaired<T>) {
      return source[0].bits | (count > 1 ? static_cast<uint32_t>(source[1].bits) << 16 : 0u);
    } else {
      return widen(source[0]);
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
