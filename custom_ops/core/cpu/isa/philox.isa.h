// philox() of core/philox.h, one call on every lane.

namespace pfa::cpu::PFA_ISA {

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

}  // namespace pfa::cpu::PFA_ISA
