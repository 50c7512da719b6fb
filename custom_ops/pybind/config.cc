#include "pybind/config.h"

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

}  // namespace

Config parse_config(const py::dict& config) {
  std::map<std::string, py::object> left;
  for (const auto& item : config)
    left[item.first.cast<std::string>()] = py::reinterpret_borrow<py::object>(item.second);
  const auto take = [&](const char* name, auto& value) {
    const auto it = left.find(name);
    if (it == left.end()) return false;
    value = it->second.cast<std::decay_t<decltype(value)>>();
    left.erase(it);
    return true;
  };
  const auto require = [&](const char* name, auto& value) {
    if (!take(name, value)) throw py::value_error(std::string("config: expected an entry ") + name);
  };
  Config result;
  AttentionParams& p = result.params;
  require("batch", p.batch);
  require("seq_len", p.seq_len);
  require("embed_dim", p.embed_dim);
  require("num_heads", p.num_heads);
  require("head_dim", p.head_dim);
  std::string dtype, residual_dtype, norm_dtype, mode = "upscale_in_train";
  require("dtype", dtype);
  p.dtype = float_dtype_of("dtype", dtype);
  p.residual_dtype =
      take("residual_dtype", residual_dtype) ? float_dtype_of("residual_dtype", residual_dtype) : p.dtype;
  p.norm_dtype = take("norm_dtype", norm_dtype) ? float_dtype_of("norm_dtype", norm_dtype) : p.residual_dtype;
  if (has_wide_residual(p) && !(p.residual_dtype == DType::kFloat32 && is_16bit_float(p.dtype))) {
    throw py::value_error("residual_dtype: expected dtype, or float32 beside a 16-bit dtype, got " + residual_dtype +
                          " beside " + dtype);
  }
  if (p.norm_dtype != p.residual_dtype && !(p.norm_dtype == DType::kFloat32 && is_16bit_float(p.residual_dtype))) {
    throw py::value_error("norm_dtype: expected residual_dtype, or float32 beside a 16-bit residual_dtype, got " +
                          norm_dtype);
  }
  take("pre_layer_norm", p.pre_layer_norm);
  take("final_layer_norm", p.final_layer_norm);
  take("add_residual", p.add_residual);
  take("causal", p.causal);
  take("pre_ln_epsilon", p.pre_ln_epsilon);
  take("ln_epsilon", p.ln_epsilon);
  double rate = 0.0, attn_rate = 0.0;
  bool training = true;
  take("dropout_rate", rate);
  take("attn_dropout_rate", attn_rate);
  take("mode", mode);
  take("training", training);
  if (mode != "upscale_in_train" && mode != "downscale_in_infer") {
    throw py::value_error("mode: expected upscale_in_train or downscale_in_infer, got " + mode);
  }
  p.dropout = dropout_of(checked_rate(rate), training, mode == "upscale_in_train");
  p.attn_dropout = dropout_of(checked_rate(attn_rate), training, mode == "upscale_in_train");
  take("allow_tf32", result.allow_tf32);
  take("deterministic", result.deterministic);
  if (!left.empty()) throw py::value_error("config: unknown entry " + left.begin()->first);
  return result;
}

}  // namespace pfa
