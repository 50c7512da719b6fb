// Vectors of PFA_VECTOR_BYTES bytes in the compiler's vector extension: loads and stores that convert 16-bit floats,
// exp, Philox. Included by stages.h only, inside an instruction set.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct VecType {
  typedef T type __attribute__((vector_size(PFA_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecType<T>::type;

template <class T>
constexpr int kLanes = PFA_VECTOR_BYTES / sizeof(T);

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that arithmetic on T is done in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // not a sum: adding 0 changes -0, so that it would remain in the machine code
}

template <class T>
inline Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T horizontal_sum(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> sum) { return sum + a * b; }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> sum) { return sum + a * b; }

// The lanes first, first + 1, ... of two vectors in turn.
template <int kFirst, class T, int... kIndex>
inline Vec<T> zip(Vec<T> a, Vec<T> b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + kIndex / 2 + kIndex % 2 * kLanes<T>)...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vec<Index>{(kFirst + kIndex / 2 + kIndex % 2 * kLanes<T>)...});
#endif
}

// Transposes a square of numbers: every round takes one bit of the row's number into the lane's.
template <class T>
inline void transpose_square(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
  constexpr auto indices = std::make_integer_sequence<int, lanes>{};
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    Vec<T> zipped[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      zipped[2 * i] = zip<0, T>(rows[i], rows[i + lanes / 2], indices);
      zipped[2 * i + 1] = zip<lanes / 2, T>(rows[i], rows[i + lanes / 2], indices);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = zipped[i];
  }
}

// 16-bit floats, exactly widened, and narrowed by rounding to nearest even. The float16 forms move the exponent by a
// multiplication with a power of two, which renders subnormals too; written without branches so that loops over them
// become vector code.

inline float widen(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7FFFu;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);  // 2^112
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  const uint32_t special = 0x7F800000u | (magnitude << 13);  // infinity or NaN
  return bit_cast<float>((magnitude >= 0x7C00u ? special : finite) | sign);
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

template <class T>
inline T narrow(Accumulator<T> value);

template <>
inline float narrow<float>(float value) {
  return value;
}

template <>
inline double narrow<double>(double value) {
  return value;
}

template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded)};
}

template <>
inline Float16 narrow<Float16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t rebased = magnitude - 0x38000000u;  // exponent bias 127 to 15
  const uint32_t normal = (rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the subnormal's 10 bits, correctly rounded, at the bottom of the sum.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t result = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(result | sign)};
}

// A vector of 16-bit floats, widened.
inline Vec<float> load_wide(const BFloat16* source) {
  typedef uint16_t Halves __attribute__((vector_size(PFA_VECTOR_BYTES / 2)));
  Halves halves;
  std::memcpy(&halves, source, sizeof halves);
  return bit_cast<Vec<float>>(__builtin_convertvector(halves, Vec<uint32_t>) << 16);
}

inline Vec<float> load_wide(const Float16* source) {
#if PFA_VECTOR_BYTES == 64
  // The masked form, for GCC warns of the plain one.
  return bit_cast<Vec<float>>(
      _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif PFA_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#else
  Vec<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = widen(source[l]);
  return v;
#endif
}

template <class T>
inline void load_row(const T* __restrict source, int64_t count, Accumulator<T>* __restrict target) {
  for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i]);
}

template <class T>
inline void store_row(const Accumulator<T>* __restrict source, int64_t count, T* __restrict target) {
  for (int64_t i = 0; i < count; ++i) target[i] = narrow<T>(source[i]);
}

// What the products of the attention's tiles are made of: numbers of the accumulator's type or, with the instructions
// for it, pairs of bfloat16 numbers that follow each other along the sum, the first in the low half.
template <class T>
struct OperandOf {
  using type = Accumulator<T>;
};
#if defined(PFA_BFLOAT16_PRODUCTS)
template <>
struct OperandOf<BFloat16> {
  using type = uint32_t;
};

inline Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> sum) {
  return bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}

typedef uint16_t Halves __attribute__((vector_size(PFA_VECTOR_BYTES / 2)));

inline Halves narrow(Vec<float> v) { return bit_cast<Halves>(_mm512_cvtneps_pbh(bit_cast<__m512>(v))); }

// a rounded to bfloat16 in the low halves of the lanes, b in the high ones.
inline Vec<uint32_t> narrow_pair(Vec<float> a, Vec<float> b) {
  return __builtin_convertvector(narrow(a), Vec<uint32_t>) | __builtin_convertvector(narrow(b), Vec<uint32_t>) << 16;
}

// A lane for each of the 16-bit numbers from `pairs` on.
inline Vec<uint32_t> load_halves(const uint32_t* pairs) {
  Halves halves;
  std::memcpy(&halves, pairs, sizeof halves);
  return __builtin_convertvector(halves, Vec<uint32_t>);
}

inline void store_operands(uint32_t* pairs, Vec<float> v) {
  const Halves halves = narrow(v);
  std::memcpy(pairs, &halves, sizeof halves);
}
#endif

inline void store_operands(float* operands, Vec<float> v) { store(operands, v); }
inline void store_operands(double* operands, Vec<double> v) { store(operands, v); }

template <class T>
using Operand = typename OperandOf<T>::type;

// Whether T's operands are pairs.
template <class T>
constexpr bool kPaired = !std::is_same_v<Operand<T>, Accumulator<T>>;

// The operands that the numbers from `source` on make up, a vector of them.
template <class T>
inline Vec<Operand<T>> load_operands(const T* source) {
  Vec<Operand<T>> v;
  if constexpr (kPaired<T> || std::is_same_v<T, Operand<T>>) {
    std::memcpy(&v, source, sizeof v);
  } else {
    v = load_wide(source);
  }
  return v;
}

// Numbers along the sum in an operand.
template <class T>
constexpr int kNumbers = kPaired<T> ? 2 : 1;

// Operands that `count` numbers along a sum fill.
template <class T>
inline int64_t operands(int64_t count) {
  return (count + kNumbers<T> - 1) / kNumbers<T>;
}

// Cody and Waite's reduction x = n ln 2 + r, |r| <= ln(2) / 2, then a polynomial in r; error under 2 units in the last
// place. -inf and what underflows give 0, NaN gives NaN; x is at most a little above 0 where this is used.
inline Vec<float> vexp(Vec<float> x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> poly = broadcast(1.9875691500e-4f);
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  const Vec<float> power = bit_cast<Vec<float>>((bit_cast<Vec<uint32_t>>(shifted) + 127u) << 23);
  return x < -87.0f ? Vec<float>{} : poly * power;
}

inline Vec<double> vexp(Vec<double> x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> shifted = x * 1.4426950408889634074 + magic;
  const Vec<double> n = shifted - magic;
  Vec<double> r = x - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  // The Taylor series: the first term left out is below 4e-18.
  Vec<double> poly = broadcast(1.0 / 6227020800.0);
  poly = poly * r + 1.0 / 479001600.0;
  poly = poly * r + 1.0 / 39916800.0;
  poly = poly * r + 1.0 / 3628800.0;
  poly = poly * r + 1.0 / 362880.0;
  poly = poly * r + 1.0 / 40320.0;
  poly = poly * r + 1.0 / 5040.0;
  poly = poly * r + 1.0 / 720.0;
  poly = poly * r + 1.0 / 120.0;
  poly = poly * r + 1.0 / 24.0;
  poly = poly * r + 1.0 / 6.0;
  poly = poly * r + 0.5;
  poly = poly * (r * r) + r + 1.0;
  const Vec<double> power = bit_cast<Vec<double>>((bit_cast<Vec<uint64_t>>(shifted) + 1023ull) << 52);
  return x < -708.0 ? Vec<double>{} : poly * power;
}

// Products of the low halves of 64-bit lanes with a 32-bit constant.
inline Vec<uint64_t> multiply_low_halves(Vec<uint64_t> a, uint32_t b) {
#if PFA_VECTOR_BYTES == 64
  // The masked form, for GCC warns of the plain one.
  return bit_cast<Vec<uint64_t>>(_mm512_maskz_mul_epu32(0xFF, bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif PFA_VECTOR_BYTES == 32
  return bit_cast<Vec<uint64_t>>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bit_cast<Vec<uint64_t>>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xFFFFFFFFull) * static_cast<uint64_t>(b);
#endif
}

inline Vec<uint32_t> lane_numbers() {
  Vec<uint32_t> v{};
  for (int i = 0; i < kLanes<uint32_t>; ++i) v[i] = i;
  return v;
}

struct PhiloxVectors {
  Vec<uint32_t> w[4];
};

// Rounds first_round and on of philox() on every lane. The even and the odd lanes go through them as the low halves of
// 64-bit lanes, whose high halves the multiplication ignores.
inline PhiloxVectors philox_rounds(PhiloxState state, int first_round, const Vec<uint32_t> (&counter)[4]) {
  Vec<uint64_t> half[2][4];
  for (int odd = 0; odd < 2; ++odd) {
    for (int i = 0; i < 4; ++i) half[odd][i] = bit_cast<Vec<uint64_t>>(counter[i]) >> (32 * odd);
  }
  uint32_t k0 = state.key0 + first_round * kPhiloxW0;
  uint32_t k1 = state.key1 + first_round * kPhiloxW1;
  for (int round = first_round; round < kPhiloxRounds; ++round) {
    for (auto& c : half) {
      const Vec<uint64_t> product0 = multiply_low_halves(c[0], kPhiloxM0);
      const Vec<uint64_t> product1 = multiply_low_halves(c[2], kPhiloxM1);
      c[0] = (product1 >> 32) ^ c[1] ^ static_cast<uint64_t>(k0);
      c[1] = product1;
      c[2] = (product0 >> 32) ^ c[3] ^ static_cast<uint64_t>(k1);
      c[3] = product0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  PhiloxVectors words;
  for (int i = 0; i < 4; ++i) words.w[i] = bit_cast<Vec<uint32_t>>((half[0][i] & 0xFFFFFFFFull) | (half[1][i] << 32));
  return words;
}

// philox() of philox.h on every lane.
inline PhiloxVectors philox_vector(PhiloxState state, Vec<uint32_t> counter0, Vec<uint32_t> counter1,
                                   uint32_t counter2) {
  return philox_rounds(state, 0, {counter0, counter1, broadcast(counter2), broadcast(state.counter3)});
}

// The same where only counter1 differs between lanes: most of the first two rounds is the same on all.
inline PhiloxVectors philox_vector(PhiloxState state, uint32_t counter0, Vec<uint32_t> counter1, uint32_t counter2) {
  const auto low = [](uint64_t product) { return static_cast<uint32_t>(product); };
  const auto high = [](uint64_t product) { return static_cast<uint32_t>(product >> 32); };
  const uint64_t first0 = static_cast<uint64_t>(kPhiloxM0) * counter0;
  const uint64_t first1 = static_cast<uint64_t>(kPhiloxM1) * counter2;
  const Vec<uint32_t> c0 = counter1 ^ (high(first1) ^ state.key0);
  const uint64_t second1 = static_cast<uint64_t>(kPhiloxM1) * (high(first0) ^ state.counter3 ^ state.key1);
  const Vec<uint64_t> even = multiply_low_halves(bit_cast<Vec<uint64_t>>(c0), kPhiloxM0);
  const Vec<uint64_t> odd = multiply_low_halves(bit_cast<Vec<uint64_t>>(c0) >> 32, kPhiloxM0);
  const auto second0_low = bit_cast<Vec<uint32_t>>((even & 0xFFFFFFFFull) | (odd << 32));
  const auto second0_high = bit_cast<Vec<uint32_t>>((even >> 32) | (odd & ~0xFFFFFFFFull));
  return philox_rounds(state, 2,
                       {broadcast(high(second1) ^ low(first1) ^ (state.key0 + kPhiloxW0)), broadcast(low(second1)),
                        second0_high ^ (low(first0) ^ (state.key1 + kPhiloxW1)), second0_low});
}

// Bit l of the result: whether lane l of a is greater than that of b.
inline uint32_t greater_bits(Vec<uint32_t> a, Vec<uint32_t> b) {
#if PFA_VECTOR_BYTES == 64
  return _mm512_cmpgt_epu32_mask(bit_cast<__m512i>(a), bit_cast<__m512i>(b));
#elif PFA_VECTOR_BYTES == 32
  return _mm256_movemask_ps(bit_cast<__m256>(a > b));
#elif defined(__SSE2__)
  return _mm_movemask_ps(bit_cast<__m128>(a > b));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes<uint32_t>; ++l) bits |= static_cast<uint32_t>(a[l] > b[l]) << l;
  return bits;
#endif
}

// Lane l of value where bit first + l is set, else 0; first is a multiple of the lanes.
template <class A>
inline Vec<A> keep_lanes(const uint64_t* bits, int64_t first, Vec<A> value) {
  const auto selected = *bits >> first;
#if PFA_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) {
    return bit_cast<Vec<A>>(_mm512_maskz_mov_ps(static_cast<__mmask16>(selected), bit_cast<__m512>(value)));
  } else {
    return bit_cast<Vec<A>>(_mm512_maskz_mov_pd(static_cast<__mmask8>(selected), bit_cast<__m512d>(value)));
  }
#else
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  Vec<Bits> lane_bit{};
  for (int l = 0; l < kLanes<A>; ++l) lane_bit[l] = Bits(1) << l;
  return (broadcast(static_cast<Bits>(selected)) & lane_bit) != 0 ? value : Vec<A>{};
#endif
}

}  // namespace pfa::cpu::PFA_ISA
