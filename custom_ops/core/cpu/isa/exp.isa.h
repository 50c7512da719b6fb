// exp of vectors: x = n ln 2 + r with |r| <= ln(2) / 2 (Cody and Waite's reduction), exp(x) = 2^n exp(r), and exp(r) is
// a polynomial. ln 2 is taken in two parts, of which n times the first is exact.
//
// The error is under 2 units in the last place. -inf and what underflows give 0, NaN gives NaN. x may be at most a
// little above 0, as it is where this is used: overflow is not looked at.

namespace pfa::cpu::PFA_ISA {

// The parts of ln 2 and the coefficients are those of expf in Moshier's Cephes library. Evaluated exactly, the
// polynomial is off by 1.1e-9 of exp(r) at most.
template <int kCount>
[[gnu::always_inline]] inline Vectors<float, kCount> vexp(const Vectors<float, kCount>& x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const auto shifted = x * 1.44269504088896341f + magic;
  const auto n = shifted - magic;
  auto r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  auto poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  return each<kCount>([&](int i) {
    const Vec<float> power = bit_cast<Vec<float>>((bit_cast<Vec<uint32_t>>(shifted.v[i]) + 127u) << 23);
    return x.v[i] < -87.0f ? Vec<float>{} : poly.v[i] * power;
  });
}
// The same for what will be rounded to 16 bits: off by 5.4e-6 of exp(x), and a few units in x's last place, at most.
// The polynomial has the least relative error.
template <int kCount>
[[gnu::always_inline]] inline Vectors<float, kCount> vexp_16bit(const Vectors<float, kCount>& x) {
  const float magic = 12582912.0f;
  const auto shifted = x * 1.44269504088896341f + magic;
  const auto r = x - (shifted - magic) * 0.69314718055994531f;
  auto poly = r * 0.0412776717f + 0.1675353168f;
  poly = poly * r + 0.5000511809f;
  poly = poly * (r * r) + r + 1.0f;
  return each<kCount>([&](int i) {
    const Vec<float> power = bit_cast<Vec<float>>((bit_cast<Vec<uint32_t>>(shifted.v[i]) + 127u) << 23);
    return x.v[i] < -87.0f ? Vec<float>{} : poly.v[i] * power;
  });
}

// The parts of ln 2 are those of fdlibm. The polynomial is the Taylor series: the first term left out, r^14 / 14!, is
// at most 4.2e-18.
template <int kCount>
[[gnu::always_inline]] inline Vectors<double, kCount> vexp(const Vectors<double, kCount>& x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const auto shifted = x * 1.4426950408889634074 + magic;
  const auto n = shifted - magic;
  auto r = x - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  auto poly = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
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
  return each<kCount>([&](int i) {
    const Vec<double> power = bit_cast<Vec<double>>((bit_cast<Vec<uint64_t>>(shifted.v[i]) + 1023ull) << 52);
    return x.v[i] < -708.0 ? Vec<double>{} : poly.v[i] * power;
  });
}

inline Vec<float> vexp(Vec<float> x) { return vexp(Vectors<float, 1>{{x}}).v[0]; }
inline Vec<double> vexp(Vec<double> x) { return vexp(Vectors<double, 1>{{x}}).v[0]; }

}  // namespace pfa::cpu::PFA_ISA
