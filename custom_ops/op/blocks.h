// What the operators have in common whose core is a block with a residual and layer norms.
#pragma once

#include <initializer_list>

#include "core/params.h"
#include "op/attributes.h"
#include "op/tensors.h"

namespace pfa::op {

// The switches and types of a block; `weight` is the input that has the products' type, `norms` are the layer-norm
// parameters.
inline void describe_block(BlockParams& p, const paddle::Tensor* const* tensors, int weight,
                           std::initializer_list<int> norms, const Attributes& attributes) {
  const Shape x = shape_of(*tensors[0]);
  p.rows = rows_of(x);
  p.embed_dim = x.last();
  p.dtype = core_dtype(tensors[weight]->dtype());
  p.residual_dtype = core_dtype(tensors[0]->dtype());
  p.norm_dtype = p.residual_dtype;
  for (int input : norms) {
    if (attributes.has_input(input)) p.norm_dtype = core_dtype(tensors[input]->dtype());
  }
  p.pre_layer_norm = attributes.has(kPreLayerNorm);
  p.final_layer_norm = attributes.has(kFinalLayerNorm);
  p.add_residual = attributes.has(kAddResidual);
}

// The dropout of a rate given as its bits.
inline Dropout dropout_of(int64_t rate, const Attributes& attributes) {
  return pfa::dropout_of(number(rate), !attributes.is_test, attributes.has(kUpscaleInTrain));
}

// Out of a block has the shape and dtype of x.
struct BlockOperator {
  static constexpr char kOutLike[] = "shape and dtype of x";
  static constexpr bool kReadsOut = false;

  template <class Attributes>
  static Sizes out_shape(const Shape* shapes, const Attributes&) {
    return sizes_of(shapes[0]);
  }
};

}  // namespace pfa::op
