// A block's description in Python, for both halves of the module: a dict of its kind, sizes, types and switches.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "core/inputs.h"
#include "core/params.h"

namespace pfa {

DType dtype_of(const std::string& name);

template <class P>
struct Config {
  P params;  // sizes, types and switches
  bool allow_tf32 = false;
  bool deterministic = false;
};

// Raise ValueError for an entry that is missing, unknown or not among the choices.
void parse_config(const pybind11::dict& config, Config<AttentionBlockParams>& result);
void parse_config(const pybind11::dict& config, Config<BareAttentionParams>& result);
void parse_config(const pybind11::dict& config, Config<AttentionWeightsParams>& result);
void parse_config(const pybind11::dict& config, Config<FeedForwardParams>& result);
void parse_config(const pybind11::dict& config, Config<ResidualNormParams>& result);
void parse_config(const pybind11::dict& config, Config<LinearParams>& result);

// The value of the entry "block", by default "attention".
std::string block_of(const pybind11::dict& config);
[[noreturn]] void raise_unknown_block(const std::string& name);

// Calls f with the Config of the block that the dict describes.
template <class F>
auto with_config(const pybind11::dict& config, F&& f) {
  const auto parsed = [&](auto result) {
    parse_config(config, result);
    return f(result);
  };
  const std::string block = block_of(config);
  if (block == "attention") return parsed(Config<AttentionBlockParams>{});
  if (block == "bare_attention") return parsed(Config<BareAttentionParams>{});
  if (block == "attention_weights") return parsed(Config<AttentionWeightsParams>{});
  if (block == "feed_forward") return parsed(Config<FeedForwardParams>{});
  if (block == "residual_norm") return parsed(Config<ResidualNormParams>{});
  if (block == "linear") return parsed(Config<LinearParams>{});
  raise_unknown_block(block);
}

using Sizes = std::vector<pybind11::ssize_t>;

// A differentiable input, or its gradient: an array of this name, type and shape.
template <class P>
struct ArrayOf {
  InputPointers<P> pointers;
  DType dtype;
  Sizes shape;
  bool is_required;
};

std::vector<ArrayOf<AttentionBlockParams>> arrays_of(const AttentionBlockParams& p);
std::vector<ArrayOf<BareAttentionParams>> arrays_of(const BareAttentionParams& p);
std::vector<ArrayOf<AttentionWeightsParams>> arrays_of(const AttentionWeightsParams& p);
std::vector<ArrayOf<FeedForwardParams>> arrays_of(const FeedForwardParams& p);
std::vector<ArrayOf<ResidualNormParams>> arrays_of(const ResidualNormParams& p);
std::vector<ArrayOf<LinearParams>> arrays_of(const LinearParams& p);

// The result, or its gradient.
struct ResultOf {
  DType dtype;
  Sizes shape;
};

ResultOf result_of(const AttentionBlockParams& p);
ResultOf result_of(const BareAttentionParams& p);
ResultOf result_of(const AttentionWeightsParams& p);
ResultOf result_of(const BlockParams& p);
ResultOf result_of(const LinearParams& p);

constexpr char kConfigDoc[] =
    R"(config is a dict of `block` ("attention", which is the default, "bare_attention", "attention_weights",
"feed_forward", "residual_norm" or "linear") and
dtype ("float32", "float64", "float16" or "bfloat16"); sizes (ints): attention has batch, seq_len, embed_dim,
num_heads and head_dim, and optionally num_kv_heads, and packed_rows for packed sequences; bare_attention batch,
queries, keys, num_heads, num_kv_heads and head_dim, for packed sequences packed_queries and packed_keys, and
optionally first_head, total_heads and the bools key_behind_query, value_behind_key and keys_by_head;
attention_weights the same but for packed and shared tensors;
feed_forward rows, embed_dim, hidden_dim, and
optionally first_hidden and total_hidden; residual_norm rows and embed_dim; linear rows, in_features and
out_features. Optional are residual_dtype, of x, out and their gradients (default: dtype; or float32 beside a
16-bit dtype), norm_dtype, of the layer-norm parameters (default: residual_dtype; or float32 beside a 16-bit
one), pre_layer_norm, final_layer_norm, add_residual, causal, gated, transpose_x, transpose_weight (bools),
pre_ln_epsilon, ln_epsilon, dropout_rate, attn_dropout_rate, hidden_dropout_rate (floats), activation ("none",
"relu", "gelu", "gelu_tanh" or "silu"), mode ("upscale_in_train" or "downscale_in_infer"), training, allow_tf32,
deterministic (bools), scale (float), window_left, window_right (ints), each for the blocks that have it.)";

}  // namespace pfa
