// What rounding to 16 bits took comes back to a thirty-second of a unit in the last place, to a sixteenth where it was
// half of one; what is not finite stays so.
#include "core/rounding_residue.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

namespace {

struct Format {
  const char* name;
  pfa::DType dtype;
  int mantissa;
  int least_exponent;  // below it the unit stays the same, as of subnormal numbers
  int from, to;        // exponents of the numbers that are tried; of 2^127 and more there are no residues
};

const Format kFormats[] = {{"float16", pfa::DType::kFloat16, 10, -14, -30, 15},
                           {"bfloat16", pfa::DType::kBFloat16, 7, -120, -115, 125}};

int check(const Format& format) {
  const pfa::RoundingResidue rounding = pfa::RoundingResidue::of(format.dtype);
  std::mt19937 engine(1);
  std::uniform_real_distribution<float> mantissa(1.0f, 2.0f);
  std::uniform_int_distribution<int> exponent(format.from, format.to);
  int failures = 0;
  for (int i = 0; i < 200000; ++i) {
    const float value = std::ldexp(i % 2 ? -mantissa(engine) : mantissa(engine), exponent(engine));
    const float unit = std::ldexp(1.0f, std::max(std::ilogb(value), format.least_exponent) - format.mantissa);
    const float rounded = std::nearbyint(value / unit) * unit;
    const uint32_t residue = rounding.encode(value, rounded);
    const float error = std::abs(rounded + rounding.decode(residue, rounded) - value);
    // Rounded up to a power of two, a number has a unit twice as large.
    const float allowed = unit / 16 * (std::abs(rounded) > std::abs(value) ? 1.01f : 1.0f);
    if (residue > 15 || !(error <= allowed)) {
      if (++failures < 5)
        std::printf("%s %a: rounded to %a, residue %u, off by %a\n", format.name, value, rounded, residue, error);
    }
  }
  for (const float value : {0.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    const float back = value + rounding.decode(rounding.encode(value, value), value);
    if (value == 0.0f ? back != 0.0f : std::isfinite(back)) {
      std::printf("%s %f: got %f\n", format.name, value, back);
      ++failures;
    }
  }
  if (rounding.decode(pfa::kNeutralResidues & 15, 1.0f) != 0.0f) {
    std::printf("%s: neutral residues are not zero\n", format.name);
    ++failures;
  }
  return failures;
}

}  // namespace

int main() {
  int failures = 0;
  for (const Format& format : kFormats) failures += check(format);
  return failures ? 1 : 0;
}
