#include "pybind/config.h"

#include <cmath>
#include <map>

namespace py = pybind11;

namespace pfa {
namespace {

double checked_rate(double rate) {
  if (!(rate >= 0 && rate <= 1)) throw py::value_error("config: expected dropout rates in [0, 1]");
  return rate;
}

}  // namespace

DType dtype_of(const std::string& name) {
  static const std::map<std::string, DType> names = {{"float32", DType::kFloat32}, {"float64", DType::kFloat64},
                                                     {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16},
                                                     {"bool", DType::kBool},       {"uint8", DType::kUInt8},
                                                     {"int8", DType::kInt8},       {"int16", DType::kInt16},
                                                     {"int32", DType::kInt32},     {"int64", DType::kInt64}};
  const auto it = names.find(name);
  if (it == names.end()) throw py::value_error("dtype: expected the name of a number type, got " + name);
  return it->second;
}

namespace {

DType float_dtype_of(const char* entry, const std::string& name) {
  const DType dtype = dtype_of(name);
  if (dtype != DType::kFloat32 && dtype != DType::kFloat64 && !is_16bit_float(dtype)) {
    throw py::value_error(std::string(entry) + ": expected float32, float64, float16 or bfloat16, got " + name);
  }
  return dtype;
}

// Takes entries out of a dict; in the end none may be left.
class Reader {
 public:
  explicit Reader(const py::dict& config) {
    for (const auto& item : config) {
      left_[item.first.cast<std::string>()] = py::reinterpret_borrow<py::object>(item.second);
    }
    left_.erase("block");
  }

  template <class T>
  bool take(const char* name, T& value) {
    const auto it = left_.find(name);
    if (it == left_.end()) return false;
    value = it->second.cast<T>();
    left_.erase(it);
    return true;
  }

  template <class T>
  void require(const char* name, T& value) {
    if (!take(name, value)) throw py::value_error(std::string("config: expected an entry ") + name);
  }

  // The dropout of the rate of this name.
  Dropout dropout(const char* name) {
    double rate = 0.0;
    take(name, rate);
    return dropout_of(checked_rate(rate), training_, upscales_);
  }

  // What all dropouts share: to be called before these are read.
  void read_mode() {
    std::string mode = "upscale_in_train";
    take("mode", mode);
    take("training", training_);
    if (mode != "upscale_in_train" && mode != "downscale_in_infer") {
      throw py::value_error("mode: expected upscale_in_train or downscale_in_infer, got " + mode);
    }
    upscales_ = mode == "upscale_in_train";
  }

  void read_activation(Activation& activation) {
    static const std::map<std::string, Activation> names = {{"none", Activation::kNone},
                                                            {"relu", Activation::kRelu},
                                                            {"gelu", Activation::kGelu},
                                                            {"gelu_tanh", Activation::kGeluTanh},
                                                            {"silu", Activation::kSilu}};
    std::string name;
    if (!take("activation", name)) return;
    const auto it = names.find(name);
    if (it == names.end()) throw py::value_error("activation: expected the name of an activation, got " + name);
    activation = it->second;
  }

  template <class P>
  void finish(Config<P>& result) {
    take("allow_tf32", result.allow_tf32);
    take("deterministic", result.deterministic);
    if (!left_.empty()) throw py::value_error("config: unknown entry " + left_.begin()->first);
  }

 private:
  std::map<std::string, py::object> left_;
  bool training_ = true;
  bool upscales_ = true;
};

// What all blocks of a transformer layer have.
void read_block(Reader& reader, BlockParams& p) {
  reader.require("embed_dim", p.embed_dim);
  std::string dtype, residual_dtype, norm_dtype;
  reader.require("dtype", dtype);
  p.dtype = float_dtype_of("dtype", dtype);
  p.residual_dtype =
      reader.take("residual_dtype", residual_dtype) ? float_dtype_of("residual_dtype", residual_dtype) : p.dtype;
  p.norm_dtype = reader.take("norm_dtype", norm_dtype) ? float_dtype_of("norm_dtype", norm_dtype) : p.residual_dtype;
  if (has_wide_residual(p) && !(p.residual_dtype == DType::kFloat32 && is_16bit_float(p.dtype))) {
    throw py::value_error("residual_dtype: expected dtype, or float32 beside a 16-bit dtype, got " + residual_dtype +
                          " beside " + dtype);
  }
  if (p.norm_dtype != p.residual_dtype && !(p.norm_dtype == DType::kFloat32 && is_16bit_float(p.residual_dtype))) {
    throw py::value_error("norm_dtype: expected residual_dtype, or float32 beside a 16-bit residual_dtype, got " +
                          norm_dtype);
  }
  reader.take("final_layer_norm", p.final_layer_norm);
  reader.take("add_residual", p.add_residual);
  reader.take("ln_epsilon", p.ln_epsilon);
  reader.read_mode();
  p.dropout = reader.dropout("dropout_rate");
}

void read_first_norm(Reader& reader, BlockParams& p) {
  reader.take("pre_layer_norm", p.pre_layer_norm);
  reader.take("pre_ln_epsilon", p.pre_ln_epsilon);
}

// The arrays of a block whose inputs' types and shapes are asked for one by one.
template <class P, size_t kCount, class F>
std::vector<ArrayOf<P>> arrays(const InputPointers<P> (&inputs)[kCount], F&& describe) {
  std::vector<ArrayOf<P>> result;
  for (size_t i = 0; i < kCount; ++i) {
    ArrayOf<P> array{inputs[i], DType::kFloat32, {}, false};
    describe(static_cast<int>(i), array);
    result.push_back(std::move(array));
  }
  return result;
}

}  // namespace

std::string block_of(const py::dict& config) {
  return config.contains("block") ? config["block"].cast<std::string>() : "attention";
}

void raise_unknown_block(const std::string& name) {
  throw py::value_error(
      "block: expected attention, bare_attention, attention_weights, feed_forward, residual_norm or linear, got " +
      name);
}

void parse_config(const py::dict& config, Config<AttentionBlockParams>& result) {
  Reader reader(config);
  AttentionBlockParams& p = result.params;
  reader.require("batch", p.batch);
  reader.require("seq_len", p.seq_len);
  p.rows = p.batch * p.seq_len;
  reader.require("num_heads", p.num_heads);
  reader.require("head_dim", p.head_dim);
  p.num_kv_heads = p.num_heads;
  reader.take("num_kv_heads", p.num_kv_heads);
  if (p.num_kv_heads < 1 || p.num_heads % p.num_kv_heads != 0) {
    throw py::value_error("num_kv_heads: expected a divisor of num_heads");
  }
  reader.take("packed_rows", p.rows);
  read_block(reader, p);
  read_first_norm(reader, p);
  p.scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  reader.take("scale", p.scale);
  reader.take("causal", p.causal);
  reader.take("window_left", p.window_left);
  reader.take("window_right", p.window_right);
  p.attn_dropout = reader.dropout("attn_dropout_rate");
  reader.finish(result);
}

namespace {

// What attention has by itself and where its weights are asked for.
void read_attention(Reader& reader, BareAttentionParams& bare) {
  AttentionParams& p = bare.attention;
  reader.require("batch", p.batch);
  reader.require("queries", p.queries);
  reader.require("keys", p.keys);
  reader.require("num_heads", p.num_heads);
  reader.require("num_kv_heads", p.num_kv_heads);
  reader.require("head_dim", p.head_dim);
  if (p.num_kv_heads < 1 || p.num_heads % p.num_kv_heads != 0) {
    throw py::value_error("num_kv_heads: expected a divisor of num_heads");
  }
  reader.take("keys_by_head", bare.keys_by_head);
  reader.take("first_head", p.first_head);
  reader.take("total_heads", p.total_heads);
  std::string dtype;
  reader.require("dtype", dtype);
  p.dtype = float_dtype_of("dtype", dtype);
  p.scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  reader.take("scale", p.scale);
  reader.take("causal", p.causal);
  reader.take("window_left", p.window_left);
  reader.take("window_right", p.window_right);
  reader.read_mode();
  p.dropout = reader.dropout("dropout_rate");
}

}  // namespace

void parse_config(const py::dict& config, Config<BareAttentionParams>& result) {
  Reader reader(config);
  AttentionParams& p = result.params.attention;
  read_attention(reader, result.params);
  reader.take("key_behind_query", result.params.key_behind_query);
  reader.take("value_behind_key", result.params.value_behind_key);
  reader.take("packed_queries", p.packed_queries);
  reader.take("packed_keys", p.packed_keys);
  reader.finish(result);
}

void parse_config(const py::dict& config, Config<AttentionWeightsParams>& result) {
  Reader reader(config);
  read_attention(reader, result.params);
  reader.finish(result);
}

void parse_config(const py::dict& config, Config<FeedForwardParams>& result) {
  Reader reader(config);
  FeedForwardParams& p = result.params;
  reader.require("rows", p.rows);
  reader.require("hidden_dim", p.hidden_dim);
  reader.take("first_hidden", p.first_hidden);
  reader.take("total_hidden", p.total_hidden);
  read_block(reader, p);
  read_first_norm(reader, p);
  reader.take("gated", p.gated);
  reader.read_activation(p.activation);
  if (p.activation == Activation::kNone) throw py::value_error("activation: expected one, got none");
  p.hidden_dropout = reader.dropout("hidden_dropout_rate");
  reader.finish(result);
}

void parse_config(const py::dict& config, Config<ResidualNormParams>& result) {
  Reader reader(config);
  ResidualNormParams& p = result.params;
  reader.require("rows", p.rows);
  read_block(reader, p);
  if (has_wide_residual(p)) throw py::value_error("residual_dtype: expected dtype");
  reader.finish(result);
}

void parse_config(const py::dict& config, Config<LinearParams>& result) {
  Reader reader(config);
  LinearParams& p = result.params;
  reader.require("rows", p.rows);
  reader.require("in_features", p.in_features);
  reader.require("out_features", p.out_features);
  std::string dtype;
  reader.require("dtype", dtype);
  p.dtype = float_dtype_of("dtype", dtype);
  reader.take("transpose_x", p.transpose_x);
  reader.take("transpose_weight", p.transpose_weight);
  reader.read_activation(p.activation);
  reader.finish(result);
}

std::vector<ArrayOf<AttentionBlockParams>> arrays_of(const AttentionBlockParams& p) {
  using namespace attention;
  return arrays(kInputs, [&](int input, ArrayOf<AttentionBlockParams>& array) {
    array.dtype = p.dtype;
    array.shape = {p.embed_dim};
    switch (input) {
      case kX:
        array.dtype = p.residual_dtype;
        array.shape = result_of(p).shape;
        array.is_required = true;
        break;
      case kQKVWeight:
        array.shape = {3, p.num_heads, p.head_dim, p.embed_dim};
        if (p.num_kv_heads != p.num_heads) {
          array.shape = {p.num_heads + 2 * p.num_kv_heads, p.head_dim, p.embed_dim};
        }
        array.is_required = true;
        break;
      case kLinearWeight:
        array.shape = {p.heads_dim(), p.embed_dim};
        array.is_required = true;
        break;
      case kQKVBias:
        array.shape = {3, p.num_heads, p.head_dim};
        if (p.num_kv_heads != p.num_heads) array.shape = {p.num_heads + 2 * p.num_kv_heads, p.head_dim};
        break;
      case kPreLnScale:
      case kPreLnBias:
      case kLnScale:
      case kLnBias:
        array.dtype = p.norm_dtype;
        break;
      default:
        break;
    }
  });
}

std::vector<ArrayOf<BareAttentionParams>> arrays_of(const BareAttentionParams& p) {
  using namespace bare_attention;
  const AttentionParams& a = p.attention;
  return arrays(kInputs, [&](int input, ArrayOf<BareAttentionParams>& array) {
    array.dtype = a.dtype;
    if (input == kAttnMask) return;  // has its own
    array.is_required = input == kQuery || (input == kKey ? !p.key_behind_query : !p.value_behind_key);
    const int64_t keys_heads = (input == kKey && p.value_behind_key ? 2 : 1) * a.num_kv_heads;
    if (input == kQuery) {
      array.shape = result_of(p).shape;
      if (p.key_behind_query) array.shape[array.shape.size() - 2] += (p.value_behind_key ? 2 : 1) * a.num_kv_heads;
    } else if (a.packed_queries) {
      array.shape = {a.packed_keys, keys_heads, a.head_dim};
    } else if (p.keys_by_head) {
      array.shape = {a.batch, keys_heads, a.keys, a.head_dim};
    } else {
      array.shape = {a.batch, a.keys, keys_heads, a.head_dim};
    }
  });
}

std::vector<ArrayOf<AttentionWeightsParams>> arrays_of(const AttentionWeightsParams& p) {
  using namespace attention_weights;
  const AttentionParams& a = p.attention;
  return arrays(kInputs, [&](int input, ArrayOf<AttentionWeightsParams>& array) {
    array.dtype = a.dtype;
    if (input == kAttnMask) return;  // has its own
    array.is_required = true;
    if (input == kQuery) {
      array.shape = {a.batch, a.queries, a.num_heads, a.head_dim};
    } else if (p.keys_by_head) {
      array.shape = {a.batch, a.num_kv_heads, a.keys, a.head_dim};
    } else {
      array.shape = {a.batch, a.keys, a.num_kv_heads, a.head_dim};
    }
  });
}

std::vector<ArrayOf<FeedForwardParams>> arrays_of(const FeedForwardParams& p) {
  using namespace feed_forward;
  return arrays(kInputs, [&](int input, ArrayOf<FeedForwardParams>& array) {
    array.dtype = p.dtype;
    array.shape = {p.embed_dim};
    switch (input) {
      case kX:
        array.dtype = p.residual_dtype;
        array.shape = {p.rows, p.embed_dim};
        array.is_required = true;
        break;
      case kLinear1Weight:
        array.shape = {p.embed_dim, p.linear1_dim()};
        array.is_required = true;
        break;
      case kLinear2Weight:
        array.shape = {p.hidden_dim, p.embed_dim};
        array.is_required = true;
        break;
      case kLinear1Bias:
        array.shape = {p.linear1_dim()};
        break;
      case kLinear2Bias:
        break;
      default:
        array.dtype = p.norm_dtype;
        break;
    }
  });
}

std::vector<ArrayOf<ResidualNormParams>> arrays_of(const ResidualNormParams& p) {
  using namespace residual_norm;
  return arrays(kInputs, [&](int input, ArrayOf<ResidualNormParams>& array) {
    const bool is_row = input == kX || input == kResidual;
    array.dtype = is_row || input == kBias ? p.dtype : p.norm_dtype;
    array.shape = is_row ? Sizes{p.rows, p.embed_dim} : Sizes{p.embed_dim};
    array.is_required = input == kX || (input == kResidual && p.add_residual);
  });
}

std::vector<ArrayOf<LinearParams>> arrays_of(const LinearParams& p) {
  using namespace linear;
  const auto matrix = [](bool transposes, int64_t rows, int64_t columns) {
    return transposes ? Sizes{columns, rows} : Sizes{rows, columns};
  };
  return arrays(kInputs, [&](int input, ArrayOf<LinearParams>& array) {
    array.dtype = p.dtype;
    array.shape = input == kX        ? matrix(p.transpose_x, p.rows, p.in_features)
                  : input == kWeight ? matrix(p.transpose_weight, p.in_features, p.out_features)
                                     : Sizes{p.out_features};
    array.is_required = input != kBias;
  });
}

ResultOf result_of(const AttentionBlockParams& p) {
  if (p.rows != p.batch * p.seq_len) return {p.residual_dtype, {p.rows, p.embed_dim}};
  return {p.residual_dtype, {p.batch, p.seq_len, p.embed_dim}};
}
ResultOf result_of(const BareAttentionParams& p) {
  const AttentionParams& a = p.attention;
  if (a.packed_queries) return {a.dtype, {a.packed_queries, a.num_heads, a.head_dim}};
  return {a.dtype, {a.batch, a.queries, a.num_heads, a.head_dim}};
}
ResultOf result_of(const AttentionWeightsParams& p) {
  const AttentionParams& a = p.attention;
  return {a.dtype, {a.batch, a.num_heads, a.queries, a.keys}};
}
ResultOf result_of(const BlockParams& p) { return {p.residual_dtype, {p.rows, p.embed_dim}}; }
ResultOf result_of(const LinearParams& p) { return {p.dtype, {p.rows, p.out_features}}; }

}  // namespace pfa
