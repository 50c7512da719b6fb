// Products of bfloat16 matrices on the tiles of AMX, registers of 16 rows of 64 bytes: [32, 32] sums in four of them.
// multiply_tiles has rows of a, of `depth` pairs, and panels of b [depth][32]; depth is a multiple of 16.
// TileGemm has what lies in the caches, in place of micro_gemm.

namespace pfa::cpu::PFA_ISA {

constexpr int64_t kTileProductRows = 32;
constexpr int64_t kTileProductDepth = 16;
// The most that TileGemm takes of an a which has to be transposed first.
constexpr int64_t kMostTransposedRows = 64;
constexpr int64_t kMostTransposedPairs = 32;

// Whether this instruction set may have such products of T.
#if defined(PFA_TILE_PRODUCTS)
template <class T>
constexpr bool kHasTileProducts = kPaired<T>;
#else
template <class T>
constexpr bool kHasTileProducts = false;
#endif

template <class T>
bool has_tile_products(const Context& context) {
  return kHasTileProducts<T> && context.implementation->has_tile_products;
}

// While it lives, the thread's tiles are set up.
struct TileScope {
  const bool used;

  explicit TileScope(bool used) : used(used) {
#if defined(PFA_TILE_PRODUCTS)
    if (!used) return;
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
#endif
  }

  ~TileScope() {
#if defined(PFA_TILE_PRODUCTS)
    if (used) _tile_release();
#endif
  }

  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

#if defined(PFA_TILE_PRODUCTS)
// c [32, 32] (+)= a @ b; c.scale is not looked at. What comes near meanwhile is asked for between the tiles.
template <class Meanwhile>
void multiply_tiles(int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b, TileResult<float> c,
                    const Meanwhile& meanwhile) {
  constexpr int64_t b_bytes = 32 * sizeof(uint32_t);
  const int64_t a_bytes = a_stride * sizeof(uint32_t);
  const int64_t c_bytes = c.row_stride * sizeof(float);
  float* const lower = c.data + 16 * c.row_stride;
  if (c.accumulate) {
    _tile_loadd(0, c.data, c_bytes);
    _tile_loadd(1, c.data + 16, c_bytes);
    _tile_loadd(2, lower, c_bytes);
    _tile_loadd(3, lower + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileProductDepth) {
    meanwhile();
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
    _tile_loadd(6, b + k * 32, b_bytes);
    _tile_loadd(7, b + k * 32 + 16, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c.data, c_bytes);
  _tile_stored(1, c.data + 16, c_bytes);
  _tile_stored(2, lower, c_bytes);
  _tile_stored(3, lower + 16, c_bytes);
}

// Packs the k_count numbers from k0 on of rows first..first + count - 1 as panels of a, with zeros beyond them.
template <class T>
void pack_tile_rows(const MatrixView<T>& view, int64_t first, int64_t count, int64_t k0, int64_t k_count, int64_t depth,
                    uint32_t* out) {
  constexpr int64_t lanes = kLanes<uint32_t>;
  static_assert(lanes == kTileProductDepth, "a vector is a row of a tile");
  const T* source = view.data + first * view.stride + k0 * view.depth_stride;
  std::fill(out + count * depth, out + round_up(count, kTileProductRows) * depth, 0u);
  if (view.depth_stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t* row = out + i * depth;
      std::fill(row + k_count / 2, row + depth, 0u);
      std::memcpy(row, source + i * view.stride, k_count * sizeof(T));
    }
    return;
  }
  const T zeros[lanes] = {};
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t rows = std::min(lanes, count - i);
    for (int64_t pair = 0; pair < depth; pair += lanes) {
      Vec<uint32_t> vectors[lanes];
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t k = 2 * (pair + l);
        const T* low = k < k_count ? source + k * view.depth_stride + i : zeros;
        const T* high = k + 1 < k_count ? source + (k + 1) * view.depth_stride + i : zeros;
        uint32_t pairs[lanes] = {};
        if (rows == lanes) {
          for (int64_t r = 0; r < lanes; ++r) pairs[r] = low[r].bits | static_cast<uint32_t>(high[r].bits) << 16;
        } else {
          for (int64_t r = 0; r < rows; ++r) pairs[r] = low[r].bits | static_cast<uint32_t>(high[r].bits) << 16;
        }
        vectors[l] = load(pairs);
      }
      transpose_lanes<uint32_t>(vectors);
      for (int64_t r = 0; r < rows; ++r) store(out + (i + r) * depth + pair, vectors[r]);
    }
  }
}

// micro_gemm's product of pairs: on tiles as many rows, and as much of the sum over k, as are multiples of 16.
struct TileGemm {
  static constexpr int64_t kTile = 16;  // rows of a tile, numbers and pairs of a row
  template <class Meanwhile>
  static void run(int64_t m, int64_t n, int64_t k_size, TileOperand<uint32_t> a, const uint32_t* b, int64_t b_k,
                  TileResult<float> c, const Meanwhile& meanwhile) {
    const int64_t rows = round_down(m, kTile);
    const int64_t depth = round_down(k_size, kTile);
    if (rows == 0 || depth == 0) return micro_gemm(m, n, k_size, a, b, b_k, c, meanwhile);
    alignas(64) uint32_t by_rows[kMostTransposedRows * kMostTransposedPairs];
    TileOperand<uint32_t> on_tiles = a;
    if (a.k_stride != 1) {
      transpose_squares(depth, rows, a.data, a.k_stride, by_rows, depth);  // its rows lie side by side
      on_tiles = {by_rows, depth, 1};
    }
    for (int64_t row = 0; row < rows; row += 2 * kTile) {
      for (int64_t column = 0; column < n; column += 2 * kTile) {
        const uint32_t* a_tiles = on_tiles.data + row * on_tiles.row_stride;
        const uint32_t* b_tiles = b + column;
        const TileResult<float> of_block{c.data + row * c.row_stride + column, c.row_stride, c.scale, c.accumulate};
        const bool two_rows = row + kTile < rows, two_columns = column + kTile < n;
        const auto multiply = [&](auto row_tiles, auto column_tiles) {
          block<row_tiles, column_tiles>(depth, a_tiles, on_tiles.row_stride, b_tiles, b_k, of_block, meanwhile);
        };
        if (two_rows && two_columns) multiply(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
        if (two_rows && !two_columns) multiply(std::integral_constant<int, 2>{}, std::integral_constant<int, 1>{});
        if (!two_rows && two_columns) multiply(std::integral_constant<int, 1>{}, std::integral_constant<int, 2>{});
        if (!two_rows && !two_columns) multiply(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
      }
    }
    if (depth < k_size) {
      const TileOperand<uint32_t> rest{a.data + depth * a.k_stride, a.row_stride, a.k_stride};
      const TileResult<float> added{c.data, c.row_stride, c.scale, true};
      micro_gemm(rows, n, k_size - depth, rest, b + depth * b_k, b_k, added, meanwhile);
    }
    if (rows < m) {
      const TileOperand<uint32_t> rest{a.data + rows * a.row_stride, a.row_stride, a.k_stride};
      const TileResult<float> below{c.data + rows * c.row_stride, c.row_stride, c.scale, c.accumulate};
      micro_gemm(m - rows, n, k_size, rest, b, b_k, below, meanwhile);
    }
  }

 private:
  // c [16 kRows, 16 kColumns] (+)= scale * a @ b.
  template <int kRows, int kColumns, class Meanwhile>
  static void block(int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                    TileResult<float> c, const Meanwhile& meanwhile) {
    const int64_t a_bytes = a_stride * sizeof(uint32_t), b_bytes = b_stride * sizeof(uint32_t);
    const bool in_place = c.accumulate && c.scale == 1.0f;
    float* const right = c.data + kTile;
    float* const lower = c.data + kTile * c.row_stride;
    const int64_t c_bytes = c.row_stride * sizeof(float);
    if (in_place) {
      _tile_loadd(0, c.data, c_bytes);
      if constexpr (kColumns > 1) _tile_loadd(1, right, c_bytes);
      if constexpr (kRows > 1) _tile_loadd(2, lower, c_bytes);
      if constexpr (kRows > 1 && kColumns > 1) _tile_loadd(3, lower + kTile, c_bytes);
    } else {
      _tile_zero(0);
      if constexpr (kColumns > 1) _tile_zero(1);
      if constexpr (kRows > 1) _tile_zero(2);
      if constexpr (kRows > 1 && kColumns > 1) _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += kTile) {
      meanwhile();
      _tile_loadd(4, a + k, a_bytes);
      if constexpr (kRows > 1) _tile_loadd(5, a + kTile * a_stride + k, a_bytes);
      _tile_loadd(6, b + k * b_stride, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kRows > 1) _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns > 1) {
        _tile_loadd(7, b + k * b_stride + kTile, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kRows > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    alignas(64) float sums[kRows * kTile][kColumns * kTile];
    const bool direct = in_place || (!c.accumulate && c.scale == 1.0f);
    float* const to = direct ? c.data : &sums[0][0];
    const int64_t stride = direct ? c.row_stride : kColumns * kTile;
    const int64_t bytes = stride * sizeof(float);
    _tile_stored(0, to, bytes);
    if constexpr (kColumns > 1) _tile_stored(1, to + kTile, bytes);
    if constexpr (kRows > 1) _tile_stored(2, to + kTile * stride, bytes);
    if constexpr (kRows > 1 && kColumns > 1) _tile_stored(3, to + kTile * stride + kTile, bytes);
    if (direct) return;
    for (int64_t row = 0; row < kRows * kTile; ++row) {
      for (int64_t column = 0; column < kColumns * kTile; column += kLanes<float>) {
        float* target = c.data + row * c.row_stride + column;
        const Vec<float> scaled = load(&sums[row][column]) * c.scale;
        store(target, c.accumulate ? load(target) + scaled : scaled);
      }
    }
  }
};
#endif

// micro_gemm of operands of T's numbers, on tiles where these are set up.
template <class T, class Meanwhile>
void gemm_in_cache([[maybe_unused]] bool on_tiles, int64_t m, int64_t n, int64_t k_size, TileOperand<Operand<T>> a,
                   const Operand<T>* b, int64_t b_k, TileResult<Accumulator<T>> c, const Meanwhile& meanwhile) {
#if defined(PFA_TILE_PRODUCTS)
  if constexpr (kHasTileProducts<T>) {
    if (on_tiles) return TileGemm::run(m, n, k_size, a, b, b_k, c, meanwhile);
  }
#endif
  micro_gemm(m, n, k_size, a, b, b_k, c, meanwhile);
}

}  // namespace pfa::cpu::PFA_ISA
