// The vector helpers of the CPU stages: every 16-bit float there and back, rounding, the errors of exp and of the
// activations for 16 bits, Philox on vectors against the scalar one, masks as bits, and transposition.
#include "core/cpu/isa/system_headers.h"

#define PFA_ISA test
#define PFA_VECTOR_BYTES 16
#include "core/cpu/isa/simd.isa.h"

#include "core/cpu/isa/vectors.isa.h"

#include "core/cpu/isa/exp.isa.h"

#include "core/cpu/isa/activation.isa.h"
#include "core/cpu/isa/numbers.isa.h"
#include "core/cpu/isa/philox.isa.h"

#include <cstdio>
#include <random>

namespace {

using namespace pfa;
using namespace pfa::cpu::test;

int failures = 0;

void expect(bool condition, const char* what, double at) {
  if (condition) return;
  if (++failures <= 20) std::printf("%s fails at %.9g\n", what, at);
}

// The value of a 16-bit float from its definition.
double value_of(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

template <class T>
void test_16bit(int exponent_bits, int mantissa_bits) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T half{static_cast<uint16_t>(bits)};
    const float wide = widen(half);
    const double expected = value_of(half.bits, exponent_bits, mantissa_bits);
    expect(wide == expected || (std::isnan(wide) && std::isnan(expected)), "widen", bits);
    const T back = narrow<T>(wide);
    expect(std::isnan(wide) ? std::isnan(widen(back)) : back.bits == half.bits, "narrow of an exact value", bits);
  }
  // Of every two neighbours of one sign: the middle goes to the even one, and to either side of it to the nearer.
  for (uint32_t bits = 0; bits + 1 < (((1u << exponent_bits) - 1) << mantissa_bits); ++bits) {
    const double low = value_of(bits, exponent_bits, mantissa_bits);
    const double high = value_of(bits + 1, exponent_bits, mantissa_bits);
    const float middle = static_cast<float>((low + high) / 2);
    if (middle != (low + high) / 2) continue;  // below float32's own precision
    const uint16_t even = bits & 1 ? bits + 1 : bits;
    expect(narrow<T>(middle).bits == even, "narrow of a middle", middle);
    const float infinity = std::numeric_limits<float>::infinity();
    if (std::nextafter(middle, 0.0f) > low) {
      expect(narrow<T>(std::nextafter(middle, 0.0f)).bits == bits, "narrow below a middle", middle);
      expect(narrow<T>(std::nextafter(middle, infinity)).bits == bits + 1, "narrow above a middle", middle);
    }
    expect(narrow<T>(-middle).bits == (even | 0x8000), "narrow of a negative middle", -middle);
  }
}

template <class A>
void test_exp(A lowest, double units) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(lowest, 0.5);
  for (int i = 0; i < 200000; ++i) {
    const A x = static_cast<A>(uniform(random));
    const A got = vexp(broadcast(x))[0];
    const long double expected = std::exp(static_cast<long double>(x));
    const A rounded = static_cast<A>(expected);
    const long double unit = std::nextafter(rounded, std::numeric_limits<A>::infinity()) - rounded;
    expect(std::fabs(got - expected) <= units * unit, "exp", x);
  }
  const A infinity = std::numeric_limits<A>::infinity();
  expect(vexp(broadcast(-infinity))[0] == 0, "exp(-inf)", 0);
  expect(vexp(broadcast(A(0)))[0] == 1, "exp(0)", 0);
  expect(vexp(broadcast(A(-1e30)))[0] == 0, "exp of a large negative number", 0);
  expect(std::isnan(vexp(broadcast(std::numeric_limits<A>::quiet_NaN()))[0]), "exp(NaN)", 0);
}

// Some vectors at a time have the numbers of each by itself.
template <class A>
void test_vectors() {
  A numbers[kTogether * kLanes<A>];
  for (double first = -90.0; first < 0.5; first += 1.0 / 64) {
    for (size_t i = 0; i < std::size(numbers); ++i) numbers[i] = static_cast<A>(first - 0.37 * i);
    const auto together = load_vectors<kTogether>(numbers);
    const auto exps = vexp(together);
    const auto gelus = value_and_slope<Activation::kGelu, false>(together);
    for (int v = 0; v < kTogether; ++v) {
      const auto exp = vexp(together.v[v]);
      const auto gelu = value_and_slope<Activation::kGelu, false>(Vectors<A, 1>{{together.v[v]}});
      for (int l = 0; l < kLanes<A>; ++l) {
        expect(exps.v[v][l] == exp[l], "exp of vectors", together.v[v][l]);
        expect(gelus.value.v[v][l] == gelu.value.v[0][l], "gelu of vectors", together.v[v][l]);
        expect(gelus.slope.v[v][l] == gelu.slope.v[0][l], "slope of vectors", together.v[v][l]);
      }
    }
  }
}

void test_16bit_activations() {
  const auto expect_near = [](float got, double expected, double error, const char* what, double x) {
    expect(std::fabs(got - expected) <= error * std::fabs(expected), what, x);
  };
  for (double x = -13.0; x <= 13.0; x += 1.0 / 512) {
    const Vectors<float, 1> at{{broadcast(static_cast<float>(x))}};
    const double normal = std::erfc(-x * std::sqrt(0.5)) / 2;
    const double bell = std::exp(-x * x / 2);
    expect_near(vexp_16bit(at - 14.0f).v[0][0], std::exp(x - 14), 8e-6, "exp for 16 bits", x - 14);
    const auto gelu = value_and_slope<Activation::kGelu, true>(at);
    expect_near(gelu.value.v[0][0], x * normal, 2e-5, "gelu for 16 bits", x);
    expect(
        std::fabs(gelu.slope.v[0][0] - (normal + x * bell * 0.3989422804014327)) <= 2e-5 * std::max(1.0, std::fabs(x)),
        "the slope of gelu for 16 bits", x);
    const auto silu = value_and_slope<Activation::kSilu, true>(at);
    expect_near(silu.value.v[0][0], x / (1 + std::exp(-x)), 2e-5, "silu for 16 bits", x);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  const auto alone = [](float x) { return Vectors<float, 1>{{broadcast(x)}}; };
  expect(vexp_16bit(alone(-infinity)).v[0][0] == 0, "exp(-inf) for 16 bits", 0);
  expect(std::isnan(vexp_16bit(alone(std::numeric_limits<float>::quiet_NaN())).v[0][0]), "exp(NaN) for 16 bits", 0);
  expect(value_and_slope<Activation::kGelu, true>(alone(infinity)).value.v[0][0] == infinity, "gelu(inf)", 0);
}

void test_philox() {
  const PhiloxState state = philox_state(0x123456789ABCDEFull, 0x1FFFFFFFFull, DropoutStage::kOutput);
  const Vec<uint32_t> c0 = lane_numbers() * 0x9E3779B9u;
  const Vec<uint32_t> c1 = lane_numbers() + 0xFFFFFFFDu;
  const PhiloxVectors got = philox_vector(state, c0, c1, 77);
  for (int lane = 0; lane < kLanes<uint32_t>; ++lane) {
    const PhiloxWords expected = philox(state, c0[lane], c1[lane], 77);
    for (int word = 0; word < 4; ++word) expect(got.w[word][lane] == expected.w[word], "philox_vector", lane);
  }
  const PhiloxVectors shared = philox_vector(state, 0x87654321u, c1, 0xFEDCBA98u);
  for (int lane = 0; lane < kLanes<uint32_t>; ++lane) {
    const PhiloxWords expected = philox(state, 0x87654321u, c1[lane], 0xFEDCBA98u);
    for (int word = 0; word < 4; ++word)
      expect(shared.w[word][lane] == expected.w[word], "philox_vector, one c0", lane);
  }
}

void test_greater_bits() {
  std::mt19937 random(2);
  for (int i = 0; i < 1000; ++i) {
    Vec<uint32_t> a, b;
    uint32_t expected = 0;
    for (int lane = 0; lane < kLanes<uint32_t>; ++lane) {
      a[lane] = i % 2 ? random() : random() % 3 + 0x7FFFFFFFu;
      b[lane] = i % 2 ? random() : random() % 3 + 0x7FFFFFFFu;
      expected |= static_cast<uint32_t>(a[lane] > b[lane]) << lane;
    }
    expect(greater_bits(a, b) == expected, "greater_bits", i);
  }
}

template <class T>
void test_lanes() {
  constexpr int lanes = kLanes<T>;
  Vec<T> rows[lanes];
  for (int r = 0; r < lanes; ++r) {
    for (int l = 0; l < lanes; ++l) rows[r][l] = T(100 * r + l);
  }
  transpose_lanes<T>(rows);
  for (int r = 0; r < lanes; ++r) {
    for (int l = 0; l < lanes; ++l) expect(rows[r][l] == T(100 * l + r), "transpose_lanes", 100 * r + l);
  }
  const uint64_t bits = 0x9D3C5A7781F0E6B4ull;
  for (int first = 0; first < 64; first += lanes) {
    const Vec<T> kept = keep_lanes<T>(&bits, first, broadcast(T(3)));
    for (int l = 0; l < lanes; ++l) expect(kept[l] == (bits >> (first + l) & 1 ? T(3) : T(0)), "keep_lanes", first + l);
  }
}

}  // namespace

int main() {
  test_16bit<Float16>(5, 10);
  test_16bit<BFloat16>(8, 7);
  test_exp<float>(-86.9f, 2.0);
  test_exp<double>(-707.0, 2.0);
  test_vectors<float>();
  test_vectors<double>();
  test_16bit_activations();
  test_philox();
  test_greater_bits();
  test_lanes<float>();
  test_lanes<double>();
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
