// Small matrix products on tiles that lie in the caches: c (+)= scale * a @ b, with c and b row-major and padded to
// whole vectors along n, and a in any layout. A tile of c is held in registers while the sum over k runs; a is
// broadcast, b loaded as vectors. The operands are of c's type, or pairs of bfloat16 numbers that follow each other
// along k (simd.h), and then k counts pairs.

namespace pfa::cpu::PFA_ISA {

template <class P>
struct TileOperand {
  const P* data;
  int64_t row_stride;
  int64_t k_stride;
};

// How a product goes into c.
template <class T>
struct TileResult {
  T* data;
  int64_t row_stride;
  T scale;
  bool accumulate;
};

template <int kRows, int kVectors, class T, class P>
inline void register_tile(int64_t k_size, TileOperand<P> a, const P* __restrict b, int64_t b_k, TileResult<T> c) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRows][kVectors] = {};
  if (c.accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c.data + r * c.row_stride + v * lanes, 1);
    }
  }
  for (int64_t k = 0; k < k_size; ++k) {
    Vec<P> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_k + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<P> factor = broadcast(a.data[r * a.row_stride + k * a.k_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(factor, row[v], sum[r][v]);
    }
  }
  // Else the compiler knows the rows' addresses from before the loop, and keeps them in registers that the sums need.
  __asm__("" : "+r"(c.row_stride));
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* target = c.data + r * c.row_stride + v * lanes;
      store(target, (c.accumulate ? load(target) : Vec<T>{}) + sum[r][v] * c.scale);
    }
  }
}

// Rows of a tile such that its sums, a row of b and a factor fit the registers (32 with AVX-512 and NEON, else 16).
#if PFA_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisterRows[5] = {0, 12, 12, 8, 4};
constexpr int kBlockVectors = 4;
#else
constexpr int kRegisterRows[5] = {0, 8, 6, 4, 4};
constexpr int kBlockVectors = 2;
#endif

template <int kRows, int kVectors, class T, class P>
inline void micro_rows(int64_t rows, int64_t k_size, TileOperand<P> a, const P* b, int64_t b_k, TileResult<T> c) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      register_tile<kRows, kVectors>(k_size, a, b, b_k, c);
    } else {
      micro_rows<kRows - 1, kVectors>(rows, k_size, a, b, b_k, c);
    }
  }
}

template <int kVectors, class T, class P>
inline void micro_panel(int64_t m, int64_t k_size, TileOperand<P> a, const P* b, int64_t b_k, TileResult<T> c) {
  constexpr int rows = kRegisterRows[kVectors];
  for (; m >= rows; m -= rows) {
    register_tile<rows, kVectors>(k_size, a, b, b_k, c);
    a.data += rows * a.row_stride;
    c.data += rows * c.row_stride;
  }
  micro_rows<rows - 1, kVectors>(m, k_size, a, b, b_k, c);
}

// c [m, n] (+)= scale * a [m, k] @ b [k, n]; n is a multiple of the vector's lanes.
template <class T, class P>
void micro_gemm(int64_t m, int64_t n, int64_t k_size, TileOperand<P> a, const P* b, int64_t b_k, TileResult<T> c) {
  constexpr int lanes = kLanes<T>;
  while (n > 0) {
    const int64_t vectors = std::min<int64_t>(n / lanes, kBlockVectors);
    if (vectors == 1) micro_panel<1>(m, k_size, a, b, b_k, c);
    if (vectors == 2) micro_panel<2>(m, k_size, a, b, b_k, c);
    if constexpr (kBlockVectors > 2) {
      if (vectors == 3) micro_panel<3>(m, k_size, a, b, b_k, c);
      if (vectors == 4) micro_panel<4>(m, k_size, a, b, b_k, c);
    }
    b += vectors * lanes;
    c.data += vectors * lanes;
    n -= vectors * lanes;
  }
}

}  // namespace pfa::cpu::PFA_ISA
