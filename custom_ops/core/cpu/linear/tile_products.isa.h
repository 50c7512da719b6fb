// Products of bfloat16 panels on the tiles of AMX, registers of 16 rows of 64 bytes: [32, 32] sums in four of them. A
// panel of a is [32][depth] pairs, row by row, one of b [depth][32]; depth is a multiple of 16.

namespace pfa::cpu::PFA_ISA {

constexpr int64_t kTileProductRows = 32;
constexpr int64_t kTileProductDepth = 16;

// Whether this instruction set may have such products of T.
#if defined(PFA_TILE_PRODUCTS)
template <class T>
constexpr bool kHasTileProducts = kPaired<T>;
#else
template <class T>
constexpr bool kHasTileProducts = false;
#endif

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
// c [32, 32] (+)= a @ b; c.scale is not looked at.
inline void multiply_tiles(int64_t depth, const uint32_t* a, const uint32_t* b, TileResult<float> c) {
  constexpr int64_t b_bytes = 32 * sizeof(uint32_t);
  const int64_t a_bytes = depth * sizeof(uint32_t);
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
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, a + 16 * depth + k, a_bytes);
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
#endif

}  // namespace pfa::cpu::PFA_ISA
