// What the operators that have attention say of its scores: the mask, packed sequences, scale and windows.
#pragma once

#include <array>
#include <cmath>
#include <string>

#include "core/params.h"
#include "op/attributes.h"
#include "op/checks.h"
#include "op/tensors.h"

namespace pfa::op {

inline void check_mask_dtype(const Arguments& arguments, int input) {
  if (arguments.has(input) && !is_one_of(arguments.dtypes[input], {"float32", "float64", "float16", "bfloat16", "bool",
                                                                   "uint8", "int8", "int16", "int32", "int64"})) {
    arguments.refuse_dtype(input, "a float dtype, bool, uint8 or a signed integer dtype");
  }
}

// It broadcasts to the scores' shape, whose dimensions are called `names`.
inline void check_mask_shape(const Arguments& arguments, int input, const std::array<int64_t, 4>& scores,
                             const char* names) {
  if (!arguments.has(input)) return;
  const Shape mask = arguments.shapes[input];
  bool broadcasts = mask.rank <= scores.size();
  for (size_t i = 0; broadcasts && i < mask.rank; ++i) {
    broadcasts = mask[i] == 1 || agree(scores[scores.size() - mask.rank + i], mask[i]);
  }
  if (!broadcasts) {
    arguments.refuse_shape(input, std::string("a shape that broadcasts to ") + names + " = " + text(scores));
  }
}

inline Mask mask_of(const paddle::Tensor& tensor) {
  Mask mask;
  mask.data = tensor.data();
  mask.dtype = core_dtype(tensor.dtype());
  const Shape shape = shape_of(tensor);
  int64_t stride = 1;
  for (size_t i = shape.rank; i-- > 0;) {
    mask.strides[4 - shape.rank + i] = shape[i] == 1 ? 0 : stride;
    stride *= shape[i];
  }
  return mask;
}

inline void check_scores(const char* op, int64_t scale, int64_t window_left, int64_t window_right) {
  if (std::isinf(number(scale))) {
    refuse(op, "ValueError", "scale", "a finite number", std::to_string(number(scale)));
  }
  for (int64_t window : {window_left, window_right}) {
    if (window < -1) refuse(op, "ValueError", "window_size", "numbers of at least -1", std::to_string(window));
  }
}

// The bits of a NaN, which stands for a scale of head_dim^-0.5.
constexpr int64_t kDefaultScale = 0x7FF8000000000000;

inline double scale_of(int64_t scale, int64_t head_dim) {
  return std::isnan(number(scale)) ? 1.0 / std::sqrt(static_cast<double>(head_dim)) : number(scale);
}

inline void check_longest(const char* op, const char* name, int64_t longest) {
  if (longest < 0) refuse(op, "ValueError", name, "0 or more", std::to_string(longest));
}

// Where packed sequences of so many tokens begin. On the CPU the values are checked; on GPUs they cannot be read
// without waiting for the device.
inline const int32_t* starts_of(const char* op, const paddle::Tensor& tensor, const char* name, int64_t tokens,
                                const char* longest_name, int64_t longest) {
  const int32_t* starts = tensor.data<int32_t>();
  if (!tensor.is_cpu()) return starts;
  const auto refuse_value = [&](const std::string& expected, int64_t got) {
    refuse(op, "ValueError", name, expected, std::to_string(got));
  };
  const int64_t count = tensor.numel();
  if (starts[0] != 0) refuse_value("a first value of 0", starts[0]);
  for (int64_t i = 1; i < count; ++i) {
    const int64_t length = int64_t{starts[i]} - starts[i - 1];
    if (length < 0) refuse_value("ascending values", starts[i]);
    if (length > longest) {
      refuse_value(std::string("no sequence longer than ") + longest_name + " = " + std::to_string(longest), length);
    }
  }
  if (starts[count - 1] != tokens) {
    refuse_value("a last value that is the number of tokens, " + std::to_string(tokens), starts[count - 1]);
  }
  return starts;
}

}  // namespace pfa::op
