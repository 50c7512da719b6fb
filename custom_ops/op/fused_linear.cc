// custom_fused_linear: activation(x @ weight + bias).

#include "core/linear_block.h"

#include <algorithm>

#include "core/inputs.h"
#include "op/activations.h"
#include "op/arranged.h"
#include "op/operator.h"

namespace pfa::op {
namespace {

using namespace linear;

#define PFA_OWN_ATTRIBUTES(DO) DO(activation)

struct FusedLinear {
  using Params = LinearParams;
  struct Attributes : op::Attributes {
    int64_t PFA_OWN_ATTRIBUTES(PFA_MEMBER);
  };
  static constexpr char kType[] = "custom_fused_linear";
  static constexpr const char* kInputNames[] = {PFA_LINEAR_INPUTS(PFA_INPUT_NAME)};
  static constexpr const char* kArgumentNames[] = {PFA_LINEAR_INPUTS(PFA_ARGUMENT_NAME)};
  static constexpr size_t kRequiredCount = 2;
  static constexpr const char* kAttributeNames[] = {PFA_OWN_ATTRIBUTES(PFA_ATTRIBUTE_NAME)};
  static constexpr const auto& kInputs = linear::kInputs;
  static constexpr bool kReadsOut = false;
  static constexpr int kMaskInput = -1;
  static constexpr char kOutLike[] = "shape of x @ weight and the dtype of x";

  static void check(const Arguments& arguments, const Attributes& attributes) {
    arguments.check_float(kX);
    arguments.check_dtype_like(kWeight, kX);
    arguments.check_dtype_like(kBias, kX);
    check_activation(kType, attributes.activation, Activation::kNone);
    if (!is_arranged(arguments.shapes[kWeight])) return check_shapes(arguments, attributes);
    const size_t in = attributes.has(kTransposeWeight) ? 1 : 0;
    const PlainArguments<kInputCount<FusedLinear>, 1> plain(arguments, attributes, {{{kWeight, in}}});
    check_shapes(*plain, attributes);
  }

  static void check_shapes(const Arguments& arguments, const Attributes& attributes) {
    const Shape x = arguments.shapes[kX];
    const bool transpose_x = attributes.has(kTransposeX);
    if (transpose_x && x.rank != 2) arguments.refuse_shape(kX, "shape [in_features, rows], as it is transposed");
    if (!transpose_x && x.rank == 0) arguments.refuse_shape(kX, "shape [..., in_features]");
    const int64_t in_features = transpose_x ? x[0] : x.last();
    if (in_features == 0) arguments.refuse_shape(kX, "in_features of at least 1");

    const Shape weight = arguments.shapes[kWeight];
    const bool transpose_weight = attributes.has(kTransposeWeight);
    const int64_t out_features = weight.rank == 2 ? weight[transpose_weight ? 0 : 1] : -1;
    const bool fits = transpose_weight ? agree(std::array{out_features, in_features}, weight)
                                       : agree(std::array{in_features, out_features}, weight);
    if (!fits || out_features == 0) {
      const std::string width = std::to_string(in_features);
      arguments.refuse_shape(kWeight, "shape " +
                                          (transpose_weight ? "[out_features, " + width + "], as it is transposed,"
                                                            : "[" + width + ", out_features]") +
                                          " with out_features of at least 1 for x of shape " + text(x));
    }
    arguments.check_shape(kBias, std::array{out_features}, {kX, kWeight});
  }

  // What is said of each dimension of x, of x as it is multiplied; or the other way.
  static std::vector<int64_t> oriented(std::vector<int64_t> dimensions, const Attributes& attributes) {
    if (attributes.has(kTransposeX)) std::reverse(dimensions.begin(), dimensions.end());
    return dimensions;
  }

  static Sizes out_shape(const Shape* shapes, const Attributes& attributes) {
    Sizes sizes = oriented(sizes_of(shapes[kX]), attributes);
    const Shape weight = shapes[kWeight];
    const bool has_columns = weight.rank == 2 || is_arranged(weight);
    if (!sizes.empty()) sizes.back() = has_columns ? weight[attributes.has(kTransposeWeight) ? 0 : 1] : -1;
    return sizes;
  }

  static Params describe(const paddle::Tensor* const* tensors, const Attributes& attributes) {
    const Shape x = shape_of(*tensors[kX]);
    const Shape weight = shape_of(*tensors[kWeight]);
    Params p;
    p.transpose_x = attributes.has(kTransposeX);
    p.transpose_weight = attributes.has(kTransposeWeight);
    p.rows = p.transpose_x ? x[1] : rows_of(x);
    p.in_features = p.transpose_x ? x[0] : x.last();
    p.out_features = weight[p.transpose_weight ? 0 : 1];
    p.has_arranged_weights = is_arranged(weight);
    if (p.has_arranged_weights) check_on_cpu(kType, *tensors[kWeight], "weight");
    p.dtype = core_dtype(tensors[kX]->dtype());
    p.activation = static_cast<Activation>(attributes.activation);
    return p;
  }

  static Sharding sharding_of(const std::vector<Mapping>& mappings, const Attributes& attributes) {
    return sharding_of_rows(oriented(mappings[kX], attributes));
  }

  static Mapping mapping_of(int input, Shape shape, const Sharding& sharding, const Attributes& attributes) {
    if (!has_rows(input, shape)) return Mapping(shape.rank, -1);
    return oriented(sharding.out, attributes);
  }

  static bool has_rows(int input, Shape) { return input == kX; }

  static bool comes_before_parts(int, Shape) { return false; }
};

}  // namespace
}  // namespace pfa::op

PFA_REGISTER(custom_fused_linear, pfa::op::FusedLinear);
