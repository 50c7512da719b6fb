// Small matrix products, of what lies in the caches: c (+)= scale * a @ b, register tile by register tile. c and b are
// row-major and padded to whole vectors along n; a has any layout.

namespace pfa::cpu::PFA_ISA {

// kRegisterTileRows[vectors] is the number of rows with which the sums of a register tile, a row of b and a factor fit
// the registers (32 with AVX-512 and NEON, else 16).
#if PFA_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisterTileRows[5] = {0, 12, 12, 8, 6};
constexpr int kRegisterTileVectors = 4;
#else
constexpr int kRegisterTileRows[5] = {0, 8, 6, 4, 4};
constexpr int kRegisterTileVectors = 2;
#endif

// The same for any number of rows up to kRows.
template <int kRows, int kVectors, class T, class P, class Meanwhile = NothingMeanwhile>
inline void multiply_last_rows(int64_t rows, int64_t k_size, TileOperand<P> a, const P* b, int64_t b_k, TileResult<T> c,
                               const Meanwhile& meanwhile = {}) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_register_tile<kRows, kVectors>(k_size, a, b, b_k, c, meanwhile);
    } else {
      multiply_last_rows<kRows - 1, kVectors>(rows, k_size, a, b, b_k, c, meanwhile);
    }
  }
}

// c [m, kVectors * lanes] (+)= scale * a [m, k_size] @ b [k_size, kVectors * lanes], register tile by register tile.
// With all calls in it: beside sums as short as attention's they count.
template <int kVectors, class T, class P, class Meanwhile>
[[gnu::flatten]] inline void multiply_with_panel(int64_t m, int64_t k_size, TileOperand<P> a, const P* b, int64_t b_k,
                                                 TileResult<T> c, const Meanwhile& meanwhile) {
  constexpr int rows = kRegisterTileRows[kVectors];
  for (; m >= rows; m -= rows) {
    if constexpr (kHasWideTiles && kVectors == kWideVectors) {
      multiply_wide_tile<rows>(k_size, a, b, b_k, 2 * kLanes<T>, c, meanwhile);
    } else {
      multiply_register_tile<rows, kVectors>(k_size, a, b, b_k, c, meanwhile);
    }
    a.data += rows * a.row_stride;
    c.data += rows * c.row_stride;
  }
  multiply_last_rows<rows - 1, kVectors>(m, k_size, a, b, b_k, c, meanwhile);
}

// c [m, n] (+)= scale * a [m, k] @ b [k, n]; n is a multiple of the vector's lanes.
template <class T, class P, class Meanwhile>
void micro_gemm(int64_t m, int64_t n, int64_t k_size, TileOperand<P> a, const P* b, int64_t b_k, TileResult<T> c,
                const Meanwhile& meanwhile) {
  constexpr int lanes = kLanes<T>;
  while (n > 0) {
    const int64_t vectors = std::min<int64_t>(n / lanes, kRegisterTileVectors);
    if (vectors == 1) multiply_with_panel<1>(m, k_size, a, b, b_k, c, meanwhile);
    if (vectors == 2) multiply_with_panel<2>(m, k_size, a, b, b_k, c, meanwhile);
    if constexpr (kRegisterTileVectors > 2) {
      if (vectors == 3) multiply_with_panel<3>(m, k_size, a, b, b_k, c, meanwhile);
      if (vectors == 4) multiply_with_panel<4>(m, k_size, a, b, b_k, c, meanwhile);
    }
    b += vectors * lanes;
    c.data += vectors * lanes;
    n -= vectors * lanes;
  }
}

}  // namespace pfa::cpu::PFA_ISA
