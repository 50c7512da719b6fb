// A block's description in Python, for both halves of the module: a dict of sizes, types and switches.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "core/params.h"

namespace pfa {

DType dtype_of(const std::string& name);

struct Config {
  AttentionParams params;  // sizes, types and switches
  bool allow_tf32 = false;
  bool deterministic = false;
};

// Raises ValueError for an entry that is missing, unknown or not among the choices.
Config parse_config(const pybind11::dict& config);

constexpr char kConfigDoc[] =
    R"(config is a dict of batch, seq_len, embed_dim, num_heads, head_dim (ints), dtype ("float32", "float64",
"float16" or "bfloat16"), and optionally residual_dtype, of x, out and their gradients (default: dtype; or
float32 beside a 16-bit dtype), norm_dtype, of the layer-norm parameters (default: residual_dtype; or float32
beside a 16-bit one), pre_layer_norm, final_layer_norm, add_residual, causal (bools), pre_ln_epsilon,
ln_epsilon, dropout_rate, attn_dropout_rate (floats), mode ("upscale_in_train" or "downscale_in_infer"),
training, allow_tf32, deterministic (bools).)";

}  // namespace pfa
