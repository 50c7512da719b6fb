// Arranged weights (core/arranged_weights.h) among an operator's inputs: their checks, and the shapes they had before.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>

#include "core/arranged_weights.h"
#include "op/attributes.h"
#include "op/checks.h"

namespace pfa::op {

constexpr size_t kArrangedDimensions = 2;  // that an arranged weight has more

// Whether a weight [in, out] is an arranged one; the others of its operator are then too.
inline bool is_arranged(Shape weight) { return weight.rank == 2 + kArrangedDimensions; }

// The shape that an arranged weight had, whose dimension `in` is multiplied with the input.
class PlainShape {
 public:
  PlainShape() = default;
  PlainShape(Shape arranged, size_t in) : rank_(arranged.rank - kArrangedDimensions) {
    std::copy_n(arranged.sizes, rank_, sizes_.data());
    if (sizes_[in] >= 0) sizes_[in] *= arranged[rank_];
  }

  Shape shape() const { return {sizes_.data(), rank_}; }

 private:
  std::array<int64_t, 4> sizes_{};
  size_t rank_ = 0;
};

// An operator's arguments with plain shapes in the place of its arranged weights', which are checked.
template <size_t kInputs, size_t kWeights>
class PlainArguments {
 public:
  struct Weight {
    int input;
    size_t in;  // the dimension of the plain weight
  };

  PlainArguments(const Arguments& arguments, const Attributes& attributes, std::array<Weight, kWeights> weights)
      : arguments_(arguments) {
    for (size_t i = 0; i < kInputs; ++i) {
      if (arguments.has(static_cast<int>(i))) shapes_[i] = arguments.shapes[i];
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      const auto [input, in] = weights[i];
      check(arguments, attributes, input, in);
      plain_[i] = PlainShape(arguments.shapes[input], in);
      shapes_[input] = plain_[i].shape();
    }
    arguments_.shapes = shapes_.data();
  }
  PlainArguments(const PlainArguments&) = delete;

  const Arguments& operator*() const { return arguments_; }

 private:
  static void check(const Arguments& arguments, const Attributes& attributes, int input, size_t in) {
    const Shape shape = arguments.shapes[input];
    if (shape.rank < 2 + kArrangedDimensions || shape.rank > 4 + kArrangedDimensions) {
      arguments.refuse_shape(input, "an arranged weight, as the others are");
    }
    const std::string& dtype = arguments.dtypes[input];
    const std::array<int64_t, kArrangedDimensions> last{dtype == "bfloat16" ? 2 : 1, 1};
    if (!agree(last, Shape(shape.sizes + shape.rank - kArrangedDimensions, kArrangedDimensions))) {
      arguments.refuse_shape(input,
                             "a shape that ends in " + text(last) + ", as that of a weight arranged in " + dtype);
    }
    const PlainShape plain(shape, in);
    int64_t out = 1;
    for (size_t i = 0; i < plain.shape().rank; ++i) out *= i == in ? 1 : plain.shape()[i];
    if (!can_be_arranged(plain.shape()[in], out)) {
      arguments.refuse_shape(input, "an arranged weight, with multiples of " + std::to_string(kArrangedColumns));
    }
    if (attributes.saves() || (attributes.has(kNeedsGradHolds) && attributes.needs_grad)) {
      refuse(arguments.op, "ValueError", arguments.names[input],
             "a weight that is not arranged, where a gradient is wanted", "an arranged one");
    }
  }

  Arguments arguments_;
  std::array<Shape, kInputs> shapes_;
  std::array<PlainShape, kWeights> plain_;
};

}  // namespace pfa::op
