// custom_fused_attention: the attention block.

#include "core/attention_block.h"

#include "core/inputs.h"
#include "op/blocks.h"
#include "op/masks.h"
#include "op/operator.h"

namespace pfa::op {
namespace {

using namespace attention;

// The epsilons and rates are float64 numbers. `seed` is, without kFixedSeed, only a number that tells this call from
// others that drop something. first_head and total_heads say where the heads of qkv_weight stand in a layer whose heads
// are spread over devices; 0 in all: they are all.
#define PFA_OWN_ATTRIBUTES(DO) \
  DO(pre_ln_epsilon), DO(ln_epsilon), DO(dropout_rate), DO(attn_dropout_rate), DO(seed), DO(first_head), DO(total_heads)

struct FusedAttention : BlockOperator {
  using Params = AttentionBlockParams;
  struct Attributes : op::Attributes {
    int64_t PFA_OWN_ATTRIBUTES(PFA_MEMBER);
  };
  static constexpr char kType[] = "custom_fused_attention";
  static constexpr const char* kInputNames[] = {PFA_ATTENTION_INPUTS(PFA_INPUT_NAME)};
  static constexpr const char* kArgumentNames[] = {PFA_ATTENTION_INPUTS(PFA_ARGUMENT_NAME)};
  static constexpr size_t kRequiredCount = 3;
  static constexpr const char* kAttributeNames[] = {PFA_OWN_ATTRIBUTES(PFA_ATTRIBUTE_NAME)};
  static constexpr const auto& kInputs = attention::kInputs;

  static void check(const Arguments& arguments, const Attributes& attributes) {
    check_dtypes(arguments);
    check_shapes(arguments, attributes);
  }

  static void check_dtypes(const Arguments& arguments) {
    arguments.check_dtypes(kX, kQKVWeight, {kLinearWeight, kQKVBias, kLinearBias});
    arguments.check_norm_dtypes(kX, {kPreLnScale, kPreLnBias, kLnScale, kLnBias});
    check_mask_dtype(arguments, kAttnMask);
  }

  static void check_shapes(const Arguments& arguments, const Attributes& attributes) {
    const Shape x = arguments.shapes[kX];
    if (x.rank != 3) arguments.refuse_shape(kX, "shape [batch, seq_len, embed_dim]");
    const int64_t embed_dim = x[2];
    if (embed_dim == 0) arguments.refuse_shape(kX, "embed_dim of at least 1");

    const Shape weight = arguments.shapes[kQKVWeight];
    const int64_t num_heads = weight.rank == 4 ? weight[1] : -1;
    const int64_t head_dim = weight.rank == 4 ? weight[2] : -1;
    const int64_t heads = attributes.total_heads ? attributes.total_heads : num_heads;
    const bool packs_width = heads < 0 || head_dim < 0 || agree(embed_dim, heads * head_dim);
    if (!agree(std::array{int64_t{3}, num_heads, head_dim, embed_dim}, weight) || !packs_width) {
      const bool splits = heads > 0 && embed_dim > 0 && embed_dim % heads == 0;
      const std::string width = std::to_string(embed_dim);
      arguments.refuse_shape(
          kQKVWeight, splits ? "shape " + text(std::array{int64_t{3}, num_heads, embed_dim / heads, embed_dim}) +
                                   " for x with embed_dim " + width + " and " + std::to_string(heads) + " heads"
                             : "shape [3, num_heads, head_dim, " + width + "] with num_heads * head_dim = " + width +
                                   " for x of shape " + text(x));
    }
    if (attributes.first_head < 0 ||
        (attributes.total_heads && attributes.first_head + num_heads > attributes.total_heads)) {
      refuse(kType, "ValueError", arguments.names[kQKVWeight], "heads among the " + std::to_string(heads) + " in all",
             std::to_string(num_heads) + " from head " + std::to_string(attributes.first_head));
    }
    const auto check = [&](Input input, Shape expected) { arguments.check_shape(input, expected, {kX, kQKVWeight}); };
    const std::array width{embed_dim};
    check(kLinearWeight,
          std::array{attributes.total_heads && head_dim >= 0 ? num_heads * head_dim : embed_dim, embed_dim});
    for (Input input : {kPreLnScale, kPreLnBias, kLnScale, kLnBias}) check(input, width);
    check(kQKVBias, std::array{int64_t{3}, num_heads, head_dim});
    check(kLinearBias, width);

    check_mask_shape(arguments, kAttnMask, {x[0], num_heads, x[1], x[1]}, "[batch, num_heads, seq_len, seq_len]");
  }

  static Params describe(const paddle::Tensor* const* tensors, const Attributes& attributes) {
    Params p;
    describe_block(p, tensors, kQKVWeight, {kPreLnScale, kPreLnBias, kLnScale, kLnBias}, attributes);
    const Shape x = shape_of(*tensors[kX]);
    const Shape weight = shape_of(*tensors[kQKVWeight]);
    p.batch = x[0];
    p.seq_len = x[1];
    p.num_heads = weight[1];
    p.head_dim = weight[2];
    if (tensors[kX]->is_gpu() && p.head_dim > kMaxHeadDimOnGpu) {
      refuse(kType, "ValueError", "qkv_weight", "head_dim of at most " + std::to_string(kMaxHeadDimOnGpu) + " on a GPU",
             std::to_string(p.head_dim));
    }
    p.first_head = attributes.first_head;
    p.total_heads = attributes.total_heads;
    p.causal = attributes.has(kCausal);
    p.pre_ln_epsilon = number(attributes.pre_ln_epsilon);
    p.ln_epsilon = number(attributes.ln_epsilon);
    p.attn_dropout = dropout_of(attributes.attn_dropout_rate, attributes);
    p.dropout = dropout_of(attributes.dropout_rate, attributes);
    if (attributes.has_input(kAttnMask)) p.mask = mask_of(*tensors[kAttnMask]);
    return p;
  }

  static bool drops(const Params& p) { return p.attn_dropout.threshold || p.dropout.threshold; }

  // Only a part of the heads, without what follows their sum, gives a part of the result. Queries and keys of a
  // sequence stay together.
  static Sharding sharding_of(const std::vector<Mapping>& mappings, const Attributes& attributes) {
    const int64_t heads = attributes.total_heads ? mappings[kQKVWeight][1] : -1;
    return sharding_of_rows({mappings[kX][0], -1, -1}, heads);
  }

  static Mapping mapping_of(int input, Shape shape, const Sharding& sharding, const Attributes&) {
    Mapping mapping(shape.rank, -1);
    switch (input) {
      case kX:
        return sharding.out;
      case kQKVWeight:
      case kQKVBias:
        mapping[1] = sharding.parts;
        break;
      case kLinearWeight:
        mapping[0] = sharding.parts;
        break;
      case kAttnMask:
        if (shape.rank == 4 && shape[0] != 1) mapping[0] = sharding.out[0];
        if (shape.rank >= 3 && shape[shape.rank - 3] != 1) mapping[shape.rank - 3] = sharding.parts;
        break;
      default:
        break;
    }
    return mapping;
  }

  static bool has_rows(int input, Shape) { return input == kX; }

  static bool comes_before_parts(int input) { return input == kX || input == kPreLnScale || input == kPreLnBias; }
};

}  // namespace
}  // namespace pfa::op

PFA_REGISTER(custom_fused_attention, pfa::op::FusedAttention);
