// Vectors of PFA_VECTOR_BYTES bytes in the compiler's vector extension: loads and stores that convert 16-bit floats, exp, Philox.
// Included by stages.h only, inside an instruction set.

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
  return Vec<T>{} + value;
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

// 16-bit floats, exactly widened, and narrowed by rounding to nearest even. The float16 forms move the exponent by a multiplication
// with a power of two, which renders subnormals too; written without branches so that loops over them become vector code.

inline float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7FFFu;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);  // 2^112
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  const uint32_t special = 0x7F800000u | (magnitude << 13);  // infinity or NaN
  return bit_cast<float>((magnitude >= 0x7C00u ? special : finite) | sign);
}

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }

template <class T>
inline T from_float(Accumulator<T> value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline double from_float<double>(double value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded)};
}

template <>
inline Float16 from_float<Float16>(float value) {
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

template <class T>
inline void load_row(const T* __restrict source, int64_t count, Accumulator<T>* __restrict target) {
  for (int64_t i = 0; i < count; ++i) target[i] = to_float(source[i]);
}

template <class T>
inline void store_row(const Accumulator<T>* __restrict source, int64_t count, T* __restrict target) {
  for (int64_t i = 0; i < count; ++i) target[i] = from_float<T>(source[i]);
}

// Cody and Waite's reduction x = n ln 2 + r, |r| <= ln(2) / 2, then a polynomial in r; error under 2 units in the last place.
// -inf and what underflows give 0, NaN gives NaN; x is at most a little above 0 where this is used.
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
#if defined(__AVX512F__) && PFA_VECTOR_BYTES == 64
  return bit_cast<Vec<uint64_t>>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__) && PFA_VECTOR_BYTES == 32
  return bit_cast<Vec<uint64_t>>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__) && PFA_VECTOR_BYTES == 16
  return bit_cast<Vec<uint64_t>>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xFFFFFFFFull) * static_cast<uint64_t>(b);
#endif
}

struct PhiloxVectors {
  Vec<uint32_t> w[4];
};

// philox() of philox.h on every lane. The even and the odd lanes go through the rounds as the low halves of 64-bit lanes, whose high
// halves the multiplication ignores.
inline PhiloxVectors philox_vector(PhiloxState state, Vec<uint32_t> counter0, Vec<uint32_t> counter1, uint32_t counter2) {
  Vec<uint64_t> half[2][4];
  for (int odd = 0; odd < 2; ++odd) {
    half[odd][0] = bit_cast<Vec<uint64_t>>(counter0) >> (32 * odd);
    half[odd][1] = bit_cast<Vec<uint64_t>>(counter1) >> (32 * odd);
    half[odd][2] = broadcast<uint64_t>(counter2);
    half[odd][3] = broadcast<uint64_t>(state.counter3);
  }
  uint32_t k0 = state.key0;
  uint32_t k1 = state.key1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
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

// keep[i] = scale where the 16-bit number in half `half` of lane i is at least the threshold, else 0.
inline void store_keep(Vec<uint32_t> words, int half, uint32_t threshold, float scale, float* keep) {
  const Vec<uint32_t> numbers = (words >> (16 * half)) & 0xFFFFu;
  store(keep, numbers >= threshold ? broadcast(scale) : Vec<float>{});
}

inline void store_keep(Vec<uint32_t> words, int half, uint32_t threshold, double scale, double* keep) {
  for (int l = 0; l < kLanes<uint32_t>; ++l) keep[l] = ((words[l] >> (16 * half)) & 0xFFFFu) >= threshold ? scale : 0.0;
}

inline Vec<uint32_t> lane_numbers() {
  Vec<uint32_t> v{};
  for (int i = 0; i < kLanes<uint32_t>; ++i) v[i] = i;
  return v;
}

}  // namespace pfa::cpu::PFA_ISA
