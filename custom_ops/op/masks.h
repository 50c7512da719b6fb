// The mask among an operator's inputs, where it is there.
#pragma once

#include <array>
#include <string>

#include "core/params.h"
#include "op/checks.h"
#include "op/tensors.h"

namespace pfa::op {

inline void check_mask_dtype(const Arguments& arguments, int input) {
  if (arguments.has(input) &&
      !is_one_of(arguments.dtypes[input],
                 {"float32", "float64", "float16", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64"})) {
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

}  // namespace pfa::op
