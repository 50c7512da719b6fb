// The blocks as plain structs: sizes, switches, and the pointers of every stage.
//
// Bindings fill the sizes, switches, inputs and outputs; the block's header (attention_block.h and its like) places
// what is saved for backward and the workspace; stages read what they need. All tensors are dense and row-major, in the
// memory of the device that runs the block. M = rows, E = embed_dim, H = num_heads, D = head_dim, F = hidden_dim. A
// pointer that is null is an absent input or a gradient that nobody reads.
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

// What stands between two products, or behind one.
enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// Stages whose workspace may lie in the same memory. Backward: the residual and the second product; attention; and the
// first product and the first layer norm.
enum class Phase { kForward, kOutputBackward, kAttentionBackward, kInputBackward };

// A float mask is added to the scores; of bool and integer masks an element that is 0 hides its key. (b, h, i, j) lies
// at data + b*strides[0] + h*strides[1] + i*strides[2] + j*strides[3], counted in elements; 0 where it broadcasts.
struct Mask {
  const void* data = nullptr;
  DType dtype = DType::kBool;
  int64_t strides[4] = {0, 0, 0, 0};
};

// What the blocks have in common: [layer norm] -> ... -> y -> bias + dropout + residual [+ layer norm].
struct BlockParams {
  // sizes
  int64_t rows = 0;
  int64_t embed_dim = 0;

  // types
  DType dtype = DType::kFloat32;  // weights, their biases, all activations but these, and their gradients
  DType residual_dtype =
      DType::kFloat32;                 // x, residual, out, and their gradients: dtype, or float32 beside a 16-bit one
  DType norm_dtype = DType::kFloat32;  // layer-norm scales and biases, and their gradients: residual_dtype or float32

  // switches
  bool pre_layer_norm = false;
  bool final_layer_norm = true;
  bool add_residual = true;
  bool has_arranged_weights = false;  // arranged_weights.h: on the CPU, and without gradients
  double pre_ln_epsilon = 1e-5;
  double ln_epsilon = 1e-5;
  Dropout dropout;
  // The seed of the dropout masks (philox.h) in the forward pass; backward finds it in random_state.
  uint64_t seed = 0;
  uint64_t offset = 0;

  // inputs
  const void* x = nullptr;             // [M, E] residual_dtype
  const void* pre_ln_scale = nullptr;  // [E] or null
  const void* pre_ln_bias = nullptr;   // [E] or null
  const void* linear_bias = nullptr;   // [E] or null: that of y
  const void* ln_scale = nullptr;      // [E] or null
  const void* ln_bias = nullptr;       // [E] or null

  // result
  void* out = nullptr;  // [M, E] residual_dtype

  // saved for backward, or in the workspace when nothing is saved
  uint64_t* random_state = nullptr;  // [2]: seed and offset, written by the first stage that drops something
  void* pre_ln_mean = nullptr;       // [M] accumulator type
  void* pre_ln_rstd = nullptr;       // [M] accumulator type
  // [M, E] residual_dtype: z; with dropout and a final layer norm the normalised z, in which rounding loses less where
  // a row's mean is large
  void* residual = nullptr;
  void* ln_mean = nullptr;  // [M] accumulator type, only if residual is z
  void* ln_rstd = nullptr;  // [M] accumulator type

  // intermediates
  void* hidden = nullptr;   // [M, E]: layer-normalised x; without pre_layer_norm x itself, or what dtype holds of it
                            // (has_own_hidden)
  const void* y = nullptr;  // [M, E] residual_dtype: may be residual itself

  // gradient of the result, and of the inputs
  const void* d_out = nullptr;     // [M, E] residual_dtype
  void* d_x = nullptr;             // [M, E] residual_dtype
  void* d_pre_ln_scale = nullptr;  // [E] norm_dtype
  void* d_pre_ln_bias = nullptr;   // [E] norm_dtype
  void* d_linear_bias = nullptr;   // [E]
  void* d_ln_scale = nullptr;      // [E] norm_dtype
  void* d_ln_bias = nullptr;       // [E] norm_dtype

  // intermediate gradients
  void* d_residual = nullptr;  // [M, E] residual_dtype: of z; d_out itself without a final layer norm
  void* d_linear = nullptr;    // [M, E]: of y; d_residual itself unless has_own_d_linear
  void* d_hidden = nullptr;    // [M, E]: of hidden; only with pre_layer_norm

  // memory that the running stage may use freely; stage_workspace_bytes of the device says how much it needs
  void* stage_workspace = nullptr;
};

// The most numbers of a head that the GPU's kernels take.
constexpr int64_t kMaxHeadDimOnGpu = 256;

// Where the numbers of heads lie: the head_dim numbers of head h of token t of sequence b begin at data + b *
// batch_stride + t * token_stride + h * head_stride, counted in elements. Data is void or const void.
template <class Data>
struct Heads {
  Data* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// Ranges of queries that a key is hidden from (flash mask): [batch, H', keys, columns], dense in the last two. H' is
// num_kv_heads, or 1 with a head_stride of 0.
struct ColumnRanges {
  const int32_t* data = nullptr;
  // 1: hidden are the queries from column 0 on. 2: from column 0 on, and those before column 1; or, `between`, those
  // from column 0 on that are before column 1. 4: the latter, and from column 2 on those before column 3.
  int columns = 0;
  bool between = false;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
};

// Attention by itself. T, queries of all sequences, is batch * queries, or query_starts[batch] where these are packed.
struct AttentionParams {
  // sizes
  int64_t batch = 0;         // sequences
  int64_t queries = 0;       // of a sequence; of packed ones, of the longest
  int64_t keys = 0;          // likewise
  int64_t num_heads = 0;     // H, of queries
  int64_t num_kv_heads = 0;  // of keys and values; query head h reads head h / (H / num_kv_heads)
  int64_t head_dim = 0;
  // Where heads are spread over devices, the number of the first head here and of all heads, by which dropout counts.
  // total_heads 0: these are all.
  int64_t first_head = 0;
  int64_t total_heads = 0;
  int64_t packed_queries = 0;  // T, where sequences are packed
  int64_t packed_keys = 0;     // likewise, of keys

  // types
  DType dtype = DType::kFloat32;

  // switches
  double scale = 1.0;   // of scores
  bool causal = false;  // query i sees no key after i + keys - queries
  // How many keys before and after that one a query sees; -1: all.
  int64_t window_left = -1;
  int64_t window_right = -1;
  Dropout dropout;
  uint64_t seed = 0;
  uint64_t offset = 0;

  // inputs
  Heads<const void> query;
  Heads<const void> key;
  Heads<const void> value;
  Mask mask;                   // data null: no mask
  ColumnRanges hidden_ranges;  // data null: none
  // [batch + 1] each, or both null. Of packed sequences, which follow each other without padding: where each begins,
  // and where the last one ends. batch_stride is 0.
  const int32_t* query_starts = nullptr;
  const int32_t* key_starts = nullptr;

  // result
  Heads<void> out;
  // [batch, H, queries, keys], not of packed sequences: the weights of the values, after dropout. Only
  // attention_weights writes them.
  void* weights = nullptr;

  // saved for backward, or null when nothing is saved
  uint64_t* random_state = nullptr;  // [2]: seed and offset
  // [batch, H, queries] accumulator type, packed [H, T]; +inf for a row that sees no key
  void* log_sum_exp = nullptr;
  // As log_sum_exp, which is that of scores - score_shift. Scores may be so large, and a float mask may put a row so
  // far down (-1e9), that the sum of exponentials would be lost beside them. On GPUs score_shift is in units of log2.
  void* score_shift = nullptr;
  // [batch, H, queries, residue_words(D)], packed [H, T, ..]: what rounding took from an `out` of 16 bits; or null.
  // Backward sums up out * d_out: what is left of that where all ought to cancel is multiplied by what all keys have in
  // common.
  uint32_t* out_residue = nullptr;

  // gradients; their heads lie as those of what they belong to may lie
  Heads<const void> d_out;
  // As weights. `of_weights`: this is the gradient that is given, beside which weights are read, and there are no d_out
  // and d_value.
  const void* d_weights = nullptr;
  bool of_weights = false;
  Heads<void> d_query;
  Heads<void> d_key;
  Heads<void> d_value;
  void* d_mask = nullptr;  // of a float mask, in the mask's own dense shape
  // [H + 2 * num_kv_heads, D]: sums of d_query, d_key and d_value over all tokens, where these lie beside each other
  // so. On GPUs only.
  void* d_qkv_bias = nullptr;

  // memory that the backward pass may use beside its workspace, and whose values are lost
  void* spare = nullptr;
  size_t spare_bytes = 0;

  void* stage_workspace = nullptr;

  constexpr int64_t heads_in_all() const { return total_heads ? total_heads : num_heads; }
  constexpr int64_t queries_in_all() const { return query_starts ? packed_queries : batch * queries; }
};

// The attention block. C = (H + 2 * num_kv_heads) * D, the numbers of query, key and value of a token.
struct AttentionBlockParams : BlockParams {
  // sizes; rows is batch * seq_len, or starts[batch]
  int64_t batch = 0;
  int64_t seq_len = 0;  // of packed sequences, of the longest
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  // As in AttentionParams.
  int64_t first_head = 0;
  int64_t total_heads = 0;

  // switches, as in AttentionParams
  double scale = 1.0;
  bool causal = false;
  int64_t window_left = -1;
  int64_t window_right = -1;
  Dropout attn_dropout;

  // inputs
  const void* qkv_weight = nullptr;     // [C, E]
  const void* qkv_bias = nullptr;       // [C] or null
  const void* attn_mask = nullptr;      // of `mask`, or null
  Mask mask;                            // but for its data
  const void* linear_weight = nullptr;  // [H*D, E]
  const int32_t* starts = nullptr;      // [batch + 1] of packed sequences, as query_starts in AttentionParams; or null

  // saved for backward, or in the workspace when nothing is saved
  void* qkv = nullptr;              // [M, H + 2 * num_kv_heads, D]
  void* log_sum_exp = nullptr;      // as in AttentionParams
  void* score_shift = nullptr;      // likewise
  void* attn_out = nullptr;         // [M, H, D]
  uint32_t* out_residue = nullptr;  // as in AttentionParams; of 16-bit types

  // gradients of the inputs
  void* d_qkv_weight = nullptr;     // [C, E]; until its time comes attention_backward may use the memory
  void* d_qkv_bias = nullptr;       // [C]
  void* d_attn_mask = nullptr;      // as d_mask in AttentionParams
  void* d_linear_weight = nullptr;  // [H*D, E]

  // intermediate gradients
  void* d_attn_out = nullptr;  // [M, H, D]
  void* d_qkv = nullptr;       // [M, H + 2 * num_kv_heads, D]

  constexpr int64_t heads_dim() const { return num_heads * head_dim; }
  constexpr int64_t qkv_dim() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

// The feed-forward block.
struct FeedForwardParams : BlockParams {
  // sizes
  int64_t hidden_dim = 0;
  // In a layer whose hidden numbers are spread over devices, the first one here and how many there are in all, by which
  // dropout counts. total_hidden 0: these are all.
  int64_t first_hidden = 0;
  int64_t total_hidden = 0;

  // switches
  Activation activation = Activation::kRelu;
  bool gated = false;  // the first product has two halves of columns, [2F]: activation(first half) * second half
  Dropout hidden_dropout;

  // inputs
  const void* linear1_weight = nullptr;  // [E, F], gated [E, 2F]
  const void* linear1_bias = nullptr;    // [F], gated [2F], or null
  const void* linear2_weight = nullptr;  // [F, E]

  // one of them is saved for backward (saves_activated)
  void* pre_activation = nullptr;  // [M, F], gated [M, 2F]: the first product with its bias; null: not wanted
  void* activated = nullptr;       // [M, F]: after dropout, what the second product multiplies

  // gradients of the inputs
  void* d_linear1_weight = nullptr;  // [E, F], gated [E, 2F]
  void* d_linear1_bias = nullptr;    // [F], gated [2F]
  void* d_linear2_weight = nullptr;  // [F, E]

  // intermediate gradient
  void* d_pre_activation = nullptr;  // [M, F], gated [M, 2F]

  constexpr int64_t linear1_dim() const { return gated ? 2 * hidden_dim : hidden_dim; }
  constexpr int64_t hidden_in_all() const { return total_hidden ? total_hidden : hidden_dim; }
};

// Bias, dropout, residual and layer norm by themselves: y is an input. Types are those of BlockParams with dtype =
// residual_dtype.
struct ResidualNormParams : BlockParams {
  void* d_y = nullptr;  // [M, E]
};

// A linear layer by itself: out = activation(x @ weight + bias). dtype is that of all tensors.
struct LinearParams {
  int64_t rows = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
  DType dtype = DType::kFloat32;
  bool transpose_x = false;           // x is stored [in_features, M]
  bool transpose_weight = false;      // weight is stored [out_features, in_features]
  bool has_arranged_weights = false;  // arranged_weights.h: on the CPU, and without gradients
  Activation activation = Activation::kNone;

  const void* x = nullptr;       // [M, in_features]
  const void* weight = nullptr;  // [in_features, out_features]
  const void* bias = nullptr;    // [out_features] or null
  void* out = nullptr;           // [M, out_features]

  // saved for backward where there is an activation; null: not wanted
  void* pre_activation = nullptr;  // [M, out_features]

  const void* d_out = nullptr;  // [M, out_features]
  void* d_x = nullptr;          // as x
  void* d_weight = nullptr;     // as weight
  void* d_bias = nullptr;       // [out_features]

  void* d_pre_activation = nullptr;  // [M, out_features]; without an activation d_out itself

  void* stage_workspace = nullptr;
};

inline bool has_output_dropout(const BlockParams& p) { return p.dropout.threshold != 0 || p.dropout.scale != 1.0; }

// Whether the residual stream is of a wider type than the products: x, residual, out and their gradients are float32,
// the rest is 16-bit.
inline bool has_wide_residual(const BlockParams& p) { return p.residual_dtype != p.dtype; }

// Whether hidden is memory of its own, made by layer_norm_forward or narrow_x, and not x.
inline bool has_own_hidden(const BlockParams& p) { return p.pre_layer_norm || has_wide_residual(p); }

// Whether d_linear is memory of its own, and not d_residual.
inline bool has_own_d_linear(const BlockParams& p) { return has_output_dropout(p) || has_wide_residual(p); }

// What the gradients asked for make necessary.
inline bool needs_d_hidden(const BlockParams& p) {
  return p.d_x || (p.pre_layer_norm && (p.d_pre_ln_scale || p.d_pre_ln_bias));
}
inline bool needs_d_qkv(const AttentionBlockParams& p) {
  return needs_d_hidden(p) || p.d_qkv_weight || p.d_qkv_bias || p.d_attn_mask;
}
inline bool needs_d_linear(const AttentionBlockParams& p) {
  return needs_d_qkv(p) || p.d_linear_weight || p.d_linear_bias;
}

inline bool needs_d_pre_activation(const FeedForwardParams& p) {
  return needs_d_hidden(p) || p.d_linear1_weight || p.d_linear1_bias;
}
inline bool needs_d_linear(const FeedForwardParams& p) {
  return needs_d_pre_activation(p) || p.d_linear2_weight || p.d_linear_bias;
}

// Whether backward reads the hidden activations themselves and not what they are made of: of relu's, those that are not
// 0 tell where its gradient, and dropout's, is not 0.
inline bool saves_activated(const FeedForwardParams& p) { return p.activation == Activation::kRelu && !p.gated; }

}  // namespace pfa
