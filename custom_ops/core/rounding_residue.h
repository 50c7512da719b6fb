// What rounding took from the numbers of a tensor of 16 bits, in four bits each, kept for where they are needed more
// exactly than they are stored.
//
// A number of exponent e with m bits of mantissa stands for what lies within half a unit of its last place, 2^(e - m).
// Its residue is how many sixteenths of that unit the number was off, rounded, from -8 to 7, and 8 added. Eight
// neighbouring numbers of a row share a word, the first in its lowest bits, and a row begins with a word.
#pragma once

#include <cstdint>

#include "core/arena.h"
#include "core/host_device.h"
#include "core/params.h"

namespace pfa {

constexpr int64_t kResiduesInWord = 8;
constexpr int64_t residue_words(int64_t row) { return (row + kResiduesInWord - 1) / kResiduesInWord; }

// Residues of zero: for a tensor of which they are not known.
constexpr int kNeutralResidues = 0x88;  // each byte

struct RoundingResidue {
  float sixteenths;  // of the unit in the last place, in [1, 2): 16 * 2^m
  uint32_t least;    // the least power of two that is no subnormal number, as bits of a float32

  static PFA_HOST_DEVICE RoundingResidue of(DType dtype) {
    if (dtype == DType::kFloat16) return {16384.0f, (127u - 14u) << 23};
    return {2048.0f, (127u - 120u) << 23};  // bfloat16: 2^-120, so that the inverse of any power is finite
  }

  // Of `value`, which was rounded to `rounded`.
  PFA_HOST_DEVICE uint32_t encode(float value, float rounded) const {
    const float inverse = float_of((254u << 23) - power_of(rounded));
    const float place = (value - rounded) * inverse * sixteenths + 8.5f;
    const float positive = place > 0.0f ? place : 0.0f;                // NaN is not
    return static_cast<int32_t>(positive < 15.0f ? positive : 15.0f);  // few processors convert to unsigned numbers
  }

  // What to add to `rounded`.
  PFA_HOST_DEVICE float decode(uint32_t residue, float rounded) const {
    return (static_cast<float>(static_cast<int32_t>(residue)) - 8.0f) * (1.0f / sixteenths) *
           float_of(power_of(rounded));
  }

 private:
  static PFA_HOST_DEVICE float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }
  // The power of two in a number, as bits.
  PFA_HOST_DEVICE uint32_t power_of(float number) const {
    uint32_t bits;
    __builtin_memcpy(&bits, &number, sizeof(bits));
    bits &= 0x7F800000u;
    return bits > least ? bits : least;
  }
};

// Places those of an attention's result, of 16-bit types only.
inline uint32_t* place_out_residue(Arena& arena, const AttentionParams& p) {
  if (!is_16bit_float(p.dtype)) return nullptr;
  return static_cast<uint32_t*>(
      arena.take(p.queries_in_all() * p.num_heads * residue_words(p.head_dim) * sizeof(uint32_t)));
}

}  // namespace pfa
