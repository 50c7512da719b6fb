// The operator's interface: its inputs and attributes, in one place for registration, checks and kernels.
//
// An absent optional input is a one-element placeholder whose bit in `present` is clear: Paddle's own optional inputs break the
// gradient in static graphs. Forward and gradient share the same attributes, as Paddle requires.
#pragma once

#include <cstdint>
#include <cstring>

namespace pfa::op {

// Bits of `present` and `needs_grad`, and the order of the inputs.
enum Input : int {
  kX,
  kQkvWeight,
  kLinearWeight,
  kPreLnScale,
  kPreLnBias,
  kLnScale,
  kLnBias,
  kQkvBias,
  kLinearBias,
  kAttnMask,
  kInputs,
};

constexpr int kGradients = kAttnMask;  // the mask is constant

constexpr const char* kInputNames[kInputs] = {"x",        "qkv_weight", "linear_weight", "pre_ln_scale", "pre_ln_bias",
                                              "ln_scale", "ln_bias",    "qkv_bias",      "linear_bias",  "attn_mask"};

// Bits of `switches`.
enum Switch : int64_t {
  kPreLayerNorm = 1,
  kFinalLayerNorm = 2,
  kAddResidual = 4,
  kCausal = 8,
  kUpscaleInTrain = 16,
  kSaveForBackward = 32,
  kFixedSeed = 64,
  // Dygraph's: backward runs for the same tensors as forward, so `needs_grad` holds. A program may run with more of them trained than
  // when it was traced, so there it says nothing.
  kNeedsGradHolds = 128,
};

struct Attributes {
  bool is_test;  // of this name and type so that Program.clone(for_test=True) sets it
  int64_t switches;
  int64_t present;
  int64_t needs_grad;
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
#define PFA_TENSORS                                                                                          \
  const paddle::Tensor &x, const paddle::Tensor &qkv_weight, const paddle::Tensor &linear_weight,            \
      const paddle::Tensor &pre_ln_scale, const paddle::Tensor &pre_ln_bias, const paddle::Tensor &ln_scale, \
      const paddle::Tensor &ln_bias, const paddle::Tensor &qkv_bias, const paddle::Tensor &linear_bias,      \
      const paddle::Tensor &attn_mask
#define PFA_SHAPES                                                                                                          \
  const std::vector<int64_t>&x, const std::vector<int64_t>&qkv_weight, const std::vector<int64_t>&linear_weight,            \
      const std::vector<int64_t>&pre_ln_scale, const std::vector<int64_t>&pre_ln_bias, const std::vector<int64_t>&ln_scale, \
      const std::vector<int64_t>&ln_bias, const std::vector<int64_t>&qkv_bias, const std::vector<int64_t>&linear_bias,      \
      const std::vector<int64_t>&attn_mask
#define PFA_DTYPES                                                                                                 \
  const paddle::DataType &x, const paddle::DataType &qkv_weight, const paddle::DataType &linear_weight,            \
      const paddle::DataType &pre_ln_scale, const paddle::DataType &pre_ln_bias, const paddle::DataType &ln_scale, \
      const paddle::DataType &ln_bias, const paddle::DataType &qkv_bias, const paddle::DataType &linear_bias,      \
      const paddle::DataType &attn_mask
#define PFA_INPUTS \
  {&x, &qkv_weight, &linear_weight, &pre_ln_scale, &pre_ln_bias, &ln_scale, &ln_bias, &qkv_bias, &linear_bias, &attn_mask}
#define PFA_INPUT_NAMES \
  "X", "QKVWeight", "LinearWeight", "PreLnScale", "PreLnBias", "LnScale", "LnBias", "QKVBias", "LinearBias", "AttnMask"
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
