// Activation functions of vectors, and their derivatives.
//
//   relu       max(x, 0)
//   gelu       x * cdf(x), cdf of the standard normal distribution
//   gelu_tanh  x * sigmoid(2 y) = x * (1 + tanh(y)) / 2 with y = sqrt(2 / pi) * (x + 0.044715 x^3)
//              (Hendrycks, Gimpel: "Gaussian error linear units", arXiv:1606.08415)
//   silu       x * sigmoid(x)

namespace pfa::cpu::PFA_ISA {

template <class A, int kCount>
[[gnu::always_inline]] inline Vectors<A, kCount> vabs(const Vectors<A, kCount>& x) {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  return each<kCount>([&](int i) { return bit_cast<Vec<A>>(bit_cast<Vec<Bits>>(x.v[i]) & (~Bits(0) >> 1)); });
}

// What lies beyond x >= 0 of the standard normal distribution, divided by exp(-x^2 / 2): t * p(2 t - 1) with
// t = 1 / (1 + c x). p interpolates at Chebyshev's points, up to where the exponential underflows. Evaluated exactly
// the error is at most 4.4e-9 of the value in float32 and 3.2e-16 in float64.
template <class A>
struct NormalTail;
template <>
struct NormalTail<float> {
  static constexpr float kSlope = 0.3f;
  static constexpr float kCoefficients[] = {0.2219706133f,   0.1645794896f,    0.08654969651f,    0.02776025779f,
                                            0.001816215156f, -0.002423163491f, -0.0005705138421f, 0.0002804169359f,
                                            7.783458318e-5f, -4.084835885e-5f};
};
template <>
struct NormalTail<double> {
  static constexpr double kSlope = 0.2;
  static constexpr double kCoefficients[] = {
      0.15383860995001257716,     0.13307650057801062309,     0.099061123193999396678,     0.062706631334328203245,
      0.033004073233874685249,    0.013823727739424600763,    0.0041590133640188666628,    0.00059867537672266661056,
      -0.00015957392226417087829, -0.00010897996216454179409, -0.000011874881235511392127, 9.9531300837495525777e-6,
      3.3352258996832137721e-6,   -7.9743302459550797429e-7,  -5.5140581664591274739e-7,   6.8806516018837685667e-8,
      8.3038795102645417851e-8,   -9.071911372608122654e-9,   -1.0243526704073839496e-8,   1.4778409200282385434e-9,
      4.704164811331591407e-10};
};

// For what will be rounded to 16 bits: off by 7.3e-6 of the value at most.
struct NormalTail16Bit {
  static constexpr float kSlope = 0.3f;
  static constexpr float kCoefficients[] = {0.2219690231f, 0.1645759827f, 0.0866084867f,
                                            0.0278032678f, 0.0014742034f, -0.0024273309f};
};

// exp and 1 / x of vectors of A; k16Bit: for what will be rounded to 16 bits.
template <bool k16Bit, class A, int kCount>
[[gnu::always_inline]] inline Vectors<A, kCount> exp_of(const Vectors<A, kCount>& x) {
  if constexpr (k16Bit) {
    return vexp_16bit(x);
  } else {
    return vexp(x);
  }
}
template <bool k16Bit, class A, int kCount>
[[gnu::always_inline]] inline Vectors<A, kCount> reciprocal(const Vectors<A, kCount>& x) {
#if PFA_VECTOR_BYTES == 64
  // Off by 2^-14 of it at most. The masked form, for GCC warns of the plain one.
  if constexpr (k16Bit) {
    return each<kCount>(
        [&](int i) { return bit_cast<Vec<A>>(_mm512_maskz_rcp14_ps(0xFFFF, bit_cast<__m512>(x.v[i]))); });
  }
#endif
  return A(1) / x;
}

// The standard normal distribution up to x, and exp(-x^2 / 2).
template <bool k16Bit, class A, int kCount>
struct NormalDistribution {
  Vectors<A, kCount> below;
  Vectors<A, kCount> bell;

  [[gnu::always_inline]] explicit NormalDistribution(const Vectors<A, kCount>& x) {
    using Tail = std::conditional_t<k16Bit, NormalTail16Bit, NormalTail<A>>;
    constexpr int degree = static_cast<int>(std::size(Tail::kCoefficients)) - 1;
    bell = exp_of<k16Bit>(x * x * A(-0.5));
    const auto t = reciprocal<k16Bit>(vabs(x) * Tail::kSlope + A(1));
    const auto s = t + t - A(1);
    auto poly = s * Tail::kCoefficients[degree] + Tail::kCoefficients[degree - 1];
#pragma GCC unroll 32
    for (int i = degree - 2; i >= 0; --i) poly = poly * s + Tail::kCoefficients[i];
    const auto tail = poly * t * bell;
    below = each<kCount>([&](int i) { return x.v[i] < 0 ? tail.v[i] : A(1) - tail.v[i]; });
  }
};

template <bool k16Bit, class A, int kCount>
[[gnu::always_inline]] inline Vectors<A, kCount> sigmoid(const Vectors<A, kCount>& x) {
  const auto e = exp_of<k16Bit>(A(0) - vabs(x));
  const auto larger = reciprocal<k16Bit>(e + A(1));
  return each<kCount>([&](int i) { return x.v[i] < 0 ? e.v[i] * larger.v[i] : larger.v[i]; });
}

template <class A, int kCount>
struct ValueAndSlope {
  Vectors<A, kCount> value;
  Vectors<A, kCount> slope;
};

// Beyond this the functions are 0 or x, and their slopes 0 or 1: what is farther out, up to the infinities, is taken to
// lie here, but as the factor x above 0.
constexpr int kFarthest = 1000;

// k16Bit: both will be rounded to 16 bits.
template <Activation kActivation, bool k16Bit, class A, int kCount>
[[gnu::always_inline]] inline ValueAndSlope<A, kCount> value_and_slope(const Vectors<A, kCount>& given) {
  const auto factor_x =
      each<kCount>([&](int i) { return given.v[i] < A(-kFarthest) ? broadcast(A(-kFarthest)) : given.v[i]; });
  const auto x =
      each<kCount>([&](int i) { return factor_x.v[i] > A(kFarthest) ? broadcast(A(kFarthest)) : factor_x.v[i]; });
  if constexpr (kActivation == Activation::kRelu) {
    // As written NaN stays NaN.
    return {each<kCount>([&](int i) { return given.v[i] < 0 ? Vec<A>{} : given.v[i]; }),
            each<kCount>([&](int i) { return given.v[i] > 0 ? broadcast(A(1)) : Vec<A>{}; })};
  } else if constexpr (kActivation == Activation::kGelu) {
    const NormalDistribution<k16Bit, A, kCount> normal(x);
    return {factor_x * normal.below, normal.below + x * normal.bell * A(0.39894228040143267794)};  // 1 / sqrt(2 pi)
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr A factor = A(2 * 0.79788456080286535588);  // 2 sqrt(2 / pi)
    const auto square = x * x;
    const auto s = sigmoid<k16Bit>(x * (square * A(0.044715) + A(1)) * factor);
    return {factor_x * s, s + x * s * (A(1) - s) * (square * A(3 * 0.044715) + A(1)) * factor};
  } else if constexpr (kActivation == Activation::kSilu) {
    const auto s = sigmoid<k16Bit>(x);
    return {factor_x * s, s + x * s * (A(1) - s)};
  } else {
    return {given, each<kCount>([&](int) { return broadcast(A(1)); })};
  }
}

// Calls f with the activation as a constant.
template <class F>
void for_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

}  // namespace pfa::cpu::PFA_ISA
