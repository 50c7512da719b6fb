// custom_residual_norm: [layer norm of] residual + dropout(x + bias).

#include "core/residual_norm_block.h"

#include "core/inputs.h"
#include "op/blocks.h"
#include "op/operator.h"

namespace pfa::op {
namespace {

using namespace residual_norm;

// The epsilon and the rate are float64 numbers. `seed` is, without kFixedSeed, only a number that tells this call from
// others that drop something.
#define PFA_OWN_ATTRIBUTES(DO) DO(ln_epsilon), DO(dropout_rate), DO(seed)

struct ResidualNorm : BlockOperator {
  using Params = ResidualNormParams;
  struct Attributes : op::Attributes {
    int64_t PFA_OWN_ATTRIBUTES(PFA_MEMBER);
  };
  static constexpr char kType[] = "custom_residual_norm";
  static constexpr const char* kInputNames[] = {PFA_RESIDUAL_NORM_INPUTS(PFA_INPUT_NAME)};
  static constexpr const char* kArgumentNames[] = {PFA_RESIDUAL_NORM_INPUTS(PFA_ARGUMENT_NAME)};
  static constexpr size_t kRequiredCount = 1;
  static constexpr const char* kAttributeNames[] = {PFA_OWN_ATTRIBUTES(PFA_ATTRIBUTE_NAME)};
  static constexpr const auto& kInputs = residual_norm::kInputs;

  static void check(const Arguments& arguments, const Attributes&) {
    arguments.check_float(kX);
    arguments.check_dtype_like(kResidual, kX);
    arguments.check_dtype_like(kBias, kX);
    arguments.check_norm_dtypes(kX, {kLnScale, kLnBias});
    arguments.check_rows(kX, "embed_dim");
    arguments.check_shape(kResidual, arguments.shapes[kX], {kX});
    const std::array width{arguments.shapes[kX].last()};
    for (Input input : {kBias, kLnScale, kLnBias}) arguments.check_shape(input, width, {kX});
  }

  static Params describe(const paddle::Tensor* const* tensors, const Attributes& attributes) {
    Params p;
    describe_block(p, tensors, kX, {kLnScale, kLnBias}, attributes);
    p.pre_layer_norm = false;
    p.add_residual = attributes.has_input(kResidual);
    p.ln_epsilon = number(attributes.ln_epsilon);
    p.dropout = dropout_of(attributes.dropout_rate, attributes);
    return p;
  }

  static bool drops(const Params& p) { return p.dropout.threshold; }

  static Sharding sharding_of(const std::vector<Mapping>& mappings, const Attributes&) {
    return sharding_of_rows(mappings[kX]);
  }

  static Mapping mapping_of(int input, Shape shape, const Sharding& sharding, const Attributes&) {
    return has_rows(input, shape) ? sharding.out : Mapping(shape.rank, -1);
  }

  static bool has_rows(int input, Shape) { return input == kX || input == kResidual; }

  static bool comes_before_parts(int) { return false; }
};

}  // namespace
}  // namespace pfa::op

PFA_REGISTER(custom_residual_norm, pfa::op::ResidualNorm);
