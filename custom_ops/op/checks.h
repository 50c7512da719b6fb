// What the operator accepts. Shapes may have unknown dimensions (-1, in static graphs), which agree with anything.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "op/attributes.h"

namespace pfa::op {

// A tensor's dimensions, wherever they lie.
struct Shape {
  const int64_t* sizes;
  size_t rank;

  Shape(const int64_t* sizes = nullptr, size_t rank = 0) : sizes(sizes), rank(rank) {}
  template <size_t kRank>
  Shape(const std::array<int64_t, kRank>& sizes) : Shape(sizes.data(), kRank) {}
  int64_t operator[](size_t i) const { return sizes[i]; }
};

// Throw std::invalid_argument whose message begins "[custom_fused_attention] ValueError: " or "... TypeError: ", for
// Python to raise as that, then names the argument, what was expected and what came.
void check_shapes(const std::array<Shape, kInputCount>& shapes, const Attributes& attributes);
void check_dtypes(const std::array<std::string, kInputCount>& dtypes, const Attributes& attributes);

}  // namespace pfa::op
