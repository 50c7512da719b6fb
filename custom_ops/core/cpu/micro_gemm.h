// Small matrix products on tiles that lie in the caches: c (+)= a @ b, with c and b row-major and padded to whole vectors along n,
// and a in any layout. A block of c is held in registers while the sum over k runs; a is broadcast, b loaded as vectors.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct TileOperand {
  const T* data;
  int64_t row_stride;
  int64_t k_stride;
};

template <int kRows, int kVectors, class T>
inline void micro_block(int64_t k_size, const T* __restrict a, int64_t a_row, int64_t a_k, const T* __restrict b, int64_t b_k,
                        T* __restrict c, int64_t c_row, bool accumulate) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = accumulate ? load(c + r * c_row + v * lanes) : Vec<T>{};
  }
  for (int64_t k = 0; k < k_size; ++k) {
    Vec<T> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_k + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> factor = broadcast(a[r * a_row + k * a_k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * lanes, sum[r][v]);
  }
}

// Rows of a block such that its sums, a row of b and a factor fit the registers (32 with AVX-512 and NEON, else 16).
#if PFA_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kBlockRows[5] = {0, 12, 12, 8, 4};
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockRows[5] = {0, 8, 6, 4, 4};
constexpr int kBlockVectors = 2;
#endif

template <int kRows, int kVectors, class T>
inline void micro_rows(int64_t rows, int64_t k_size, TileOperand<T> a, const T* b, int64_t b_k, T* c, int64_t c_row,
                       bool accumulate) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      micro_block<kRows, kVectors>(k_size, a.data, a.row_stride, a.k_stride, b, b_k, c, c_row, accumulate);
    } else {
      micro_rows<kRows - 1, kVectors>(rows, k_size, a, b, b_k, c, c_row, accumulate);
    }
  }
}

template <int kVectors, class T>
inline void micro_panel(int64_t m, int64_t k_size, TileOperand<T> a, const T* b, int64_t b_k, T* c, int64_t c_row,
                        bool accumulate) {
  constexpr int rows = kBlockRows[kVectors];
  int64_t r = 0;
  for (; r + rows <= m; r += rows) {
    micro_block<rows, kVectors>(k_size, a.data + r * a.row_stride, a.row_stride, a.k_stride, b, b_k, c + r * c_row, c_row,
                                accumulate);
  }
  const TileOperand<T> rest{a.data + r * a.row_stride, a.row_stride, a.k_stride};
  micro_rows<rows - 1, kVectors>(m - r, k_size, rest, b, b_k, c + r * c_row, c_row, accumulate);
}

// c [m, n] (+)= a [m, k] @ b [k, n]; n is a multiple of the vector's lanes.
template <class T>
void micro_gemm(int64_t m, int64_t n, int64_t k_size, TileOperand<T> a, const T* b, int64_t b_k, T* c, int64_t c_row,
                bool accumulate) {
  constexpr int lanes = kLanes<T>;
  int64_t column = 0;
  while (column < n) {
    const int64_t vectors = std::min<int64_t>((n - column) / lanes, kBlockVectors);
    const T* b_panel = b + column;
    T* c_panel = c + column;
    if (vectors == 1) micro_panel<1>(m, k_size, a, b_panel, b_k, c_panel, c_row, accumulate);
    if (vectors == 2) micro_panel<2>(m, k_size, a, b_panel, b_k, c_panel, c_row, accumulate);
    if constexpr (kBlockVectors > 2) {
      if (vectors == 3) micro_panel<3>(m, k_size, a, b_panel, b_k, c_panel, c_row, accumulate);
      if (vectors == 4) micro_panel<4>(m, k_size, a, b_panel, b_k, c_panel, c_row, accumulate);
    }
    column += vectors * lanes;
  }
}

}  // namespace pfa::cpu::PFA_ISA
