// custom_fused_feedforward: the feed-forward block.

#include "core/feed_forward_block.h"

#include "core/inputs.h"
#include "op/activations.h"
#include "op/arranged.h"
#include "op/blocks.h"
#include "op/operator.h"

namespace pfa::op {
namespace {

using namespace feed_forward;

// The epsilons and rates are float64 numbers. `seed` is, without kFixedSeed, only a number that tells this call from
// others that drop something. first_hidden and total_hidden say where the hidden numbers of the weights stand in a
// layer that is spread over devices; 0 in all: they are all.
#define PFA_OWN_ATTRIBUTES(DO)                                                                                        \
  DO(ln1_epsilon), DO(ln2_epsilon), DO(dropout1_rate), DO(dropout2_rate), DO(seed), DO(activation), DO(first_hidden), \
      DO(total_hidden)

struct FusedFeedForward : BlockOperator {
  using Params = FeedForwardParams;
  struct Attributes : op::Attributes {
    int64_t PFA_OWN_ATTRIBUTES(PFA_MEMBER);
  };
  static constexpr char kType[] = "custom_fused_feedforward";
  static constexpr const char* kInputNames[] = {PFA_FEED_FORWARD_INPUTS(PFA_INPUT_NAME)};
  static constexpr const char* kArgumentNames[] = {PFA_FEED_FORWARD_INPUTS(PFA_ARGUMENT_NAME)};
  static constexpr size_t kRequiredCount = 3;
  static constexpr const char* kAttributeNames[] = {PFA_OWN_ATTRIBUTES(PFA_ATTRIBUTE_NAME)};
  static constexpr const auto& kInputs = feed_forward::kInputs;

  static void check(const Arguments& arguments, const Attributes& attributes) {
    arguments.check_dtypes(kX, kLinear1Weight, {kLinear2Weight, kLinear1Bias, kLinear2Bias});
    arguments.check_norm_dtypes(kX, {kLn1Scale, kLn1Bias, kLn2Scale, kLn2Bias});
    check_activation(kType, attributes.activation, Activation::kRelu);
    if (!is_arranged(arguments.shapes[kLinear2Weight])) return check_shapes(arguments, attributes);
    const PlainArguments<kInputCount<FusedFeedForward>, 2> plain(arguments, attributes,
                                                                 {{{kLinear1Weight, 0}, {kLinear2Weight, 0}}});
    check_shapes(*plain, attributes);
  }

  static void check_shapes(const Arguments& arguments, const Attributes& attributes) {
    arguments.check_rows(kX, "embed_dim");
    const int64_t embed_dim = arguments.shapes[kX].last();
    const Shape weight = arguments.shapes[kLinear1Weight];
    const int64_t columns = weight.rank == 2 ? weight[1] : -1;
    const bool gated = attributes.has(kGated);
    if (!agree(std::array{embed_dim, columns}, weight) || columns == 0 || (gated && columns > 0 && columns % 2)) {
      arguments.refuse_shape(kLinear1Weight,
                             "shape [" + std::to_string(embed_dim) + ", " +
                                 (gated ? "2 * hidden_dim] of both halves of a gated activation" : "hidden_dim]") +
                                 " with hidden_dim of at least 1 for x of shape " + text(arguments.shapes[kX]));
    }
    const int64_t hidden_dim = columns < 0 ? -1 : gated ? columns / 2 : columns;
    const int64_t first = attributes.first_hidden;
    const int64_t total = attributes.total_hidden;
    if (first < 0 || total < 0 || (total ? first + hidden_dim > total : first != 0)) {
      refuse(kType, "ValueError", arguments.names[kLinear1Weight],
             "hidden numbers among the " + std::to_string(total ? total : hidden_dim) + " in all",
             std::to_string(hidden_dim) + " from number " + std::to_string(first));
    }
    const auto check = [&](Input input, Shape expected) {
      arguments.check_shape(input, expected, {kX, kLinear1Weight});
    };
    const std::array width{embed_dim};
    check(kLinear2Weight, std::array{hidden_dim, embed_dim});
    for (Input input : {kLn1Scale, kLn1Bias, kLn2Scale, kLn2Bias}) check(input, width);
    check(kLinear1Bias, std::array{columns});
    check(kLinear2Bias, width);
  }

  static Params describe(const paddle::Tensor* const* tensors, const Attributes& attributes) {
    Params p;
    describe_block(p, tensors, kLinear1Weight, {kLn1Scale, kLn1Bias, kLn2Scale, kLn2Bias}, attributes);
    const Shape weight = shape_of(*tensors[kLinear2Weight]);
    p.has_arranged_weights = is_arranged(weight);
    if (p.has_arranged_weights) check_on_cpu(kType, *tensors[kLinear2Weight], "linear2_weight");
    p.hidden_dim = p.has_arranged_weights ? PlainShape(weight, 0).shape()[0] : weight[0];
    p.first_hidden = attributes.first_hidden;
    p.total_hidden = attributes.total_hidden;
    p.gated = attributes.has(kGated);
    p.activation = static_cast<Activation>(attributes.activation);
    p.pre_ln_epsilon = number(attributes.ln1_epsilon);
    p.ln_epsilon = number(attributes.ln2_epsilon);
    p.hidden_dropout = dropout_of(attributes.dropout1_rate, attributes);
    p.dropout = dropout_of(attributes.dropout2_rate, attributes);
    return p;
  }

  static bool drops(const Params& p) { return p.hidden_dropout.threshold || p.dropout.threshold; }

  // Only a part of the hidden numbers, without what follows their sum, gives a part of the result.
  static Sharding sharding_of(const std::vector<Mapping>& mappings, const Attributes& attributes) {
    return sharding_of_rows(mappings[kX], attributes.total_hidden ? mappings[kLinear1Weight][1] : -1);
  }

  static Mapping mapping_of(int input, Shape shape, const Sharding& sharding, const Attributes&) {
    switch (input) {
      case kX:
        return sharding.out;
      case kLinear1Weight:
        return {-1, sharding.parts};
      case kLinear1Bias:
        return {sharding.parts};
      case kLinear2Weight:
        return {sharding.parts, -1};
      default:
        return Mapping(shape.rank, -1);
    }
  }

  static bool has_rows(int input, Shape) { return input == kX; }

  static bool comes_before_parts(int input, Shape) { return input == kX || input == kLn1Scale || input == kLn1Bias; }
};

}  // namespace
}  // namespace pfa::op

PFA_REGISTER(custom_fused_feedforward, pfa::op::FusedFeedForward);
