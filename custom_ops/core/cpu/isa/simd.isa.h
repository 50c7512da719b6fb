// Vectors of PFA_VECTOR_BYTES bytes in the compiler's vector extension: what is done with their lanes.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct VecType {
  typedef T type __attribute__((vector_size(PFA_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecType<T>::type;

template <class T>
constexpr int kLanes = PFA_VECTOR_BYTES / sizeof(T);

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
  using Index = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  return __builtin_shuffle(a, b, Vec<Index>{Index(kFirst + kIndex / 2 + kIndex % 2 * kLanes<T>)...});
#endif
}

// Lane i ^ kDistance in lane i.
template <int kDistance, class T, int... kIndex>
inline Vec<T> swap_lanes(Vec<T> v, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (kIndex ^ kDistance)...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return __builtin_shuffle(v, Vec<Index>{Index(kIndex ^ kDistance)...});
#endif
}

// The highest lane, in every lane.
template <class T, int kDistance = kLanes<T> / 2>
inline Vec<T> highest_of_lanes(Vec<T> v) {
  if constexpr (kDistance == 0) {
    return v;
  } else {
    constexpr auto indices = std::make_integer_sequence<int, kLanes<T>>{};
    return highest_of_lanes<T, kDistance / 2>(vmax<T>(swap_lanes<kDistance, T>(v, indices), v));
  }
}

// Lane l of vector r and lane r of vector l change places. Every round takes one bit of the row's number into the
// lane's.
template <class T>
inline void transpose_lanes(Vec<T> (&rows)[kLanes<T>]) {
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

// 0, 1, 2, ...
inline Vec<uint32_t> lane_numbers() {
  Vec<uint32_t> v{};
  for (int i = 0; i < kLanes<uint32_t>; ++i) v[i] = i;
  return v;
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

#if PFA_VECTOR_BYTES == 32
// For every byte of bits, a byte of ones for each that is set.
struct BytesOfBits {
  alignas(64) uint64_t bytes[256] = {};

  constexpr BytesOfBits() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int l = 0; l < 8; ++l) bytes[bits] |= bits >> l & 1 ? uint64_t{0xFF} << (8 * l) : 0;
    }
  }
};
constexpr BytesOfBits kBytesOfBits;
#endif

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
#if PFA_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) {
    const auto bytes = _mm_cvtsi64_si128(static_cast<int64_t>(kBytesOfBits.bytes[selected & 0xFF]));
    return bit_cast<Vec<A>>(_mm256_and_si256(_mm256_cvtepi8_epi32(bytes), bit_cast<__m256i>(value)));
  }
#endif
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  Vec<Bits> lane_bit{};
  for (int l = 0; l < kLanes<A>; ++l) lane_bit[l] = Bits(1) << l;
  return (broadcast(static_cast<Bits>(selected)) & lane_bit) != 0 ? value : Vec<A>{};
#endif
}

// to [columns][rows] = from [rows][columns] transposed; both numbers are multiples of the vector's lanes.
template <class T>
void transpose_squares(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t c = 0; c < columns; c += lanes) {
    for (int64_t r = 0; r < rows; r += lanes) {
      Vec<T> square[lanes];
      for (int64_t l = 0; l < lanes; ++l) square[l] = load(from + (r + l) * from_stride + c);
      transpose_lanes<T>(square);
      for (int64_t l = 0; l < lanes; ++l) store(to + (c + l) * to_stride + r, square[l]);
    }
  }
}

}  // namespace pfa::cpu::PFA_ISA
