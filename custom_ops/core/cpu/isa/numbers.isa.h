// Types of numbers: 16-bit floats, the accumulator's type, in which arithmetic on a type is done, conversion to it
// (widen) and from it (narrow), and the operands that inner loops of products read.

namespace pfa::cpu::PFA_ISA {

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

// 16-bit floats are widened exactly, and narrowed by rounding to nearest even. For float16 the exponent is moved by a
// multiplication with a power of two, which is right for subnormals too. There are no branches, so that loops become
// vector code.

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

typedef uint16_t Halves __attribute__((vector_size(PFA_VECTOR_BYTES / 2)));

// By an instruction where there is one: GCC makes several of the conversion.
inline Vec<uint32_t> widen_halves(Halves halves) {
#if PFA_VECTOR_BYTES == 64
  // The masked form, for GCC warns of the plain one.
  return bit_cast<Vec<uint32_t>>(_mm512_maskz_cvtepu16_epi32(0xFFFF, bit_cast<__m256i>(halves)));
#elif PFA_VECTOR_BYTES == 32
  return bit_cast<Vec<uint32_t>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, Vec<uint32_t>);
#endif
}

// A vector of 16-bit floats, widened.
inline Vec<float> load_widened(const BFloat16* source) {
  Halves halves;
  std::memcpy(&halves, source, sizeof halves);
  return bit_cast<Vec<float>>(widen_halves(halves) << 16);
}

inline Vec<float> load_widened(const Float16* source) {
#if PFA_VECTOR_BYTES == 64
  // Masked, as above.
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

// A vector narrowed by an instruction for it, where there is one. That for bfloat16 takes subnormal numbers for 0.
template <class T>
constexpr bool kNarrowsVectors = false;
#if PFA_VECTOR_BYTES == 64
template <>
constexpr bool kNarrowsVectors<Float16> = true;
inline Halves narrow_vector(Float16, Vec<float> v) {
  constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return bit_cast<Halves>(_mm512_maskz_cvtps_ph(0xFFFF, bit_cast<__m512>(v), rounding));  // masked, as above
}
#elif PFA_VECTOR_BYTES == 32
template <>
constexpr bool kNarrowsVectors<Float16> = true;
inline Halves narrow_vector(Float16, Vec<float> v) {
  return bit_cast<Halves>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
#if defined(PFA_BFLOAT16_PRODUCTS)
template <>
constexpr bool kNarrowsVectors<BFloat16> = true;
inline Halves narrow_vector(BFloat16, Vec<float> v) {
  return bit_cast<Halves>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
}
#endif

template <class T>
inline void load_row(const T* __restrict source, int64_t count, Accumulator<T>* __restrict target) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, Float16>) {
    for (; i + kLanes<float> <= count; i += kLanes<float>) store(target + i, load_widened(source + i));
  }
  for (; i < count; ++i) target[i] = widen(source[i]);
}

// Not inline: in some callers GCC makes branches of the float16 conversion before it looks for vectors.
template <class T>
[[gnu::noinline]] void store_row(const Accumulator<T>* __restrict source, int64_t count, T* __restrict target) {
  int64_t i = 0;
  if constexpr (kNarrowsVectors<T>) {
    for (; i + kLanes<float> <= count; i += kLanes<float>) {
      const Halves halves = narrow_vector(T{}, load(source + i));
      std::memcpy(target + i, &halves, sizeof halves);
    }
  }
  for (; i < count; ++i) target[i] = narrow<T>(source[i]);
}

// What products are made of: numbers of the accumulator's type or, with the instructions for it, pairs of bfloat16
// numbers. The two follow each other along the sum; the first is in the low half.
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

// a rounded to bfloat16 in the low halves of the lanes, b in the high ones.
inline Vec<uint32_t> narrow_pair(Vec<float> a, Vec<float> b) {
  return widen_halves(narrow_vector(BFloat16{}, a)) | widen_halves(narrow_vector(BFloat16{}, b)) << 16;
}

// A lane for each of the 16-bit numbers from `pairs` on.
inline Vec<uint32_t> load_halves(const uint32_t* pairs) {
  Halves halves;
  std::memcpy(&halves, pairs, sizeof halves);
  return widen_halves(halves);
}

inline void store_operands(uint32_t* pairs, Vec<float> v) {
  const Halves halves = narrow_vector(BFloat16{}, v);
  std::memcpy(pairs, &halves, sizeof halves);
}
#endif

inline void store_operands(float* operands, Vec<float> v) { store(operands, v); }
inline void store_operands(double* operands, Vec<double> v) { store(operands, v); }

template <class P, class A, int kCount>
inline void store_operands(P* operands, const Vectors<A, kCount>& x) {
  constexpr int step = kLanes<A> / (std::is_same_v<P, A> ? 1 : 2);
  for (int i = 0; i < kCount; ++i) store_operands(operands + i * step, x.v[i]);
}

template <class T>
using Operand = typename OperandOf<T>::type;

// Whether T's operands are pairs.
template <class T>
constexpr bool kPaired = !std::is_same_v<Operand<T>, Accumulator<T>>;

// A vector of operands, of the numbers from `source` on.
template <class T>
inline Vec<Operand<T>> load_operands(const T* source) {
  Vec<Operand<T>> v;
  if constexpr (kPaired<T> || std::is_same_v<T, Operand<T>>) {
    std::memcpy(&v, source, sizeof v);
  } else {
    v = load_widened(source);
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

}  // namespace pfa::cpu::PFA_ISA
