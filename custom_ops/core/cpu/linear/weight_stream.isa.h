// Products of a few rows with a weight that lies as a user keeps it: each of its numbers is read once, from memory, in
// the order in which they lie there, and nothing of it is packed. The sums are made along k one number at a time, as
// register tiles make them, so the bits are the same.
//
// What comes next is asked for while the numbers before it are multiplied, line by line.

namespace pfa::cpu::PFA_ISA {

constexpr int64_t kMaxStreamedRows = 16;  // of a
// Beside a weight [columns, k], which is transposed anew for each two of them.
constexpr int64_t kMaxTransposedRows = 2;
constexpr int64_t kStreamedSums = 2048;  // that are made at a time, in the L1 cache

// So many columns of a weight [k, columns] at a time.
inline int64_t streamed_columns(int64_t rows) { return kStreamedSums / round_up(std::max<int64_t>(rows, 1), 8); }

template <class T>
struct WeightStream {
  using P = Operand<T>;
  static_assert(!kPaired<T>);

  static constexpr int64_t kLine = 64 / sizeof(T);

  // c [rows, columns] (+)= a [rows, depth] @ weight [depth, columns], whose rows begin `stride` after each other; after
  // them come those from `next` on, unless it is null. There are at most streamed_columns(rows).
  static void multiply_rows(int64_t rows, int64_t columns, int64_t depth, TileOperand<P> a, const T* weight,
                            int64_t stride, const T* next, TileResult<P> c) {
    P sums[kStreamedSums];
    std::fill(sums, sums + rows * columns, P(0));
    constexpr int kSteps = 4;
    int64_t k = 0;
    for (; k + kSteps <= depth; k += kSteps) {
      const T* const at = weight + k * stride;
      const T* const after = k + 3 * kSteps <= depth ? at + 2 * kSteps * stride
                             : next                  ? next + (k + 2 * kSteps - depth) * stride
                                                     : at;
      add_rows<kSteps>(rows, columns, {a.data + k * a.k_stride, a.row_stride, a.k_stride}, at, stride, after, sums);
    }
    for (; k < depth; ++k) {
      const T* const at = weight + k * stride;
      add_rows<1>(rows, columns, {a.data + k * a.k_stride, a.row_stride, a.k_stride}, at, stride, at, sums);
    }
    for (int64_t r = 0; r < rows; ++r) {
      P* const target = c.data + r * c.row_stride;
      const P* const sum = sums + r * columns;
      for (int64_t i = 0; i < columns; ++i) target[i] = c.accumulate ? target[i] + sum[i] : sum[i];
    }
  }

  // c [rows, columns] (+)= a [rows, depth] @ weight [columns, depth]^T, whose rows begin `stride` after each other;
  // after them come `following` more.
  static void multiply_columns(int64_t rows, int64_t columns, int64_t depth, TileOperand<P> a, const T* weight,
                               int64_t stride, int64_t following, TileResult<P> c) {
    for (int64_t i = 0; i < columns; i += kColumns) {
      const T* at[kColumns];  // of columns that are not there, the last
      for (int64_t l = 0; l < kColumns; ++l) at[l] = weight + std::min(i + l, columns - 1) * stride;
      const bool has_next = i + 2 * kColumns <= columns + following;
      const TileResult<P> target{c.data + i, c.row_stride, P(1), c.accumulate};
      const int64_t count = std::min<int64_t>(kColumns, columns - i);
      const int64_t jump = has_next ? kColumns * stride : 0;
      if (rows == 1) {
        add_columns<1>(depth, a, at, jump, count, target);
      } else {
        add_columns<kMaxTransposedRows>(depth, a, at, jump, count, target);
      }
    }
  }

 private:
  static constexpr int kLanesOfP = kLanes<P>;
  static constexpr int kGroups = 2;  // whose sums are made side by side: each waits for its last
  static constexpr int64_t kColumns = kGroups * kLanesOfP;

  // sums [rows, columns] += a [rows, kSteps] @ weight [kSteps, columns].
  template <int kSteps>
  static void add_rows(int64_t rows, int64_t columns, TileOperand<P> a, const T* weight, int64_t stride, const T* after,
                       P* sums) {
    for (int64_t r = 0; r < rows; r += 2) {
      const TileOperand<P> rows_of_a{a.data + r * a.row_stride, a.row_stride, a.k_stride};
      const T* const asked_for = r == 0 ? after : nullptr;
      if (rows - r >= 2) {
        add_rows_of<2, kSteps>(columns, rows_of_a, weight, stride, asked_for, sums + r * columns);
      } else {
        add_rows_of<1, kSteps>(columns, rows_of_a, weight, stride, asked_for, sums + r * columns);
      }
    }
  }

  template <int kRows, int kSteps>
  static void add_rows_of(int64_t columns, TileOperand<P> a, const T* weight, int64_t stride, const T* after, P* sums) {
    Vec<P> factors[kRows][kSteps];
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kSteps; ++k) factors[r][k] = broadcast(a.data[r * a.row_stride + k * a.k_stride]);
    }
    const auto add = [&](int64_t i) __attribute__((always_inline)) {
      Vec<P> sum[kRows];
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) sum[r] = load(sums + r * columns + i);
#pragma GCC unroll 4
      for (int k = 0; k < kSteps; ++k) {
        const Vec<P> row = load_operands(weight + k * stride + i);
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) sum[r] = multiply_add(factors[r][k], row, sum[r]);
      }
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) store(sums + r * columns + i, sum[r]);
    };
    int64_t i = 0;
    if (after) {
      for (; i + kLine <= columns; i += kLine) {
#pragma GCC unroll 4
        for (int k = 0; k < kSteps; ++k) __builtin_prefetch(after + k * stride + i, 0, 2);
        for (int64_t v = 0; v < kLine; v += kLanesOfP) add(i + v);
      }
    }
    for (; i + kLanesOfP <= columns; i += kLanesOfP) add(i);
    for (; i < columns; ++i) {
      for (int r = 0; r < kRows; ++r) {
        P sum = sums[r * columns + i];
        for (int k = 0; k < kSteps; ++k) sum += factors[r][k][0] * widen(weight[k * stride + i]);
        sums[r * columns + i] = sum;
      }
    }
  }

  // c [kRows, columns] (+)= a [kRows, depth] @ weight [columns, depth]^T, whose rows begin at `at`. What comes after
  // the end of a row lies `jump` after its beginning.
  template <int kRows>
  static void add_columns(int64_t depth, TileOperand<P> a, const T* const (&at)[kColumns], int64_t jump,
                          int64_t columns, TileResult<P> c) {
    constexpr int lanes = kLanesOfP;
    constexpr int64_t ahead = 4 * kLine;
    Vec<P> sums[kGroups][kRows] = {};
    int64_t k = 0;
    for (; k + lanes <= depth; k += lanes) {
      if (k % kLine == 0) {
        const int64_t later = k + ahead < depth ? k + ahead : k + ahead - depth + jump;
        for (int l = 0; l < kColumns; ++l) __builtin_prefetch(at[l] + later, 0, 2);
      }
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        Vec<P> square[lanes];
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) square[l] = load_operands(at[g * lanes + l] + k);
        transpose_lanes<P>(square);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) {
#pragma GCC unroll 2
          for (int r = 0; r < kRows; ++r) {
            const Vec<P> factor = broadcast(a.data[r * a.row_stride + (k + l) * a.k_stride]);
            sums[g][r] = multiply_add(factor, square[l], sums[g][r]);
          }
        }
      }
    }
    for (; k < depth; ++k) {
      for (int g = 0; g < kGroups; ++g) {
        P column[lanes];
        for (int l = 0; l < lanes; ++l) column[l] = widen(at[g * lanes + l][k]);
        for (int r = 0; r < kRows; ++r) {
          const Vec<P> factor = broadcast(a.data[r * a.row_stride + k * a.k_stride]);
          sums[g][r] = multiply_add(factor, load(column), sums[g][r]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      P* const target = c.data + r * c.row_stride;
      P sum[kColumns];
      for (int g = 0; g < kGroups; ++g) store(sum + g * lanes, sums[g][r]);
      for (int64_t i = 0; i < columns; ++i) target[i] = c.accumulate ? target[i] + sum[i] : sum[i];
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
