#include "op/checks.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace pfa::op {
namespace {

std::string text(Shape shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.rank; ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + "]";
}

[[noreturn]] void fail(const char* kind, Input input, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string("[custom_fused_attention] ") + kind + ": " + kInputNames[input] +
                              ": expected " + expected + ", got " + got);
}

bool agree(int64_t expected, int64_t got) { return expected == got || expected < 0 || got < 0; }

bool agree(Shape expected, Shape got) {
  if (expected.rank != got.rank) return false;
  for (size_t i = 0; i < got.rank; ++i) {
    if (!agree(expected[i], got[i])) return false;
  }
  return true;
}

bool is_one_of(const std::string& dtype, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), dtype) != names.end();
}

}  // namespace

// Texts are made where a check has failed only: this runs at every call.
void check_shapes(const std::array<Shape, kInputCount>& shapes, const Attributes& attributes) {
  const Shape x = shapes[kX];
  if (x.rank != 3) fail("ValueError", kX, "shape [batch, seq_len, embed_dim]", text(x));
  const int64_t embed_dim = x[2];
  if (embed_dim == 0) fail("ValueError", kX, "embed_dim of at least 1", text(x));

  const Shape weight = shapes[kQKVWeight];
  const int64_t num_heads = weight.rank == 4 ? weight[1] : -1;
  const int64_t head_dim = weight.rank == 4 ? weight[2] : -1;
  const int64_t heads = attributes.total_heads ? attributes.total_heads : num_heads;
  const bool packs_width = heads < 0 || head_dim < 0 || agree(embed_dim, heads * head_dim);
  if (!agree(std::array{int64_t{3}, num_heads, head_dim, embed_dim}, weight) || !packs_width) {
    const bool splits = heads > 0 && embed_dim > 0 && embed_dim % heads == 0;
    const std::string width = std::to_string(embed_dim);
    fail("ValueError", kQKVWeight,
         splits ? "shape " + text(std::array{int64_t{3}, num_heads, embed_dim / heads, embed_dim}) +
                      " for x with embed_dim " + width + " and " + std::to_string(heads) + " heads"
                : "shape [3, num_heads, head_dim, " + width + "] with num_heads * head_dim = " + width +
                      " for x of shape " + text(x),
         text(weight));
  }
  if (attributes.first_head < 0 ||
      (attributes.total_heads && attributes.first_head + num_heads > attributes.total_heads)) {
    fail("ValueError", kQKVWeight, "heads among the " + std::to_string(heads) + " in all",
         std::to_string(num_heads) + " from head " + std::to_string(attributes.first_head));
  }
  const auto check = [&](Input input, const auto& expected) {
    if (attributes.has(input) && !agree(expected, shapes[input])) {
      fail("ValueError", input,
           "shape " + text(expected) + " for x of shape " + text(x) + " and qkv_weight of shape " + text(weight),
           text(shapes[input]));
    }
  };
  check(kLinearWeight,
        std::array{attributes.total_heads && head_dim >= 0 ? num_heads * head_dim : embed_dim, embed_dim});
  check(kPreLnScale, std::array{embed_dim});
  check(kPreLnBias, std::array{embed_dim});
  check(kLnScale, std::array{embed_dim});
  check(kLnBias, std::array{embed_dim});
  check(kQKVBias, std::array{int64_t{3}, num_heads, head_dim});
  check(kLinearBias, std::array{embed_dim});

  if (!attributes.has(kAttnMask)) return;
  const Shape mask = shapes[kAttnMask];
  const std::array scores{x[0], num_heads, x[1], x[1]};
  bool broadcasts = mask.rank <= scores.size();
  for (size_t i = 0; broadcasts && i < mask.rank; ++i) {
    broadcasts = mask[i] == 1 || agree(scores[scores.size() - mask.rank + i], mask[i]);
  }
  if (!broadcasts) {
    fail("ValueError", kAttnMask, "a shape that broadcasts to [batch, num_heads, seq_len, seq_len] = " + text(scores),
         text(mask));
  }
}

void check_dtypes(const std::array<std::string, kInputCount>& dtypes, const Attributes& attributes) {
  const std::string& dtype = dtypes[kX];
  if (!is_one_of(dtype, {"float32", "float64", "float16", "bfloat16"})) {
    fail("TypeError", kX, "float32, float64, float16 or bfloat16", dtype);
  }
  const bool is_16bit = is_one_of(dtype, {"float16", "bfloat16"});
  const std::string as_x = dtype + " like x";
  const std::string& weight = dtypes[kQKVWeight];
  if (weight != dtype && !(dtype == "float32" && is_one_of(weight, {"float16", "bfloat16"}))) {
    fail("TypeError", kQKVWeight, dtype == "float32" ? as_x + ", float16 or bfloat16" : as_x, weight);
  }
  for (Input input : {kLinearWeight, kQKVBias, kLinearBias}) {
    if (!attributes.has(input) || dtypes[input] == weight) continue;
    if (dtypes[input] == dtype) fail("TypeError", kQKVWeight, dtype + " like x and " + kInputNames[input], weight);
    fail("TypeError", input, weight + " like qkv_weight", dtypes[input]);
  }
  const std::string* norm = nullptr;
  for (Input input : {kPreLnScale, kPreLnBias, kLnScale, kLnBias}) {
    if (!attributes.has(input)) continue;
    const std::string& got = dtypes[input];
    if (got != dtype && !(is_16bit && got == "float32")) {
      fail("TypeError", input, is_16bit ? "float32, or " + as_x : as_x, got);
    }
    if (norm && got != *norm) fail("TypeError", input, *norm + " like the other layer-norm parameters", got);
    norm = &got;
  }
  if (attributes.has(kAttnMask) && !is_one_of(dtypes[kAttnMask], {"float32", "float64", "float16", "bfloat16", "bool",
                                                                  "uint8", "int8", "int16", "int32", "int64"})) {
    fail("TypeError", kAttnMask, "a float dtype, bool, uint8 or a signed integer dtype", dtypes[kAttnMask]);
  }
}

// For Python, which checks with it what goes into a static graph: there an exception during Paddle's shape inference
// would end the process. shapes holds the dimensions of all inputs one after another. Returns null, or a message that
// is valid until the next call on this thread.
extern "C" __attribute__((visibility("default"))) const char* custom_fused_attention_check(
    const int64_t* shapes, const int32_t* ranks, const char* const* dtypes, int64_t present, int64_t first_head,
    int64_t total_heads) {
  thread_local std::string message;
  std::array<Shape, kInputCount> dimensions;
  std::array<std::string, kInputCount> names;
  for (int i = 0; i < kInputCount; ++i) {
    dimensions[i] = Shape(shapes, ranks[i]);
    shapes += ranks[i];
    names[i] = dtypes[i];
  }
  Attributes attributes{};
  attributes.present = present;
  attributes.first_head = first_head;
  attributes.total_heads = total_heads;
  try {
    check_dtypes(names, attributes);
    check_shapes(dimensions, attributes);
  } catch (const std::invalid_argument& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace pfa::op
