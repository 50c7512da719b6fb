#include "op/spmd.h"

#ifdef PFA_DIST_TENSORS

#include <array>
#include <vector>

namespace pfa::op {
namespace {

using phi::distributed::ArgDistAttr;
using phi::distributed::DistMetaTensor;
using phi::distributed::SpmdInfo;
using phi::distributed::TensorDistAttr;
using Tensors = std::array<const DistMetaTensor*, kInputCount>;
using Mapping = std::vector<int64_t>;  // the mesh's dimension that each of a tensor's is sharded over; -1: none

// The mesh's dimensions that batch and heads are sharded over; -1: none.
struct Sharding {
  int64_t batch;
  int64_t heads;
};

Sharding sharding_of(const Tensors& tensors, const Attributes& attributes) {
  Sharding sharding{tensors[kX]->dist_attr().dims_mapping()[0], -1};
  // Only a part of the heads, without what follows their sum, gives a part of the result.
  if (attributes.total_heads) sharding.heads = tensors[kQKVWeight]->dist_attr().dims_mapping()[1];
  if (sharding.batch == sharding.heads) sharding.batch = -1;
  return sharding;
}

TensorDistAttr make_attr(const DistMetaTensor& tensor, const Mapping& mapping,
                         const std::vector<int64_t>& partial_over = {}) {
  TensorDistAttr attr = tensor.dist_attr();
  attr.clean_partial_status();
  attr.set_default_dynamic_dims(Mapping(mapping.size(), 1));
  attr.set_dims_mapping(mapping);
  std::vector<int64_t> dimensions;
  for (int64_t dimension : partial_over) {
    if (dimension >= 0) dimensions.push_back(dimension);
  }
  if (!dimensions.empty()) attr.set_partial_status(dimensions);
  return attr;
}

Mapping mapping_of(Input input, const Tensors& tensors, const Sharding& sharding, const Attributes& attributes) {
  const int rank = tensors[input]->dims().size();
  Mapping mapping(rank, -1);
  if (!attributes.has(input)) return mapping;
  switch (input) {
    case kX:
      mapping[0] = sharding.batch;
      break;
    case kQKVWeight:
    case kQKVBias:
      mapping[1] = sharding.heads;
      break;
    case kLinearWeight:
      mapping[0] = sharding.heads;
      break;
    case kAttnMask:
      if (rank == 4 && tensors[input]->dims()[0] != 1) mapping[0] = sharding.batch;
      if (rank >= 3 && tensors[input]->dims()[rank - 3] != 1) mapping[rank - 3] = sharding.heads;
      break;
    default:
      break;
  }
  return mapping;
}

std::vector<ArgDistAttr> inputs_of(const Tensors& tensors, const Sharding& sharding, const Attributes& attributes) {
  std::vector<ArgDistAttr> inputs;
  for (int i = 0; i < kInputCount; ++i) {
    inputs.push_back(make_attr(*tensors[i], mapping_of(static_cast<Input>(i), tensors, sharding, attributes)));
  }
  return inputs;
}

TensorDistAttr attr_of_out(const Tensors& tensors, const Sharding& sharding) {
  return make_attr(*tensors[kX], {sharding.batch, -1, -1}, {sharding.heads});
}

// Saved has another layout on every process. Nothing but backward reads it, so it counts as replicated.
TensorDistAttr attr_of_saved(const Tensors& tensors) { return make_attr(*tensors[kX], {-1}); }

}  // namespace

SpmdInfo forward_spmd(PFA_DIST_TENSORS, PFA_ATTRIBUTES) {
  const Tensors tensors = PFA_ADDRESSES;
  const Attributes attributes = PFA_ATTRIBUTE_VALUES;
  const Sharding sharding = sharding_of(tensors, attributes);
  return {inputs_of(tensors, sharding, attributes), {attr_of_out(tensors, sharding), attr_of_saved(tensors)}};
}

SpmdInfo forward_alone_spmd(PFA_DIST_TENSORS, PFA_ATTRIBUTES) {
  const Tensors tensors = PFA_ADDRESSES;
  const Attributes attributes = PFA_ATTRIBUTE_VALUES;
  const Sharding sharding = sharding_of(tensors, attributes);
  return {inputs_of(tensors, sharding, attributes), {attr_of_out(tensors, sharding)}};
}

SpmdInfo backward_spmd(PFA_DIST_TENSORS, const DistMetaTensor&, const DistMetaTensor& d_out, PFA_ATTRIBUTES) {
  const Tensors tensors = PFA_ADDRESSES;
  const Attributes attributes = PFA_ATTRIBUTE_VALUES;
  const Sharding sharding = sharding_of(tensors, attributes);
  std::vector<ArgDistAttr> inputs = inputs_of(tensors, sharding, attributes);
  inputs.push_back(attr_of_saved(tensors));
  inputs.push_back(make_attr(d_out, {sharding.batch, -1, -1}));
  std::vector<ArgDistAttr> gradients;
  for (int i = 0; i < kGradientCount; ++i) {
    const Input input = static_cast<Input>(i);
    if (!attributes.wants_gradient(input)) {
      gradients.push_back(make_attr(*tensors[i], Mapping(tensors[i]->dims().size(), -1)));
      continue;
    }
    const bool sums_batch = input != kX;
    const bool sums_heads = input == kX || input == kPreLnScale || input == kPreLnBias;
    gradients.push_back(make_attr(*tensors[i], mapping_of(input, tensors, sharding, attributes),
                                  {sums_batch ? sharding.batch : -1, sums_heads ? sharding.heads : -1}));
  }
  return {inputs, gradients};
}

}  // namespace pfa::op

#endif
