// The attributes that all operators begin with. Forward and gradient share them, as Paddle requires.
//
// An absent optional input is a one-element placeholder whose bit in `present` is clear: Paddle's own optional inputs
// break the gradient in static graphs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace pfa::op {

// Bits of `switches`. Those that an operator does not know mean nothing to it.
enum Switch : int64_t {
  kPreLayerNorm = 1,
  kFinalLayerNorm = 2,
  kAddResidual = 4,
  kCausal = 8,
  kUpscaleInTrain = 16,
  kSaveForBackward = 32,
  kFixedSeed = 64,
  // Dygraph's: backward runs for the same tensors as forward, so `needs_grad` holds. A program may run with more of
  // them trained than when it was traced, so there it says nothing.
  kNeedsGradHolds = 128,
  kGated = 256,
  kTransposeX = 512,
  kTransposeWeight = 1024,
  kKeysByHead = 2048,
  kSaveAlways = 4096,  // another operator reads what is saved
};

struct Attributes {
  bool is_test;  // of this name and type so that Program.clone(for_test=True) sets it
  int64_t switches;
  int64_t present;     // bit i: of input i
  int64_t needs_grad;  // bit i: of input i

  bool has(Switch bit) const { return switches & bit; }
  bool has_input(int input) const { return present >> input & 1; }
  bool wants_gradient(int input) const {
    return has_input(input) && (!has(kNeedsGradHolds) || needs_grad >> input & 1);
  }
  bool saves() const { return has(kSaveAlways) || (has(kSaveForBackward) && !is_test); }
};

constexpr int kCommonAttributeCount = 4;

// An operator's own attributes, all int64, follow in a struct derived from Attributes, which its file makes of the one
// list of their names, DO(name) for each: as members, and as the names that Paddle knows.
#define PFA_MEMBER(name) name
#define PFA_ATTRIBUTE_NAME(name) #name

// The attributes of the operator, of their numbers in order.
template <class Own, size_t... kOwn>
Own attributes_of(const int64_t* numbers, std::index_sequence<kOwn...>) {
  static_assert(sizeof(Own) == sizeof(Attributes) + sizeof...(kOwn) * sizeof(int64_t));
  return {{numbers[0] != 0, numbers[1], numbers[2], numbers[3]}, numbers[kCommonAttributeCount + kOwn]...};
}

// A float64 number is given as its bits: attributes have no such type on Paddle 2.6.
inline double number(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace pfa::op
