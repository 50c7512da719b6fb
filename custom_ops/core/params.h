// The attention block as one plain struct: sizes, switches, and the pointers of every stage.
//
// Bindings fill the sizes, switches, inputs and outputs; block.h places what is saved for backward and the workspace;
// stages read what they need. All tensors are dense and row-major, in the memory of the device that runs the block.
// M = batch * seq_len rows, E = embed_dim, H = num_heads, D = head_dim. A pointer that is null is an absent input or a
// gradient that nobody reads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pfa {

enum class DType : int32_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kBool,
  kUInt8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
};

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt16:
      return 2;
    case DType::kBool:
    case DType::kUInt8:
    case DType::kInt8:
      return 1;
  }
  return 0;
}

inline bool is_16bit_float(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

// The type of statistics, softmax and sums: float64 for float64, else float32.
inline DType accumulator_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// An element is dropped when its 16-bit random number (philox.h) is below `threshold`; what is kept is multiplied by
// `scale`. A threshold of 0 draws no random numbers.
struct Dropout {
  uint32_t threshold = 0;  // round(rate * 65536)
  double scale = 1.0;
};

// The dropout of a rate in [0, 1]: upscale_in_train if `upscales`, else downscale_in_infer.
inline Dropout dropout_of(double rate, bool training, bool upscales) {
  const double kept = 1.0 - rate;
  if (!training) return {0, upscales ? 1.0 : kept};
  return {static_cast<uint32_t>(rate * 65536.0 + 0.5), !upscales ? 1.0 : kept > 0 ? 1.0 / kept : 0.0};
}

// Stages whose workspace may lie in the same memory. Backward: the residual and the output projection; attention; and
// the QKV projection and the first layer norm.
enum class Phase { kForward, kOutputBackward, kAttentionBackward, kInputBackward };

// A float mask is added to the scores; of bool and integer masks an element that is 0 hides its key. (b, h, i, j) lies
// at data + b*strides[0] + h*strides[1] + i*strides[2] + j*strides[3], counted in elements; 0 where it broadcasts.
struct Mask {
  const void* data = nullptr;
  DType dtype = DType::kBool;
  int64_t strides[4] = {0, 0, 0, 0};
};

struct Params {
  // sizes
  int64_t batch = 0;
  int64_t seq_len = 0;
  int64_t embed_dim = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  // In a layer whose heads are spread over devices, the number of the first head here and of all heads, by which
  // dropout counts. total_heads 0: these are all.
  int64_t first_head = 0;
  int64_t total_heads = 0;

  // types
  DType dtype = DType::kFloat32;  // weights, linear biases, all activations but these, and their gradients
  DType residual_dtype =
      DType::kFloat32;                 // x, residual, out, and their gradients: dtype, or float32 beside a 16-bit one
  DType norm_dtype = DType::kFloat32;  // layer-norm scales and biases, and their gradients: residual_dtype or float32

  // switches
  bool pre_layer_norm = false;
  bool final_layer_norm = true;
  bool add_residual = true;
  bool causal = false;
  double pre_ln_epsilon = 1e-5;
  double ln_epsilon = 1e-5;
  Dropout attn_dropout;
  Dropout dropout;
  // The seed of the dropout masks (philox.h) in the forward pass; backward finds it in random_state.
  uint64_t seed = 0;
  uint64_t offset = 0;

  // inputs
  const void* x = nullptr;              // [M, E] residual_dtype
  const void* pre_ln_scale = nullptr;   // [E] or null
  const void* pre_ln_bias = nullptr;    // [E] or null
  const void* qkv_weight = nullptr;     // [3*H*D, E]
  const void* qkv_bias = nullptr;       // [3*H*D] or null
  Mask mask;                            // data null: no mask
  const void* linear_weight = nullptr;  // [H*D, E]
  const void* linear_bias = nullptr;    // [E] or null
  const void* ln_scale = nullptr;       // [E] or null
  const void* ln_bias = nullptr;        // [E] or null

  // result
  void* out = nullptr;  // [M, E] residual_dtype

  // saved for backward, or in the workspace when nothing is saved
  uint64_t* random_state = nullptr;  // [2]: seed and offset, written by attention_forward
  void* pre_ln_mean = nullptr;       // [M] accumulator type
  void* pre_ln_rstd = nullptr;       // [M] accumulator type
  void* qkv = nullptr;               // [batch, seq_len, 3, H, D]
  void* log_sum_exp = nullptr;       // [batch, H, seq_len] accumulator type; +inf for a row that sees no key
  // [batch, H, seq_len] accumulator type: log_sum_exp is that of scores - score_shift. Scores may be so large, and a
  // float mask may put a row so far down (-1e9), that the sum of exponentials would be lost beside them. On GPUs
  // score_shift is in units of log2.
  void* score_shift = nullptr;
  void* attn_out = nullptr;  // [batch, seq_len, H, D]
  // [M, E] residual_dtype: z; with dropout and a final layer norm the normalised z, in which rounding loses less where
  // a row's mean is large
  void* residual = nullptr;
  void* ln_mean = nullptr;  // [M] accumulator type, only if residual is z
  void* ln_rstd = nullptr;  // [M] accumulator type

  // intermediates
  void* hidden = nullptr;  // [M, E]: layer-normalised x; without pre_layer_norm x itself, or what dtype holds of it
                           // (has_own_hidden)

  // gradient of the result, and of the inputs
  const void* d_out = nullptr;      // [M, E] residual_dtype
  void* d_x = nullptr;              // [M, E] residual_dtype
  void* d_pre_ln_scale = nullptr;   // [E] norm_dtype
  void* d_pre_ln_bias = nullptr;    // [E] norm_dtype
  void* d_qkv_weight = nullptr;     // [3*H*D, E]; until its time comes attention_backward may use the memory
  void* d_qkv_bias = nullptr;       // [3*H*D]
  void* d_linear_weight = nullptr;  // [H*D, E]
  void* d_linear_bias = nullptr;    // [E]
  void* d_ln_scale = nullptr;       // [E] norm_dtype
  void* d_ln_bias = nullptr;        // [E] norm_dtype

  // intermediate gradients
  void* d_residual = nullptr;  // [M, E] residual_dtype: of z; d_out itself without a final layer norm
  void* d_linear = nullptr;    // [M, E]: of attn_out @ linear_weight; d_residual itself unless has_own_d_linear
  void* d_attn_out = nullptr;  // [batch, seq_len, H, D]
  void* d_qkv = nullptr;       // [batch, seq_len, 3, H, D]
  void* d_hidden = nullptr;    // [M, E]: of hidden; only with pre_layer_norm

  // memory that the running stage may use freely; stage_workspace_bytes of the device says how much it needs
  void* stage_workspace = nullptr;

  constexpr int64_t rows() const { return batch * seq_len; }
  constexpr int64_t heads_dim() const { return num_heads * head_dim; }
  constexpr int64_t heads_in_all() const { return total_heads ? total_heads : num_heads; }
};

// The inputs, in the order of the operator: DO(Name, name) for each, separated by commas. First those that have
// gradients.
#define PFA_DIFFERENTIABLE_INPUTS(DO)                                                                 \
  DO(X, x), DO(QKVWeight, qkv_weight), DO(LinearWeight, linear_weight), DO(PreLnScale, pre_ln_scale), \
      DO(PreLnBias, pre_ln_bias), DO(LnScale, ln_scale), DO(LnBias, ln_bias), DO(QKVBias, qkv_bias),  \
      DO(LinearBias, linear_bias)
#define PFA_INPUTS(DO) PFA_DIFFERENTIABLE_INPUTS(DO), DO(AttnMask, attn_mask)

#define PFA_ENUMERATOR(Name, name) k##Name
enum Input : int { PFA_INPUTS(PFA_ENUMERATOR), kInputCount };
#undef PFA_ENUMERATOR

constexpr int kGradientCount = kAttnMask;  // the mask is constant

#define PFA_NAME(Name, name) #name
constexpr const char* kInputNames[kInputCount] = {PFA_INPUTS(PFA_NAME)};
#undef PFA_NAME

// Where Params points to an input and to its gradient.
struct InputPointers {
  const void* Params::* value;
  void* Params::* gradient;
};

#define PFA_POINTERS(Name, name) {&Params::name, &Params::d_##name}
constexpr InputPointers kInputPointers[kGradientCount] = {PFA_DIFFERENTIABLE_INPUTS(PFA_POINTERS)};
#undef PFA_POINTERS

inline bool has_output_dropout(const Params& p) { return p.dropout.threshold != 0 || p.dropout.scale != 1.0; }

// Whether the residual stream is of a wider type than the products: x, residual, out and their gradients are float32,
// the rest is 16-bit.
inline bool has_wide_residual(const Params& p) { return p.residual_dtype != p.dtype; }

// Whether hidden is memory of its own, made by layer_norm_forward or narrow_x, and not x.
inline bool has_own_hidden(const Params& p) { return p.pre_layer_norm || has_wide_residual(p); }

// Whether d_linear is memory of its own, and not d_residual.
inline bool has_own_d_linear(const Params& p) { return has_output_dropout(p) || has_wide_residual(p); }

// What the gradients asked for make necessary.
inline bool needs_d_hidden(const Params& p) {
  return p.d_x || (p.pre_layer_norm && (p.d_pre_ln_scale || p.d_pre_ln_bias));
}
inline bool needs_d_qkv(const Params& p) { return needs_d_hidden(p) || p.d_qkv_weight || p.d_qkv_bias; }
inline bool needs_d_linear(const Params& p) { return needs_d_qkv(p) || p.d_linear_weight || p.d_linear_bias; }

}  // namespace pfa
