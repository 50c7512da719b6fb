#include "checks.h"

#include <stdexcept>
#include <string>

namespace pfa::op {
namespace {

std::string text(const Shape& shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + "]";
}

std::string text(paddle::DataType dtype) {
  switch (dtype) {
    case paddle::DataType::FLOAT32:
      return "float32";
    case paddle::DataType::FLOAT64:
      return "float64";
    case paddle::DataType::FLOAT16:
      return "float16";
    case paddle::DataType::BFLOAT16:
      return "bfloat16";
    case paddle::DataType::BOOL:
      return "bool";
    case paddle::DataType::UINT8:
      return "uint8";
    case paddle::DataType::INT8:
      return "int8";
    case paddle::DataType::INT16:
      return "int16";
    case paddle::DataType::INT32:
      return "int32";
    case paddle::DataType::INT64:
      return "int64";
    default:
      return "dtype number " + std::to_string(static_cast<int>(dtype));
  }
}

[[noreturn]] void fail(const char* kind, Input input, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string("[custom_fused_attention] ") + kind + ": " + kInputNames[input] + ": expected " + expected + ", got " + got);
}

bool agree(int64_t expected, int64_t got) { return expected == got || expected < 0 || got < 0; }

bool agree(const Shape& expected, const Shape& got) {
  if (expected.size() != got.size()) return false;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!agree(expected[i], got[i])) return false;
  }
  return true;
}

bool is_float(paddle::DataType dtype) {
  return dtype == paddle::DataType::FLOAT32 || dtype == paddle::DataType::FLOAT64 || dtype == paddle::DataType::FLOAT16 ||
         dtype == paddle::DataType::BFLOAT16;
}

}  // namespace

void check_shapes(const std::array<const Shape*, kInputs>& shapes, const Attributes& attributes) {
  const Shape& x = *shapes[kX];
  if (x.size() != 3) fail("ValueError", kX, "shape [batch, seq_len, embed_dim]", text(x));
  const int64_t embed_dim = x[2];
  const std::string for_x = " for x of shape " + text(x);
  if (embed_dim == 0) fail("ValueError", kX, "embed_dim of at least 1", text(x));

  const Shape& weight = *shapes[kQkvWeight];
  if (weight.size() != 4 || !agree(3, weight[0]) || !agree(embed_dim, weight[3])) {
    fail("ValueError", kQkvWeight, "shape [3, num_heads, head_dim, " + std::to_string(embed_dim) + "]" + for_x, text(weight));
  }
  const int64_t num_heads = weight[1];
  const int64_t head_dim = weight[2];
  if (num_heads >= 0 && head_dim >= 0 && !agree(embed_dim, num_heads * head_dim)) {
    fail("ValueError", kQkvWeight,
         "shape [3, num_heads, head_dim, " + std::to_string(embed_dim) + "] with num_heads * head_dim = " +
             std::to_string(embed_dim) + for_x,
         text(weight));
  }
  const std::string for_weight = for_x + " and qkv_weight of shape " + text(weight);
  const auto check = [&](Input input, const Shape& expected) {
    if (attributes.has(input) && !agree(expected, *shapes[input])) {
      fail("ValueError", input, "shape " + text(expected) + for_weight, text(*shapes[input]));
    }
  };
  check(kLinearWeight, {embed_dim, embed_dim});
  check(kPreLnScale, {embed_dim});
  check(kPreLnBias, {embed_dim});
  check(kLnScale, {embed_dim});
  check(kLnBias, {embed_dim});
  check(kQkvBias, {3, num_heads, head_dim});
  check(kLinearBias, {embed_dim});

  if (!attributes.has(kAttnMask)) return;
  const Shape& mask = *shapes[kAttnMask];
  const Shape scores{x[0], num_heads, x[1], x[1]};
  bool broadcasts = mask.size() <= 4;
  for (size_t i = 0; broadcasts && i < mask.size(); ++i) {
    broadcasts = mask[i] == 1 || agree(scores[4 - mask.size() + i], mask[i]);
  }
  if (!broadcasts) {
    fail("ValueError", kAttnMask, "a shape that broadcasts to [batch, num_heads, seq_len, seq_len] = " + text(scores), text(mask));
  }
}

void check_dtypes(const std::array<const paddle::DataType*, kInputs>& dtypes, const Attributes& attributes) {
  const paddle::DataType dtype = *dtypes[kX];
  if (!is_float(dtype)) fail("TypeError", kX, "float32, float64, float16 or bfloat16", text(dtype));
  const bool is_16bit = dtype == paddle::DataType::FLOAT16 || dtype == paddle::DataType::BFLOAT16;
  const std::string as_x = text(dtype) + " like x";
  for (Input input : {kQkvWeight, kLinearWeight, kQkvBias, kLinearBias}) {
    if (attributes.has(input) && *dtypes[input] != dtype) fail("TypeError", input, as_x, text(*dtypes[input]));
  }
  // One type for all layer-norm parameters: that of the first present.
  const paddle::DataType* norm = nullptr;
  for (Input input : {kPreLnScale, kPreLnBias, kLnScale, kLnBias}) {
    if (!attributes.has(input)) continue;
    const paddle::DataType got = *dtypes[input];
    if (got != dtype && !(is_16bit && got == paddle::DataType::FLOAT32)) {
      fail("TypeError", input, is_16bit ? "float32, or " + as_x : as_x, text(got));
    }
    if (norm && got != *norm) fail("TypeError", input, text(*norm) + " like the other layer-norm parameters", text(got));
    norm = dtypes[input];
  }
  if (attributes.has(kAttnMask)) {
    const paddle::DataType mask = *dtypes[kAttnMask];
    const bool is_integer = mask == paddle::DataType::BOOL || mask == paddle::DataType::UINT8 || mask == paddle::DataType::INT8 ||
                            mask == paddle::DataType::INT16 || mask == paddle::DataType::INT32 || mask == paddle::DataType::INT64;
    if (!is_float(mask) && !is_integer) fail("TypeError", kAttnMask, "a float, bool or integer dtype", text(mask));
  }
}

}  // namespace pfa::op
