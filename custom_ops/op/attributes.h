// The operator's interface: its inputs and attributes, in one place for registration, checks and kernels.
//
// An absent optional input is a one-element placeholder whose bit in `present` is clear: Paddle's own optional inputs
// break the gradient in static graphs. Forward and gradient share the same attributes, as Paddle requires.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/params.h"

namespace pfa::op {

// Bits of `switches`.
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
};

struct Attributes {
  bool is_test;  // of this name and type so that Program.clone(for_test=True) sets it
  int64_t switches;
  int64_t present;     // bit i: of input i
  int64_t needs_grad;  // bit i: of input i
  // float64 numbers as their bits: attributes have no such type on Paddle 2.6.
  int64_t pre_ln_epsilon;
  int64_t ln_epsilon;
  int64_t dropout_rate;
  int64_t attn_dropout_rate;
  int64_t seed;  // without kFixedSeed only a number that tells this call from others that drop something
  // Where the heads of qkv_weight stand in a layer whose heads are spread over devices; 0 in all: they are all.
  int64_t first_head;
  int64_t total_heads;

  bool has(Switch bit) const { return switches & bit; }
  bool has(Input input) const { return present >> input & 1; }
  bool wants_gradient(Input input) const { return has(input) && (!has(kNeedsGradHolds) || needs_grad >> input & 1); }
  bool saves() const { return has(kSaveForBackward) && !is_test; }
};

inline double number(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The parameter lists that Paddle's registration reads off a function's type, and its names for them.
#define PFA_TENSOR(Name, name) const paddle::Tensor& name
#define PFA_TENSORS PFA_INPUTS(PFA_TENSOR)
#define PFA_SHAPE(Name, name) const std::vector<int64_t>& name
#define PFA_SHAPES PFA_INPUTS(PFA_SHAPE)
#define PFA_DTYPE(Name, name) const paddle::DataType& name
#define PFA_DTYPES PFA_INPUTS(PFA_DTYPE)
#define PFA_ADDRESS(Name, name) &name
#define PFA_ADDRESSES {PFA_INPUTS(PFA_ADDRESS)}
#define PFA_INPUT_NAME(Name, name) #Name
#define PFA_INPUT_NAMES PFA_INPUTS(PFA_INPUT_NAME)
#define PFA_GRADIENT_NAME(Name, name) paddle::Grad(#Name)
#define PFA_GRADIENT_NAMES PFA_DIFFERENTIABLE_INPUTS(PFA_GRADIENT_NAME)
#define PFA_ATTRIBUTES                                                                                             \
  bool is_test, int64_t switches, int64_t present, int64_t needs_grad, int64_t pre_ln_epsilon, int64_t ln_epsilon, \
      int64_t dropout_rate, int64_t attn_dropout_rate, int64_t seed, int64_t first_head, int64_t total_heads
#define PFA_ATTRIBUTE_VALUES                                                         \
  {is_test,      switches,          present, needs_grad, pre_ln_epsilon, ln_epsilon, \
   dropout_rate, attn_dropout_rate, seed,    first_head, total_heads}
#define PFA_ATTRIBUTE_NAMES                                                                                 \
  {"is_test: bool",           "switches: int64_t",   "present: int64_t",      "needs_grad: int64_t",        \
   "pre_ln_epsilon: int64_t", "ln_epsilon: int64_t", "dropout_rate: int64_t", "attn_dropout_rate: int64_t", \
   "seed: int64_t",           "first_head: int64_t", "total_heads: int64_t"}

}  // namespace pfa::op
