// A register tile of up to 6 rows and 4 vectors with AVX-512, in instructions of its own. A step along k loads 4
// vectors of b and a factor for each row, and starts up to 24 multiply-adds: where two of these start in a cycle,
// nothing else may take their place. In the compiler's code pointers move at every step, and go to memory and back.
//
//   zmm0 to zmm3    a row of b
//   zmm4 to zmm7    factors
//   zmm8 to zmm31   sums, row by row

namespace pfa::cpu::PFA_ISA {

constexpr int kWideVectors = 4;
constexpr int kMostWideRows = 6;
constexpr int64_t kWideSteps = 4;  // from one asking for lines to the next

#if defined(PFA_WIDE_TILES)
constexpr bool kHasWideTiles = true;

// clang-format off
#define PFA_ROW(broadcast, fma, number, ahead, address, factor, sum0, sum1, sum2, sum3) \
  ".if %c[rows] > " #number "\n\t"                                                      \
  broadcast " " #ahead "*%c[a_step]" address ", %%zmm" #factor "\n\t"                   \
  fma " %%zmm0, %%zmm" #factor ", %%zmm" #sum0 "\n\t"                                   \
  fma " %%zmm1, %%zmm" #factor ", %%zmm" #sum1 "\n\t"                                   \
  fma " %%zmm2, %%zmm" #factor ", %%zmm" #sum2 "\n\t"                                   \
  fma " %%zmm3, %%zmm" #factor ", %%zmm" #sum3 "\n\t"                                   \
  ".endif\n\t"
#define PFA_STEP(broadcast, fma, ahead)                                                      \
  "vmovups " #ahead "*%c[b_step](%[b]), %%zmm0\n\t"                                          \
  "vmovups " #ahead "*%c[b_step]+64(%[b]), %%zmm1\n\t"                                       \
  "vmovups " #ahead "*%c[b_step](%[b],%[third]), %%zmm2\n\t"                                 \
  "vmovups " #ahead "*%c[b_step]+64(%[b],%[third]), %%zmm3\n\t"                              \
  ".if %c[b_step] == 0\n\tadd %[b_k], %[b]\n\t.endif\n\t"                                    \
  PFA_ROW(broadcast, fma, 0, ahead, "(%[first])", 4, 8, 9, 10, 11)                           \
  PFA_ROW(broadcast, fma, 1, ahead, "(%[first],%[row])", 5, 12, 13, 14, 15)                  \
  PFA_ROW(broadcast, fma, 2, ahead, "(%[first],%[row],2)", 6, 16, 17, 18, 19)                \
  PFA_ROW(broadcast, fma, 3, ahead, "(%[fourth])", 7, 20, 21, 22, 23)                        \
  PFA_ROW(broadcast, fma, 4, ahead, "(%[fourth],%[row])", 4, 24, 25, 26, 27)                 \
  PFA_ROW(broadcast, fma, 5, ahead, "(%[fourth],%[row],2)", 5, 28, 29, 30, 31)               \
  ".if %c[a_step] == 0\n\tadd %[a_k], %[first]\n\tadd %[a_k], %[fourth]\n\t.endif\n\t"
#define PFA_ADVANCE(steps)                                                                   \
  ".if %c[a_step]\n\tadd $" #steps "*%c[a_step], %[first]\n\tadd $" #steps "*%c[a_step], %[fourth]\n\t.endif\n\t" \
  ".if %c[b_step]\n\tadd $" #steps "*%c[b_step], %[b]\n\t.endif\n\t"
#define PFA_ZERO(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define PFA_ZERO_ROW(n0, n1, n2, n3) PFA_ZERO(n0) PFA_ZERO(n1) PFA_ZERO(n2) PFA_ZERO(n3)
#define PFA_STORE_ROW(number, n0, n1, n2, n3)                                                                      \
  ".if %c[rows] > " #number "\n\t"                                                                                 \
  "vmovups %%zmm" #n0 ", 256*" #number "(%[first])\n\tvmovups %%zmm" #n1 ", 256*" #number "+64(%[first])\n\t"      \
  "vmovups %%zmm" #n2 ", 256*" #number "+128(%[first])\n\tvmovups %%zmm" #n3 ", 256*" #number "+192(%[first])\n\t" \
  ".endif\n\t"
#define PFA_SUM_WIDE_TILE(P, T, broadcast, fma)                                                                       \
  /* sums [kRows, 4 vectors] = a [kRows, k] @ b [k, 4 vectors], of which the third begins `third` numbers behind the  \
     first. Steps along k are kAStep numbers of a and kBStep of b, or where these are 0, a_k and b_k. Before every    \
     four steps `count` of the lines come near, while there are so many. */                                           \
  template <int kAStep, int kBStep, int kRows>                                                                        \
  inline void sum_wide_tile(int64_t k, const P* first, int64_t row_stride, int64_t a_k, const P* b, int64_t b_k,      \
                            int64_t third, Lines::Walk walk, int64_t count, Vec<T> (&sums)[kRows][4]) {               \
    static_assert(0 < kRows && kRows <= kMostWideRows, "what the registers hold");                                   \
    constexpr int64_t size = sizeof(P);                                                                               \
    const P* fourth = first + 3 * row_stride;                                                                         \
    a_k *= size;                                                                                                      \
    b_k *= size;                                                                                                      \
    const void* const result = sums;                                                                                  \
    if (count == 0) walk.lines = -1;                                                                                  \
    int64_t at_once;                                                                                                  \
    __asm__ volatile(                                                                                                 \
        PFA_ZERO_ROW(8, 9, 10, 11) PFA_ZERO_ROW(12, 13, 14, 15) PFA_ZERO_ROW(16, 17, 18, 19)                          \
        PFA_ZERO_ROW(20, 21, 22, 23) PFA_ZERO_ROW(24, 25, 26, 27) PFA_ZERO_ROW(28, 29, 30, 31)                        \
        "sub $4, %[k]\n\t"                                                                                            \
        "jl 4f\n\t"                                                                                                   \
        ".p2align 5\n"                                                                                                \
        "1:\n\t"                                                                                                      \
        "mov %[count], %[at_once]\n\t"                                                                                \
        "sub %[at_once], %[lines]\n\t"                                                                                \
        "jl 3f\n"                                                                                                     \
        "2:\n\t"                                                                                                      \
        "prefetcht1 (%[line])\n\t"                                                                                    \
        "add $64, %[line]\n\t"                                                                                        \
        "dec %[in_piece]\n\t"                                                                                         \
        "jz 8f\n"                                                                                                     \
        "5:\n\t"                                                                                                      \
        "dec %[at_once]\n\t"                                                                                          \
        "jnz 2b\n"                                                                                                    \
        "3:\n\t"                                                                                                      \
        PFA_STEP(broadcast, fma, 0) PFA_STEP(broadcast, fma, 1) PFA_STEP(broadcast, fma, 2)                           \
        PFA_STEP(broadcast, fma, 3) PFA_ADVANCE(4)                                                                    \
        "sub $4, %[k]\n\t"                                                                                            \
        "jge 1b\n"                                                                                                    \
        "4:\n\t"                                                                                                      \
        "add $4, %[k]\n\t"                                                                                            \
        "jz 7f\n"                                                                                                     \
        "6:\n\t"                                                                                                      \
        PFA_STEP(broadcast, fma, 0) PFA_ADVANCE(1)                                                                    \
        "dec %[k]\n\t"                                                                                                \
        "jnz 6b\n"                                                                                                    \
        "jmp 7f\n"                                                                                                    \
        "8:\n\t"                                                                                                      \
        "add %[gap], %[line]\n\t"                                                                                     \
        "mov %[piece], %[in_piece]\n\t"                                                                               \
        "jmp 5b\n"                                                                                                    \
        "7:\n\t"                                                                                                      \
        "mov %[result], %[first]\n\t"                                                                                 \
        PFA_STORE_ROW(0, 8, 9, 10, 11) PFA_STORE_ROW(1, 12, 13, 14, 15) PFA_STORE_ROW(2, 16, 17, 18, 19)              \
        PFA_STORE_ROW(3, 20, 21, 22, 23) PFA_STORE_ROW(4, 24, 25, 26, 27) PFA_STORE_ROW(5, 28, 29, 30, 31)            \
        : [k] "+r"(k), [first] "+r"(first), [fourth] "+r"(fourth), [b] "+r"(b), [line] "+r"(walk.line),               \
          [in_piece] "+r"(walk.in_piece), [lines] "+r"(walk.lines), [at_once] "=&r"(at_once)                          \
        : [row] "r"(row_stride * size), [a_k] "m"(a_k), [b_k] "m"(b_k), [third] "r"(third * size),                    \
          [count] "m"(count), [piece] "m"(walk.piece), [gap] "m"(walk.gap), [result] "m"(result), [rows] "i"(kRows),  \
          [a_step] "i"(kAStep * size), [b_step] "i"(kBStep * size)                                                    \
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",    \
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", \
          "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");                           \
  }
// clang-format on
PFA_SUM_WIDE_TILE(float, float, "vbroadcastss", "vfmadd231ps")
PFA_SUM_WIDE_TILE(double, double, "vbroadcastsd", "vfmadd231pd")
#if defined(PFA_BFLOAT16_PRODUCTS)
PFA_SUM_WIDE_TILE(uint32_t, float, "vpbroadcastd", "vdpbf16ps")
#endif
#undef PFA_SUM_WIDE_TILE
#undef PFA_STORE_ROW
#undef PFA_ZERO_ROW
#undef PFA_ZERO
#undef PFA_ADVANCE
#undef PFA_STEP
#undef PFA_ROW
#else
constexpr bool kHasWideTiles = false;
#endif

// c [kRows, 4 vectors] (+)= scale * a [kRows, k_size] @ b [k_size, 4 vectors]; row k of b begins at b + k * b_k and
// has its third vector `third` numbers behind the first.
template <int kRows, class T, class P, class Meanwhile>
inline void multiply_wide_tile([[maybe_unused]] int64_t k_size, [[maybe_unused]] TileOperand<P> a,
                               [[maybe_unused]] const P* b, [[maybe_unused]] int64_t b_k,
                               [[maybe_unused]] int64_t third, [[maybe_unused]] TileResult<T> c,
                               [[maybe_unused]] const Meanwhile& meanwhile) {
#if defined(PFA_WIDE_TILES)
  constexpr int lanes = kLanes<T>;
  Lines::Walk lines;
  int64_t count = 0;
  if constexpr (std::is_same_v<Meanwhile, Prefetch>) {
    static_assert(Prefetch::fetches_result, "asked for here");
    count = meanwhile.count;
    lines = meanwhile.lines.take(count * ceil_div(k_size, kWideSteps));
    fetch_result<kRows, kWideVectors>(c);
  } else {
    meanwhile();
  }
  Vec<T> sum[kRows][kWideVectors];
  const auto sum_by = [&](auto a_step, auto b_step) {
    sum_wide_tile<a_step, b_step>(k_size, a.data, a.row_stride, a.k_stride, b, b_k, third, lines, count, sum);
  };
  constexpr std::integral_constant<int, 0> any{};
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::integral_constant<int, 2 * lanes> panel{};
  constexpr std::integral_constant<int, 4 * lanes> whole{};
  if (a.k_stride == 1 && b_k == panel) {
    sum_by(one, panel);
  } else if (a.k_stride == 1 && b_k == whole) {
    sum_by(one, whole);
  } else {
    sum_by(any, any);
  }
  add_sums(sum, c);
#endif
}

// The same for 1 to kMostWideRows.
template <int kRows = kMostWideRows, class T, class P, class Meanwhile>
inline void multiply_wide_rows(int64_t rows, int64_t k_size, TileOperand<P> a, const P* b, int64_t b_k, int64_t third,
                               TileResult<T> c, const Meanwhile& meanwhile) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_wide_tile<kRows>(k_size, a, b, b_k, third, c, meanwhile);
    } else {
      multiply_wide_rows<kRows - 1>(rows, k_size, a, b, b_k, third, c, meanwhile);
    }
  }
}

}  // namespace pfa::cpu::PFA_ISA
