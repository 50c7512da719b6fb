// A register tile: a small product whose sums are held in registers while the sum over k runs. Numbers of a are
// broadcast, b is loaded as vectors. The operands are of c's type, or pairs of bfloat16 numbers that follow each other
// along k (numbers.isa.h); then k counts pairs.

namespace pfa::cpu::PFA_ISA {

// Element (i, k) of a lies at data[i * row_stride + k * k_stride].
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

// What a product does meanwhile: called before every `step` steps along k. `fetches_result`: the lines of c are asked
// for beforehand, which costs time where they are in the caches already.
struct NothingMeanwhile {
  static constexpr bool fetches_result = true;
  static constexpr int64_t step = std::numeric_limits<int64_t>::max();
  void operator()() const {}
};

// The lines of c [kRows, kVectors * lanes] come near: a store too waits for its line.
template <int kRows, int kVectors, class T>
[[gnu::always_inline]] inline void fetch_result(TileResult<T> c) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c.data + r * c.row_stride + v * kLanes<T>, 1);
  }
}

// c (+)= scale * sum.
template <class T, class Sums>
[[gnu::always_inline]] inline void add_sums(const Sums& sum, TileResult<T> c) {
  constexpr int rows = std::extent_v<Sums>;
  constexpr int vectors = std::extent_v<Sums, 1>;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      T* target = c.data + r * c.row_stride + v * kLanes<T>;
      store(target, c.accumulate ? load(target) + sum[r][v] * c.scale : sum[r][v] * c.scale);
    }
  }
}

#if PFA_VECTOR_BYTES == 32
// sum [6, 2 vectors] += a [6, 1] @ b [1, 2 vectors]; rows 0 to 2 of a lie a stride apart from `first` on, the others
// from `fourth` on, all kAhead numbers behind that. All 16 registers are in use: in the compiler's own code, which
// chooses forms of instructions one by one, sums move about and go to memory.
// clang-format off
#define PFA_ROW(type, address, row)                         \
  "vbroadcasts" type " %c[ahead]" address ", %%ymm13\n\t"   \
  "vfmadd231p" type " %%ymm14, %%ymm13, %[sum" row "0]\n\t" \
  "vfmadd231p" type " %%ymm15, %%ymm13, %[sum" row "1]\n\t"
#define PFA_SIX_ROWS(T, type)                                                                                       \
  template <int kAhead>                                                                                             \
  inline void multiply_six_rows(const T* first, const T* fourth, int64_t stride, const T* b, Vec<T> (&sum)[6][2]) { \
    __asm__("vmovups (%[b]), %%ymm14\n\t"                                                                           \
            "vmovups 32(%[b]), %%ymm15\n\t"                                                                         \
            PFA_ROW(type, "(%[first])", "0")                                                                        \
            PFA_ROW(type, "(%[first],%[stride])", "1")                                                              \
            PFA_ROW(type, "(%[first],%[stride],2)", "2")                                                            \
            PFA_ROW(type, "(%[fourth])", "3")                                                                       \
            PFA_ROW(type, "(%[fourth],%[stride])", "4")                                                             \
            PFA_ROW(type, "(%[fourth],%[stride],2)", "5")                                                           \
            : [sum00] "+x"(sum[0][0]), [sum01] "+x"(sum[0][1]), [sum10] "+x"(sum[1][0]), [sum11] "+x"(sum[1][1]),   \
              [sum20] "+x"(sum[2][0]), [sum21] "+x"(sum[2][1]), [sum30] "+x"(sum[3][0]), [sum31] "+x"(sum[3][1]),   \
              [sum40] "+x"(sum[4][0]), [sum41] "+x"(sum[4][1]), [sum50] "+x"(sum[5][0]), [sum51] "+x"(sum[5][1])    \
            : [first] "r"(first), [fourth] "r"(fourth), [stride] "r"(stride * int64_t{sizeof(T)}), [b] "r"(b),      \
              [ahead] "i"(kAhead * sizeof(T))                                                                       \
            : "memory", "xmm13", "xmm14", "xmm15");                                                                 \
  }
// clang-format on
PFA_SIX_ROWS(float, "s")
PFA_SIX_ROWS(double, "d")
#undef PFA_SIX_ROWS
#undef PFA_ROW
#endif

// c [kRows, kVectors * lanes] (+)= scale * a [kRows, k_size] @ b [k_size, kVectors * lanes]; row k of b begins at b + k
// * b_k.
template <int kRows, int kVectors, class T, class P, class Meanwhile = NothingMeanwhile>
inline void multiply_register_tile(int64_t k_size, TileOperand<P> a, const P* __restrict b, int64_t b_k,
                                   TileResult<T> c, const Meanwhile& meanwhile = {}) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRows][kVectors] = {};
  if constexpr (Meanwhile::fetches_result) fetch_result<kRows, kVectors>(c);
  // Every third row of a has a pointer; the others lie one stride and two behind it, as addresses can say. So there are
  // general registers for all, whatever the strides. The compiler is kept from other ways, which spill.
  constexpr int kPointers = (kRows + 2) / 3;
  const P* at[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) at[i] = a.data + 3 * i * a.row_stride;
  while (k_size > 0) {
    meanwhile();
    const int64_t steps = std::min(k_size, meanwhile.step);
    k_size -= steps;
    // Step `ahead` from where the pointers are.
    const auto multiply = [&](auto ahead) __attribute__((always_inline)) {
#if PFA_VECTOR_BYTES == 32
      if constexpr (kRows == 6 && kVectors == 2) {
        multiply_six_rows<ahead>(at[0], at[1], a.row_stride, b, sum);
        b += b_k;
        return;
      }
#endif
      Vec<P> row[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * lanes);
      b += b_k;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<P> factor = broadcast(at[r / 3][r % 3 * a.row_stride + ahead]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(factor, row[v], sum[r][v]);
      }
    };
    const auto advance = [&](int64_t distance) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < kPointers; ++i) {
        at[i] += distance;
        __asm__("" : "+r"(at[i]));
      }
    };
    int64_t k = 0;
    // With narrow vectors a step is so short that moving the pointers counts.
    if (PFA_VECTOR_BYTES == 32 && a.k_stride == 1) {
      constexpr int64_t kUnrolled = 4;
#pragma GCC unroll 1
      for (; k + kUnrolled <= steps; k += kUnrolled) {
        multiply(std::integral_constant<int, 0>{});
        multiply(std::integral_constant<int, 1>{});
        multiply(std::integral_constant<int, 2>{});
        multiply(std::integral_constant<int, 3>{});
        advance(kUnrolled);
      }
    }
#pragma GCC unroll 4
    for (; k < steps; ++k) {
      multiply(std::integral_constant<int, 0>{});
      advance(a.k_stride);
    }
  }
  // Else the compiler knows the rows' addresses from before the loop, and keeps them in registers that the sums need.
  __asm__("" : "+r"(c.row_stride));
  add_sums(sum, c);
}

}  // namespace pfa::cpu::PFA_ISA
