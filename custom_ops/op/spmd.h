// How an operator's tensors are spread over a mesh of processes in Paddle's auto-parallel engine (Paddle 3.x, whose
// custom operators may have such rules): rows stay sharded, and weights over their parts (heads, hidden numbers) where
// the operator holds a part of them.
//
// An operator says
//
//   sharding_of(mappings, attributes)                what its work is sharded over
//   mapping_of(input, shape, sharding, attributes)   how an input that is there is sharded then
//   has_rows(input, shape)                           whether it has Out's rows: else its gradient sums them
//   kReadsOut                                        whether backward reads Out
//   comes_before_parts(input, shape)                 whether its gradient is a sum over the parts
#pragma once

#include <cstdint>
#include <vector>

#include "op/checks.h"

namespace pfa::op {

using Mapping = std::vector<int64_t>;  // the mesh's dimension that each of a tensor's is sharded over; -1: none

// The mesh's dimensions that each of Out's dimensions, and the parts, are sharded over; -1: none. Out of a part is a
// part of a sum.
struct Sharding {
  Mapping out;
  int64_t parts = -1;
};

// That of an operator whose Out has the rows of x.
inline Sharding sharding_of_rows(const Mapping& x, int64_t parts = -1) {
  Sharding sharding{x, parts};
  if (!x.empty()) sharding.out.back() = -1;
  for (int64_t& dimension : sharding.out) {
    if (dimension == parts) dimension = -1;
  }
  return sharding;
}

}  // namespace pfa::op

#if __has_include("paddle/phi/api/ext/spmd_infer.h")
#define PFA_SPMD

#include <array>
#include <iterator>

#include "paddle/extension.h"
#include "paddle/phi/api/ext/spmd_infer.h"

namespace pfa::op {

using phi::distributed::DistMetaTensor;
using phi::distributed::TensorDistAttr;

// The attribute of a tensor that is sharded so and is a part of a sum over the mesh's dimensions `partial_over`, of
// which -1 is none.
TensorDistAttr make_attr(const DistMetaTensor& tensor, const Mapping& mapping, const Mapping& partial_over = {});

// An operator's tensors, spread.
template <class Operator>
class Spread {
 public:
  using Tensors = std::array<const DistMetaTensor*, std::size(Operator::kInputNames)>;
  using Attributes = typename Operator::Attributes;

  Spread(const Tensors& tensors, const Attributes& attributes) : tensors_(tensors), attributes_(attributes) {
    std::vector<Mapping> mappings;
    for (const DistMetaTensor* tensor : tensors) {
      mappings.push_back(tensor->dist_attr().dims_mapping());
      sizes_.push_back(tensor->dims());
    }
    sharding_ = Operator::sharding_of(mappings, attributes);
  }

  phi::distributed::SpmdInfo forward(bool saves) const {
    std::vector<phi::distributed::ArgDistAttr> outputs = {make_attr(*tensors_[0], sharding_.out, {sharding_.parts})};
    if (saves) outputs.push_back(attr_of_saved());
    return {inputs(), outputs};
  }

  phi::distributed::SpmdInfo backward(const DistMetaTensor& d_out) const {
    std::vector<phi::distributed::ArgDistAttr> all = inputs();
    all.push_back(attr_of_saved());
    if (Operator::kReadsOut) all.push_back(make_attr(d_out, sharding_.out));
    all.push_back(make_attr(d_out, sharding_.out));
    std::vector<phi::distributed::ArgDistAttr> gradients;
    for (size_t i = 0; i < std::size(Operator::kInputs); ++i) {
      Mapping partial_over;
      if (wants_gradient(i)) {
        if (!Operator::has_rows(i, shape_of_input(i))) partial_over = sharding_.out;
        if (Operator::comes_before_parts(i, shape_of_input(i))) partial_over.push_back(sharding_.parts);
      }
      gradients.push_back(make_attr(*tensors_[i], wants_gradient(i) ? mapping_of(i) : replicated(i), partial_over));
    }
    return {all, gradients};
  }

 private:
  bool wants_gradient(size_t input) const {
    return attributes_.wants_gradient(input) &&
           (static_cast<int>(input) != Operator::kMaskInput || attributes_.needs_grad >> input & 1);
  }

  Mapping replicated(size_t input) const { return Mapping(sizes_[input].size(), -1); }

  Mapping mapping_of(size_t input) const {
    if (!attributes_.has_input(input)) return replicated(input);
    return Operator::mapping_of(input, shape_of_input(input), sharding_, attributes_);
  }

  Shape shape_of_input(size_t input) const { return {sizes_[input].Get(), static_cast<size_t>(sizes_[input].size())}; }

  std::vector<phi::distributed::ArgDistAttr> inputs() const {
    std::vector<phi::distributed::ArgDistAttr> result;
    for (size_t i = 0; i < tensors_.size(); ++i) result.push_back(make_attr(*tensors_[i], mapping_of(i)));
    return result;
  }

  // Saved has another layout on every process. Nothing but backward reads it, so it counts as replicated.
  TensorDistAttr attr_of_saved() const { return make_attr(*tensors_[0], {-1}); }

  Tensors tensors_;
  std::vector<phi::DDim> sizes_;
  Attributes attributes_;
  Sharding sharding_;
};

}  // namespace pfa::op

#define PFA_SPMD_RULE(...) .SetInferSpmdFn(PD_INFER_SPMD_RULE(__VA_ARGS__))
#else
#define PFA_SPMD_RULE(...)
#endif
