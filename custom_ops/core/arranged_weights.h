// Weights in the order in which the CPU's products read them, for inference.
//
// A weight W [in, out] is stored as panels [out / 32][in][32] of its columns; of bfloat16, whose products take two
// numbers of a column at once, as [out / 32][in / 2][32][2]. `in` and `out` are multiples of 32. A tensor of it has the
// shape that the weight had and two dimensions more, [..., 1, 1]; of bfloat16 `in` is halved and these are [..., 2, 1].
// So nothing that multiplies by plain weights takes it for one.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace pfa {

constexpr int64_t kArrangedColumns = 32;

// Numbers along `in` that lie beside each other.
constexpr int arranged_numbers(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 1; }

constexpr bool can_be_arranged(int64_t in, int64_t out) {
  return in % kArrangedColumns == 0 && out % kArrangedColumns == 0;
}

}  // namespace pfa
