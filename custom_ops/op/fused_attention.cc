// custom_fused_attention_general: the attention block. custom_fused_attention: the same for most calls, with the inputs
// and attributes that programs saved by earlier versions have. custom_fused_attention_cached: no operator, but a call
// for dygraph, of the block with a cache.

#include "core/attention_block.h"

#include <optional>
#include <vector>

#include "core/cached_attention_block.h"
#include "core/cpu/attention/cached_keys.h"
#include "core/inputs.h"
#include "op/arranged.h"
#include "op/blocks.h"
#include "op/operator.h"
#include "op/scores.h"

namespace pfa::op {
namespace {

using namespace attention;

// The epsilons, rates and `scale` are float64 numbers; a scale of NaN is head_dim^-0.5. `seed` is, without kFixedSeed,
// only a number that tells this call from others that drop something. first_head and total_heads say where the heads of
// qkv_weight stand in a layer whose heads are spread over devices; 0 in all: they are all. A window of -1 has no end.
// Of packed sequences max_seqlen is the longest.
#define PFA_BLOCK_ATTRIBUTES(DO) \
  DO(pre_ln_epsilon), DO(ln_epsilon), DO(dropout_rate), DO(attn_dropout_rate), DO(seed), DO(first_head), DO(total_heads)
#define PFA_SCORE_ATTRIBUTES(DO) DO(scale), DO(window_left), DO(window_right), DO(max_seqlen)

struct GeneralAttention : BlockOperator {
  using Params = AttentionBlockParams;
  struct Attributes : op::Attributes {
    int64_t PFA_BLOCK_ATTRIBUTES(PFA_MEMBER);
    int64_t PFA_SCORE_ATTRIBUTES(PFA_MEMBER);

    bool is_packed() const { return has_input(kCuSeqlens); }
  };

  // What the weights tell of the heads; -1: not known.
  struct HeadSizes {
    int64_t num_heads = -1;
    int64_t num_kv_heads = -1;
    int64_t head_dim = -1;

    // [3, H, D, E], or [H + 2 * num_kv_heads, D, E] where E = H * D.
    explicit HeadSizes(Shape weight) {
      if (weight.rank == 4) {
        num_heads = num_kv_heads = weight[1];
        head_dim = weight[2];
      } else if (weight.rank == 3) {
        head_dim = weight[1];
        if (head_dim > 0 && weight[2] >= 0) num_heads = weight[2] / head_dim;
        if (num_heads >= 0 && weight[0] >= 0) num_kv_heads = (weight[0] - num_heads) / 2;
      }
    }
  };
  static constexpr char kType[] = "custom_fused_attention_general";
  static constexpr const char* kInputNames[] = {PFA_ATTENTION_INPUTS(PFA_INPUT_NAME)};
  static constexpr const char* kArgumentNames[] = {PFA_ATTENTION_INPUTS(PFA_ARGUMENT_NAME)};
  static constexpr size_t kRequiredCount = 3;
  static constexpr const char* kAttributeNames[] = {PFA_BLOCK_ATTRIBUTES(PFA_ATTRIBUTE_NAME),
                                                    PFA_SCORE_ATTRIBUTES(PFA_ATTRIBUTE_NAME)};
  static constexpr const auto& kInputs = attention::kInputs;

  static constexpr int kMaskInput = kAttnMask;

  static void check(const Arguments& arguments, const Attributes& attributes) {
    check_dtypes(arguments);
    check_scores(arguments.op, attributes.scale, attributes.window_left, attributes.window_right);
    check_longest(arguments.op, "max_seqlen", attributes.max_seqlen);
    if (!is_arranged(arguments.shapes[kLinearWeight])) return check_shapes(arguments, attributes);
    const size_t rank = arguments.shapes[kQKVWeight].rank;
    if (rank < 3 + kArrangedDimensions) arguments.refuse_shape(kQKVWeight, "an arranged weight, as linear_weight is");
    const PlainArguments<kInputCount<GeneralAttention>, 2> plain(
        arguments, attributes, {{{kQKVWeight, rank - kArrangedDimensions - 1}, {kLinearWeight, 0}}});
    check_shapes(*plain, attributes);
  }

  static PlainShape plain_qkv_weight(Shape arranged) { return {arranged, arranged.rank - kArrangedDimensions - 1}; }

  static void check_dtypes(const Arguments& arguments) {
    arguments.check_dtypes(kX, kQKVWeight, {kLinearWeight, kQKVBias, kLinearBias});
    arguments.check_norm_dtypes(kX, {kPreLnScale, kPreLnBias, kLnScale, kLnBias});
    check_mask_dtype(arguments, kAttnMask);
  }

  static void check_shapes(const Arguments& arguments, const Attributes& attributes) {
    const Shape x = arguments.shapes[kX];
    const bool is_packed = attributes.is_packed();
    if (is_packed && x.rank != 2) arguments.refuse_shape(kX, "shape [tokens, embed_dim] of packed sequences");
    if (!is_packed && x.rank != 3) arguments.refuse_shape(kX, "shape [batch, seq_len, embed_dim]");
    const int64_t embed_dim = x.last();
    if (embed_dim == 0) arguments.refuse_shape(kX, "embed_dim of at least 1");

    const Shape weight = arguments.shapes[kQKVWeight];
    const auto [num_heads, num_kv_heads, head_dim] = HeadSizes(weight);
    const int64_t heads = attributes.total_heads ? attributes.total_heads : num_heads;
    const bool packs_width = heads < 0 || head_dim < 0 || agree(embed_dim, heads * head_dim);
    if (weight.rank == 3) {
      check_grouped_weight(arguments, attributes);
    } else if (!agree(std::array{int64_t{3}, num_heads, head_dim, embed_dim}, weight) || !packs_width) {
      if (weight.rank == 4 && weight[0] == 3) check_width_of_x(arguments, heads, head_dim);
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
      refuse(arguments.op, "ValueError", arguments.names[kQKVWeight],
             "heads among the " + std::to_string(heads) + " in all",
             std::to_string(num_heads) + " from head " + std::to_string(attributes.first_head));
    }
    const auto check = [&](Input input, Shape expected) { arguments.check_shape(input, expected, {kX, kQKVWeight}); };
    const std::array width{embed_dim};
    check(kLinearWeight,
          std::array{attributes.total_heads && head_dim >= 0 ? num_heads * head_dim : embed_dim, embed_dim});
    for (Input input : {kPreLnScale, kPreLnBias, kLnScale, kLnBias}) check(input, width);
    if (weight.rank == 3) {
      check(kQKVBias, std::array{weight[0], head_dim});
    } else {
      check(kQKVBias, std::array{int64_t{3}, num_heads, head_dim});
    }
    check(kLinearBias, width);
    if (is_packed) {
      if (arguments.has(kAttnMask)) refuse(arguments.op, "ValueError", "attn_mask", "none with cu_seqlens", "a tensor");
      const Shape starts = arguments.shapes[kCuSeqlens];
      if (arguments.dtypes[kCuSeqlens] != "int32") arguments.refuse_dtype(kCuSeqlens, "int32");
      if (starts.rank != 1 || starts[0] == 0) arguments.refuse_shape(kCuSeqlens, "shape [batch + 1]");
      return;
    }

    check_mask_shape(arguments, kAttnMask, {x[0], num_heads, x[1], x[1]}, "[batch, num_heads, seq_len, seq_len]");
  }

  // Refuses x where the weight agrees with itself on another width, so that x is the likelier one to be wrong.
  static void check_width_of_x(const Arguments& arguments, int64_t num_heads, int64_t head_dim) {
    const Shape x = arguments.shapes[kX], weight = arguments.shapes[kQKVWeight];
    const int64_t width = num_heads * head_dim;
    if (num_heads <= 0 || head_dim <= 0 || weight.last() != width || agree(x.last(), width)) return;
    arguments.refuse_shape(kX, (x.rank == 2 ? "shape [tokens, " : "shape [batch, seq_len, ") + std::to_string(width) +
                                   "] for " + arguments.names[kQKVWeight] + " of shape " + text(weight));
  }

  // [H + 2 * num_kv_heads, D, E], of a whole layer.
  static void check_grouped_weight(const Arguments& arguments, const Attributes& attributes) {
    const Shape weight = arguments.shapes[kQKVWeight];
    const int64_t embed_dim = arguments.shapes[kX].last();
    const auto [num_heads, num_kv_heads, head_dim] = HeadSizes(weight);
    const bool splits = head_dim < 0 || embed_dim < 0 || (head_dim > 0 && embed_dim % head_dim == 0);
    const bool groups =
        num_heads < 0 || weight[0] < 0 ||
        (num_kv_heads > 0 && num_heads + 2 * num_kv_heads == weight[0] && num_heads % num_kv_heads == 0);
    if (!agree(embed_dim, weight[2]) || !splits || !groups) {
      if (groups) check_width_of_x(arguments, num_heads, head_dim);
      const std::string width = std::to_string(embed_dim);
      arguments.refuse_shape(kQKVWeight, "shape [num_heads + 2 * num_kv_heads, head_dim, " + width +
                                             "] with num_heads * head_dim = " + width +
                                             " and num_kv_heads that divides num_heads, for x of shape " +
                                             text(arguments.shapes[kX]));
    }
    if (attributes.total_heads) {
      refuse(arguments.op, "ValueError", "qkv_weight",
             "shape [3, num_heads, head_dim, embed_dim] where heads are spread", text(weight));
    }
  }

  static Params describe(const paddle::Tensor* const* tensors, const Attributes& attributes) {
    Params p;
    describe_block(p, tensors, kQKVWeight, {kPreLnScale, kPreLnBias, kLnScale, kLnBias}, attributes);
    const Shape x = shape_of(*tensors[kX]);
    p.has_arranged_weights = is_arranged(shape_of(*tensors[kLinearWeight]));
    if (p.has_arranged_weights) check_on_cpu(kType, *tensors[kLinearWeight], "linear_weight");
    if (attributes.is_packed()) {
      p.batch = tensors[kCuSeqlens]->numel() - 1;
      p.seq_len = attributes.max_seqlen;
      p.starts = starts_of(kType, *tensors[kCuSeqlens], "cu_seqlens", x[0], "max_seqlen", p.seq_len);
    } else {
      p.batch = x[0];
      p.seq_len = x[1];
    }
    const Shape weight = shape_of(*tensors[kQKVWeight]);
    const HeadSizes heads = p.has_arranged_weights ? HeadSizes(plain_qkv_weight(weight).shape()) : HeadSizes(weight);
    p.num_heads = heads.num_heads;
    p.num_kv_heads = heads.num_kv_heads;
    p.head_dim = heads.head_dim;
    if (tensors[kX]->is_gpu() && p.head_dim > kMaxHeadDimOnGpu) {
      refuse(kType, "ValueError", "qkv_weight", "head_dim of at most " + std::to_string(kMaxHeadDimOnGpu) + " on a GPU",
             std::to_string(p.head_dim));
    }
    p.first_head = attributes.first_head;
    p.total_heads = attributes.total_heads;
    p.scale = scale_of(attributes.scale, p.head_dim);
    p.causal = attributes.has(kCausal);
    p.window_left = attributes.window_left;
    p.window_right = attributes.window_right;
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
    if (attributes.is_packed()) return sharding_of_rows({-1, -1}, heads);
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

  // A mask of all sequences sums its gradient over them.
  static bool has_rows(int input, Shape shape) {
    return input == kX || (input == kAttnMask && shape.rank == 4 && shape[0] != 1);
  }

  static bool comes_before_parts(int input, Shape shape) {
    if (input == kAttnMask) return shape.rank < 3 || shape[shape.rank - 3] == 1;
    return input == kX || input == kPreLnScale || input == kPreLnBias;
  }
};

// Sequences that are not packed, of as many keys as queries, which see them by mask and `causal` alone; the mask is
// constant.
struct FusedAttention : BlockOperator {
  using Params = AttentionBlockParams;
  struct Attributes : op::Attributes {
    int64_t PFA_BLOCK_ATTRIBUTES(PFA_MEMBER);
  };
  static constexpr char kType[] = "custom_fused_attention";
  static constexpr const char* kInputNames[] = {PFA_ATTENTION_DIFFERENTIABLE_INPUTS(PFA_INPUT_NAME)};
  static constexpr const char* kArgumentNames[] = {PFA_ATTENTION_DIFFERENTIABLE_INPUTS(PFA_ARGUMENT_NAME)};
  static constexpr size_t kRequiredCount = GeneralAttention::kRequiredCount;
  static constexpr const char* kAttributeNames[] = {PFA_BLOCK_ATTRIBUTES(PFA_ATTRIBUTE_NAME)};
  static constexpr const auto& kInputs = attention::kParameters;

  static GeneralAttention::Attributes general(const Attributes& attributes) {
    GeneralAttention::Attributes result{};
    static_cast<op::Attributes&>(result) = attributes;
#define PFA_COPY(name) result.name = attributes.name
    PFA_BLOCK_ATTRIBUTES(PFA_COPY);
#undef PFA_COPY
    constexpr int64_t kKnownInputs = (int64_t{1} << std::size(kInputNames)) - 1;
    result.present &= kKnownInputs;
    result.scale = kDefaultScale;
    result.window_left = result.window_right = -1;
    return result;
  }

  static void check(Arguments arguments, const Attributes& attributes) {
    const auto all = general(attributes);
    arguments.present = all.present;
    GeneralAttention::check(arguments, all);
  }

  static Params describe(const paddle::Tensor* const* tensors, const Attributes& attributes) {
    Params p = GeneralAttention::describe(tensors, general(attributes));
    if (attributes.has_input(kAttnMask)) p.attn_mask = tensors[kAttnMask]->data();
    return p;
  }

  static bool drops(const Params& p) { return GeneralAttention::drops(p); }

  static Sharding sharding_of(const std::vector<Mapping>& mappings, const Attributes& attributes) {
    return GeneralAttention::sharding_of(mappings, general(attributes));
  }

  static Mapping mapping_of(int input, Shape shape, const Sharding& sharding, const Attributes& attributes) {
    return GeneralAttention::mapping_of(input, shape, sharding, general(attributes));
  }

  static bool has_rows(int input, Shape shape) { return GeneralAttention::has_rows(input, shape); }

  static bool comes_before_parts(int input, Shape shape) { return GeneralAttention::comes_before_parts(input, shape); }
};

// The keys and values that come before those of the block, or all that there are, [batch, num_kv_heads, length,
// head_dim] each; or both in one tensor, [2, ...].
struct Cache {
  const paddle::Tensor* key;
  const paddle::Tensor* value;  // null: in `key`
  bool is_all;

  // Whether its tensors are those of such a block; `weight` is one of the block's, `length` that of its sequences.
  bool fits(const AttentionBlockParams& block, const paddle::Tensor& weight, int64_t length) const {
    const std::array both{int64_t{2}, block.batch, block.num_kv_heads, length, block.head_dim};
    const Shape expected = value ? Shape(both.data() + 1, both.size() - 1) : Shape(both);
    for (const paddle::Tensor* tensor : {key, value}) {
      if (!tensor) continue;
      if (!agree(expected, shape_of(*tensor)) || tensor->place() != weight.place() || tensor->dtype() != weight.dtype())
        return false;
    }
    return true;
  }
};

// The block with a cache, on the CPU. Nothing where it does not serve what came, or that does not fit; else the result
// and, unless the cache is all, the new cache in as many tensors as the old.
std::optional<std::vector<paddle::Tensor>> attend_with_cache(const Tensors<GeneralAttention>& tensors,
                                                             const GeneralAttention::Attributes& attributes,
                                                             const Cache& cache) {
  const paddle::Tensor& x = *tensors[kX];
  if (!x.is_cpu() || x.numel() == 0 || attributes.is_packed()) return std::nullopt;
  const Shapes<GeneralAttention> shapes = shapes_of<GeneralAttention>(tensors, attributes);
  GeneralAttention::Attributes without_mask = attributes;  // which has columns for the cache
  without_mask.present &= ~(int64_t{1} << kAttnMask);
  CachedAttentionParams p;
  AttentionBlockParams& block = p.block;
  block = describe<GeneralAttention>(tensors, shapes, without_mask);
  if (GeneralAttention::drops(block)) return std::nullopt;
  if (cache.is_all && block.has_arranged_weights && block.heads_dim() % kArrangedColumns != 0) return std::nullopt;

  const Shape cached = shape_of(*cache.key);
  if (cached.rank < 4) return std::nullopt;
  p.cached_keys = cached[cached.rank - 2];
  if (!cache.fits(block, *tensors[kQKVWeight], p.cached_keys)) return std::nullopt;
  const int64_t numbers = block.batch * block.num_kv_heads * block.head_dim;
  const auto second = [&](const paddle::Tensor& both, int64_t keys) {
    return static_cast<const char*>(both.data()) + numbers * keys * size_of(block.dtype);
  };
  p.cached_key = cache.key->data();
  p.cached_value = cache.value ? cache.value->data() : second(*cache.key, p.cached_keys);

  const int64_t keys = p.cached_keys + (cache.is_all ? 0 : block.seq_len);
  if (attributes.has_input(kAttnMask)) {
    Dtypes<GeneralAttention> dtypes;
    dtypes[kAttnMask] = phi::DataTypeToString(tensors[kAttnMask]->dtype());
    const Arguments arguments{GeneralAttention::kType, GeneralAttention::kArgumentNames, shapes.data(), dtypes.data(),
                              attributes.present};
    check_mask_dtype(arguments, kAttnMask);
    check_mask_shape(arguments, kAttnMask, {block.batch, block.num_heads, block.seq_len, keys},
                     "[batch, num_heads, queries, keys]");
    check_place(GeneralAttention::kType, *tensors[kAttnMask], GeneralAttention::kArgumentNames[kAttnMask], x);
    block.mask = mask_of(*tensors[kAttnMask]);
    block.attn_mask = tensors[kAttnMask]->data();
  }

  std::vector<paddle::Tensor> results = {allocate(x.shape(), x.dtype(), x.place())};
  block.out = results[0].data();
  if (!cache.is_all) {
    Sizes sizes = {block.batch, block.num_kv_heads, keys, block.head_dim};
    if (!cache.value) sizes.insert(sizes.begin(), 2);
    for (int i = 0; i < (cache.value ? 2 : 1); ++i) {
      results.push_back(allocate(sizes, cache.key->dtype(), x.place()));
    }
    p.key = results[1].data();
    p.value = cache.value ? results[2].data() : const_cast<char*>(second(results[1], keys));
  }
  CpuDevice device;
  Workspace workspace(forward_workspace_bytes(device.context, p), x.place());
  run_forward(device.context, p, workspace.data());
  return results;
}

}  // namespace
}  // namespace pfa::op

// For Python: a tuple of the block's results with a cache, whose gradients nobody wants. `inputs` are those of
// custom_fused_attention_general and the cache's key and value, or `otherwise`. `attributes` are the operator's.
// Returns `otherwise` where the smaller operators serve, or raise what is wrong.
extern "C" __attribute__((visibility("default"))) pfa::op::PythonObject* custom_fused_attention_cached(
    pfa::op::PythonObject* const* inputs, const int64_t* attributes, int is_all, pfa::op::PythonObject* otherwise) {
  using namespace pfa::op;
  const auto parsed = attributes_of<GeneralAttention>(attributes);
  Tensors<GeneralAttention> tensors;
  PythonObject* const* const cached = inputs + tensors.size();
  const Cache cache{plain_tensor(cached[0]), cached[1] == otherwise ? nullptr : plain_tensor(cached[1]), is_all != 0};
  const bool is_plain = cache.key && (cache.value || cached[1] == otherwise);
  if (!is_plain || !find_plain<GeneralAttention>(inputs, parsed, tensors)) return referred(otherwise);
  std::optional<std::vector<paddle::Tensor>> results;
  try {
    const WithoutPython scope;
    results = attend_with_cache(tensors, parsed, cache);
  } catch (...) {
    return referred(otherwise);
  }
  return results ? python_tuple(*results) : referred(otherwise);
}

PFA_REGISTER(custom_fused_attention, pfa::op::FusedAttention);
PFA_REGISTER(custom_fused_attention_general, pfa::op::GeneralAttention);
