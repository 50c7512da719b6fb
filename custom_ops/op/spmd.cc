#include "op/spmd.h"

#ifdef PFA_SPMD

namespace pfa::op {

TensorDistAttr make_attr(const DistMetaTensor& tensor, const Mapping& mapping, const Mapping& partial_over) {
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

}  // namespace pfa::op

#endif
