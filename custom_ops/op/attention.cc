// custom_attention: attention by itself.

#include "core/bare_attention.h"

#include <algorithm>

#include "core/inputs.h"
#include "op/blocks.h"
#include "op/operator.h"
#include "op/scores.h"

namespace pfa::op {
namespace {

using namespace bare_attention;

// `scale` and `dropout_rate` are float64 numbers; a scale of NaN is head_dim^-0.5. A window of -1 has no end. Of packed
// sequences max_seqlen_q and max_seqlen_k are the longest.
#define PFA_OWN_ATTRIBUTES(DO) \
  DO(scale), DO(dropout_rate), DO(seed), DO(window_left), DO(window_right), DO(max_seqlen_q), DO(max_seqlen_k)

struct Attention {
  using Params = BareAttentionParams;
  struct Attributes : op::Attributes {
    int64_t PFA_OWN_ATTRIBUTES(PFA_MEMBER);

    bool is_packed() const { return has_input(kCuSeqlensQ); }
  };
  static constexpr char kType[] = "custom_attention";
  static constexpr const char* kInputNames[] = {PFA_BARE_ATTENTION_INPUTS(PFA_INPUT_NAME)};
  static constexpr const char* kArgumentNames[] = {PFA_BARE_ATTENTION_INPUTS(PFA_ARGUMENT_NAME)};
  static constexpr size_t kRequiredCount = 3;
  static constexpr const char* kAttributeNames[] = {PFA_OWN_ATTRIBUTES(PFA_ATTRIBUTE_NAME)};
  static constexpr const auto& kInputs = bare_attention::kInputs;
  static constexpr bool kReadsOut = true;
  static constexpr int kMaskInput = kAttnMask;
  static constexpr char kOutLike[] = "shape and dtype of query";

  static void check(const Arguments& arguments, const Attributes& attributes) {
    arguments.check_float(kQuery);
    arguments.check_dtype_like(kKey, kQuery);
    arguments.check_dtype_like(kValue, kQuery);
    check_mask_dtype(arguments, kAttnMask);
    check_scores(kType, attributes.scale, attributes.window_left, attributes.window_right);
    check_longest(kType, "max_seqlen_q", attributes.max_seqlen_q);
    check_longest(kType, "max_seqlen_k", attributes.max_seqlen_k);
    for (int input : {kCuSeqlensQ, kCuSeqlensK, kStartendRowIndices}) {
      if (arguments.has(input) && arguments.dtypes[input] != "int32") arguments.refuse_dtype(input, "int32");
    }
    for (const auto& [input, other] : {std::pair{kCuSeqlensQ, kCuSeqlensK}, {kCuSeqlensK, kCuSeqlensQ}}) {
      if (!arguments.has(input) && arguments.has(other)) {
        refuse(kType, "TypeError", arguments.names[input], std::string("a tensor beside ") + arguments.names[other],
               "none");
      }
    }
    if (attributes.is_packed()) {
      check_packed(arguments, attributes);
    } else {
      check_dense(arguments, attributes);
    }
  }

  // Of query [.., H, D], key and value [.., Hkv, D]; `tokens` names what comes before, of keys.
  static void check_heads(const Arguments& arguments, const std::string& tokens) {
    const Shape query = arguments.shapes[kQuery];
    const Shape key = arguments.shapes[kKey];
    const int64_t num_heads = query[query.rank - 2];
    const int64_t head_dim = query.last();
    if (num_heads == 0 || head_dim == 0) arguments.refuse_shape(kQuery, "num_heads and head_dim of at least 1");
    const int64_t kv_heads = key.rank == query.rank ? key[key.rank - 2] : 0;
    const bool divides = kv_heads < 0 || num_heads < 0 || (kv_heads > 0 && num_heads % kv_heads == 0);
    const bool same_batch = query.rank == 3 || (key.rank == 4 && agree(query[0], key[0]));
    if (!divides || !same_batch || !agree(head_dim, key.last())) {
      arguments.refuse_shape(kKey, "shape " + tokens + ", num_kv_heads, head_dim] with num_kv_heads that divides " +
                                       "num_heads, for query of shape " + text(query));
    }
    if (!agree(key, arguments.shapes[kValue])) arguments.check_shape(kValue, key, {kKey});
  }

  static void check_dense(const Arguments& arguments, const Attributes& attributes) {
    const Shape query = arguments.shapes[kQuery];
    const Shape key = arguments.shapes[kKey];
    if (query.rank != 4) arguments.refuse_shape(kQuery, "shape [batch, queries, num_heads, head_dim]");
    check_heads(arguments, "[batch, keys");
    check_mask_shape(arguments, kAttnMask, {query[0], query[2], query[1], key[1]}, "[batch, num_heads, queries, keys]");
    if (!arguments.has(kStartendRowIndices)) return;
    const Shape ranges = arguments.shapes[kStartendRowIndices];
    const bool causal = attributes.has(kCausal);
    const bool fits = ranges.rank == 4 && agree(query[0], ranges[0]) && (ranges[1] == 1 || agree(key[2], ranges[1])) &&
                      agree(key[1], ranges[2]) && (ranges[3] == 2 || agree(causal ? 1 : 4, ranges[3]));
    if (!fits) {
      arguments.refuse_shape(kStartendRowIndices,
                             std::string("shape [batch, num_kv_heads or 1, keys, ") +
                                 (causal ? "1 or 2], as it is causal," : "2 or 4], as it is not causal,") +
                                 " for key of shape " + text(key));
    }
  }

  static void check_packed(const Arguments& arguments, const Attributes&) {
    if (arguments.shapes[kQuery].rank != 3) {
      arguments.refuse_shape(kQuery, "shape [tokens, num_heads, head_dim], as sequences are packed,");
    }
    check_heads(arguments, "[tokens");
    for (int input : {kAttnMask, kStartendRowIndices}) {
      if (arguments.has(input)) refuse(kType, "ValueError", arguments.names[input], "none with cu_seqlens", "a tensor");
    }
    const Shape starts = arguments.shapes[kCuSeqlensQ];
    if (starts.rank != 1 || starts[0] == 0) arguments.refuse_shape(kCuSeqlensQ, "shape [batch + 1]");
    arguments.check_shape(kCuSeqlensK, starts, {kCuSeqlensQ});
  }

  static Sizes out_shape(const Shape* shapes, const Attributes&) { return sizes_of(shapes[kQuery]); }

  static Params describe(const paddle::Tensor* const* tensors, const Attributes& attributes) {
    const Shape query = shape_of(*tensors[kQuery]);
    const Shape key = shape_of(*tensors[kKey]);
    Params result;
    AttentionParams& p = result.attention;
    p.num_heads = query[query.rank - 2];
    p.num_kv_heads = key[key.rank - 2];
    p.head_dim = query.last();
    if (tensors[kQuery]->is_gpu() && p.head_dim > kMaxHeadDimOnGpu) {
      refuse(kType, "ValueError", "query", "head_dim of at most " + std::to_string(kMaxHeadDimOnGpu) + " on a GPU",
             std::to_string(p.head_dim));
    }
    if (attributes.is_packed()) {
      p.batch = tensors[kCuSeqlensQ]->numel() - 1;
      p.queries = attributes.max_seqlen_q;
      p.keys = attributes.max_seqlen_k;
      p.packed_queries = query[0];
      p.packed_keys = key[0];
      p.query_starts = starts_of(kType, *tensors[kCuSeqlensQ], "cu_seqlens_q", query[0], "max_seqlen_q", p.queries);
      p.key_starts = starts_of(kType, *tensors[kCuSeqlensK], "cu_seqlens_k", key[0], "max_seqlen_k", p.keys);
    } else {
      p.batch = query[0];
      p.queries = query[1];
      p.keys = key[1];
    }
    p.dtype = core_dtype(tensors[kQuery]->dtype());
    p.scale = scale_of(attributes.scale, p.head_dim);
    p.causal = attributes.has(kCausal);
    p.window_left = attributes.window_left;
    p.window_right = attributes.window_right;
    p.dropout = dropout_of(attributes.dropout_rate, attributes);
    if (attributes.has_input(kAttnMask)) p.mask = mask_of(*tensors[kAttnMask]);
    if (attributes.has_input(kStartendRowIndices)) {
      const paddle::Tensor& ranges = *tensors[kStartendRowIndices];
      const Shape shape = shape_of(ranges);
      const int64_t head_stride = shape[2] * shape[3];
      p.hidden_ranges = {ranges.data<int32_t>(), static_cast<int>(shape[3]), p.causal, shape[1] * head_stride,
                         shape[1] == 1 ? 0 : head_stride};
    }
    return result;
  }

  static bool drops(const Params& p) { return p.attention.dropout.threshold; }

  // Sequences may lie on several processes, unless they are packed.
  static Sharding sharding_of(const std::vector<Mapping>& mappings, const Attributes& attributes) {
    Sharding sharding{Mapping(mappings[kQuery].size(), -1)};
    if (!attributes.is_packed()) sharding.out[0] = mappings[kQuery][0];
    return sharding;
  }

  static Mapping mapping_of(int input, Shape shape, const Sharding& sharding, const Attributes&) {
    Mapping mapping(shape.rank, -1);
    if (has_rows(input, shape)) mapping[0] = sharding.out[0];
    return mapping;
  }

  // A mask of all sequences sums its gradient over them.
  static bool has_rows(int input, Shape shape) {
    if (input == kCuSeqlensQ || input == kCuSeqlensK) return false;
    return input != kAttnMask || (shape.rank == 4 && shape[0] != 1);
  }

  static bool comes_before_parts(int, Shape) { return false; }
};

}  // namespace
}  // namespace pfa::op

PFA_REGISTER(custom_attention, pfa::op::Attention);
