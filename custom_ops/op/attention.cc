// custom_attention: attention by itself; and custom_attention_weights, the weights that it gave to its values.

#include "core/attention_weights.h"
#include "core/bare_attention.h"

#include <algorithm>
#include <limits>

#include "core/inputs.h"
#include "op/blocks.h"
#include "op/operator.h"
#include "op/scores.h"

namespace pfa::op {
namespace {

using namespace bare_attention;

// Key and value may lie behind query: an absent key has its heads after those of query, in query's tensor, and an
// absent value its heads after those of key, wherever these lie.
//
// `scale` and `dropout_rate` are float64 numbers; a scale of NaN is head_dim^-0.5. A window of -1 has no end. Of packed
// sequences max_seqlen_q and max_seqlen_k are the longest. Of the heads of a layer that has total_heads, 0 for no
// others, these are those from first_head on. num_kv_heads is read where key and value are absent; 0: as many as of
// queries.
#define PFA_OWN_ATTRIBUTES(DO)                                                                                  \
  DO(scale), DO(dropout_rate), DO(seed), DO(window_left), DO(window_right), DO(max_seqlen_q), DO(max_seqlen_k), \
      DO(first_head), DO(total_heads), DO(num_kv_heads)

struct Attention {
  using Params = BareAttentionParams;
  struct Attributes : op::Attributes {
    int64_t PFA_OWN_ATTRIBUTES(PFA_MEMBER);

    bool is_packed() const { return has_input(kCuSeqlensQ); }
    bool key_behind_query() const { return !has_input(kKey); }
    bool value_behind_key() const { return !has_input(kValue); }
    size_t key_axis() const { return has(kKeysByHead) ? 2 : 1; }  // of tokens in a key that is not packed
  };
  static constexpr char kType[] = "custom_attention";
  static constexpr const char* kInputNames[] = {PFA_BARE_ATTENTION_INPUTS(PFA_INPUT_NAME)};
  static constexpr const char* kArgumentNames[] = {PFA_BARE_ATTENTION_INPUTS(PFA_ARGUMENT_NAME)};
  static constexpr size_t kRequiredCount = 1;
  static constexpr const char* kAttributeNames[] = {PFA_OWN_ATTRIBUTES(PFA_ATTRIBUTE_NAME)};
  static constexpr const auto& kInputs = bare_attention::kInputs;
  static constexpr bool kReadsOut = true;
  static constexpr int kMaskInput = kAttnMask;
  static constexpr char kOutLike[] = "shape and dtype of query";

  // What the shapes say, which have been checked or belong to a graph. -1: not known.
  struct Counts {
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t keys;  // of all sequences, where they are packed
  };
  static Counts counts_of(const Shape* shapes, const Attributes& attributes) {
    const Shape query = shapes[kQuery];
    const auto heads = [&](int input) {
      const Shape shape = shapes[input];
      return shape[input != kQuery && attributes.has(kKeysByHead) ? 1 : shape.rank - 2];
    };
    const int64_t behind = attributes.value_behind_key() ? 2 : 1;  // heads of keys for each one of them
    Counts counts{heads(kQuery), 0, 0};
    if (!attributes.key_behind_query()) {
      const Shape key = shapes[kKey];
      counts.num_kv_heads = heads(kKey) < 0 ? -1 : heads(kKey) / behind;
      counts.keys = attributes.is_packed() ? key[0] : key[attributes.key_axis()];
      return counts;
    }
    counts.keys = query[attributes.is_packed() ? 0 : 1];
    if (!attributes.value_behind_key()) {
      counts.num_kv_heads = heads(kValue);
    } else if (attributes.num_kv_heads) {
      counts.num_kv_heads = attributes.num_kv_heads;
    } else {
      counts.num_kv_heads = counts.num_heads < 0 ? -1 : counts.num_heads / 3;
    }
    if (counts.num_heads >= 0) {
      counts.num_heads = counts.num_kv_heads < 0 ? -1 : counts.num_heads - behind * counts.num_kv_heads;
    }
    return counts;
  }

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
    if (attributes.num_kv_heads < 0 || attributes.num_kv_heads > std::numeric_limits<int32_t>::max()) {
      refuse(kType, "ValueError", "num_kv_heads", "0 or more and less than 2^31",
             std::to_string(attributes.num_kv_heads));
    }
    if (attributes.has(kKeysByHead) && (attributes.key_behind_query() || attributes.is_packed())) {
      refuse(kType, "ValueError", "key", "a tensor of its own, and no packed sequences, as it is by head", "another");
    }
    const size_t rank = attributes.is_packed() ? 3 : 4;
    if (arguments.shapes[kQuery].rank != rank) {
      arguments.refuse_shape(kQuery, attributes.is_packed() ? "shape [tokens, num_heads, head_dim] of packed sequences"
                                                            : "shape [batch, queries, num_heads, head_dim]");
    }
    check_heads(arguments, attributes);
    check_first_head(arguments, attributes);
    if (attributes.is_packed()) {
      check_packed(arguments);
    } else {
      check_dense(arguments, attributes);
    }
  }

  static void check_heads(const Arguments& arguments, const Attributes& attributes) {
    const Shape query = arguments.shapes[kQuery];
    const size_t rank = query.rank;
    const int64_t head_dim = query.last();
    if (query[rank - 2] == 0 || head_dim == 0) arguments.refuse_shape(kQuery, "num_heads and head_dim of at least 1");
    for (int input : {kKey, kValue}) {
      if (arguments.has(input) && arguments.shapes[input].rank != rank) refuse_heads(arguments, attributes, input);
    }
    const Counts counts = counts_of(arguments.shapes, attributes);
    const int64_t num_heads = counts.num_heads, num_kv_heads = counts.num_kv_heads, keys = counts.keys;
    // num_heads is less than 0 also where more heads of keys lie behind the query than it has.
    const bool known = query[rank - 2] >= 0 && num_kv_heads >= 0;
    const bool divides = !known || (num_kv_heads > 0 && num_heads > 0 && num_heads % num_kv_heads == 0);
    const int64_t behind = attributes.value_behind_key() ? 2 : 1;
    const auto fits = [&](int input) {  // with key, or value if key lies behind query
      const Shape shape = arguments.shapes[input];
      const int64_t heads = num_kv_heads < 0 ? -1 : (input == kKey ? behind : 1) * num_kv_heads;
      if (!agree(head_dim, shape.last()) || (rank == 4 && !agree(query[0], shape[0]))) return false;
      return agree(heads, shape[attributes.has(kKeysByHead) ? 1 : rank - 2]) &&
             agree(keys, shape[attributes.is_packed() ? 0 : attributes.key_axis()]);
    };
    if (arguments.has(kKey)) {
      if (!divides || !fits(kKey)) refuse_heads(arguments, attributes, kKey);
      if (arguments.has(kValue) && !agree(arguments.shapes[kKey], arguments.shapes[kValue])) {
        arguments.check_shape(kValue, arguments.shapes[kKey], {kKey});
      }
      return;
    }
    const bool thirds =
        !attributes.value_behind_key() || attributes.num_kv_heads || query[rank - 2] < 0 || query[rank - 2] % 3 == 0;
    if (!divides || !thirds) refuse_heads(arguments, attributes, kQuery);
    if (arguments.has(kValue) && !fits(kValue)) refuse_heads(arguments, attributes, kValue);
  }

  // Says what shape the input should have, by whether others lie behind it.
  [[noreturn]] static void refuse_heads(const Arguments& arguments, const Attributes& attributes, int input) {
    const bool is_query = input == kQuery;
    const std::string tokens = attributes.is_packed() ? "tokens" : is_query ? "batch, queries" : "batch, keys";
    std::string heads = is_query ? "num_heads + num_kv_heads" : "num_kv_heads";
    if (attributes.value_behind_key() && (is_query || input == kKey)) {
      heads = is_query ? "num_heads + 2 * num_kv_heads" : "2 * num_kv_heads";
    }
    const std::string order = attributes.has(kKeysByHead) ? "batch, " + heads + ", keys" : tokens + ", " + heads;
    const std::string like = is_query ? "" : ", for query of shape " + text(arguments.shapes[kQuery]);
    arguments.refuse_shape(input, "shape [" + order + ", head_dim] with num_kv_heads that divides num_heads" + like);
  }

  static void check_first_head(const Arguments& arguments, const Attributes& attributes) {
    const int64_t num_heads = counts_of(arguments.shapes, attributes).num_heads;
    const int64_t first = attributes.first_head, total = attributes.total_heads;
    if (total ? first < 0 || total < 0 || num_heads > total || first > total - std::max<int64_t>(num_heads, 0)
              : first != 0) {
      refuse(kType, "ValueError", "first_head",
             "one that leaves room for num_heads " + std::to_string(num_heads) + " of total_heads " +
                 std::to_string(total),
             std::to_string(first));
    }
  }

  static void check_dense(const Arguments& arguments, const Attributes& attributes) {
    const Shape query = arguments.shapes[kQuery];
    const auto [num_heads, num_kv_heads, keys] = counts_of(arguments.shapes, attributes);
    check_mask_shape(arguments, kAttnMask, {query[0], num_heads, query[1], keys}, "[batch, num_heads, queries, keys]");
    if (!arguments.has(kStartendRowIndices)) return;
    const Shape ranges = arguments.shapes[kStartendRowIndices];
    const bool causal = attributes.has(kCausal);
    const bool fits = ranges.rank == 4 && agree(query[0], ranges[0]) &&
                      (ranges[1] == 1 || agree(num_kv_heads, ranges[1])) && agree(keys, ranges[2]) &&
                      (ranges[3] == 2 || agree(causal ? 1 : 4, ranges[3]));
    if (!fits) {
      arguments.refuse_shape(kStartendRowIndices,
                             std::string("shape [batch, num_kv_heads or 1, keys, ") +
                                 (causal ? "1 or 2], as it is causal," : "2 or 4], as it is not causal,") +
                                 (arguments.has(kKey) ? " for key" : " for query") + " of shape " +
                                 text(arguments.shapes[arguments.has(kKey) ? kKey : kQuery]));
    }
  }

  static void check_packed(const Arguments& arguments) {
    for (int input : {kAttnMask, kStartendRowIndices}) {
      if (arguments.has(input)) refuse(kType, "ValueError", arguments.names[input], "none with cu_seqlens", "a tensor");
    }
    const Shape starts = arguments.shapes[kCuSeqlensQ];
    if (starts.rank != 1 || starts[0] == 0) arguments.refuse_shape(kCuSeqlensQ, "shape [batch + 1]");
    arguments.check_shape(kCuSeqlensK, starts, {kCuSeqlensQ});
  }

  static Sizes out_shape(const Shape* shapes, const Attributes& attributes) {
    Sizes sizes = sizes_of(shapes[kQuery]);
    if (attributes.key_behind_query() && sizes.size() >= 3) {
      sizes[sizes.size() - 2] = counts_of(shapes, attributes).num_heads;
    }
    return sizes;
  }

  static Params describe(const paddle::Tensor* const* tensors, const Attributes& attributes) {
    Shape shapes[bare_attention::kInputCount];
    for (int input : {kQuery, kKey, kValue}) {
      if (attributes.has_input(input)) shapes[input] = shape_of(*tensors[input]);
    }
    const Shape query = shapes[kQuery];
    const Counts counts = counts_of(shapes, attributes);
    Params result;
    result.key_behind_query = attributes.key_behind_query();
    result.value_behind_key = attributes.value_behind_key();
    result.keys_by_head = attributes.has(kKeysByHead);
    AttentionParams& p = result.attention;
    p.num_heads = counts.num_heads;
    p.num_kv_heads = counts.num_kv_heads;
    p.head_dim = query.last();
    p.first_head = attributes.first_head;
    p.total_heads = attributes.total_heads;
    if (tensors[kQuery]->is_gpu() && p.head_dim > kMaxHeadDimOnGpu) {
      refuse(kType, "ValueError", "query", "head_dim of at most " + std::to_string(kMaxHeadDimOnGpu) + " on a GPU",
             std::to_string(p.head_dim));
    }
    if (attributes.is_packed()) {
      p.batch = tensors[kCuSeqlensQ]->numel() - 1;
      p.queries = attributes.max_seqlen_q;
      p.keys = attributes.max_seqlen_k;
      p.packed_queries = query[0];
      p.packed_keys = counts.keys;
      p.query_starts = starts_of(kType, *tensors[kCuSeqlensQ], "cu_seqlens_q", query[0], "max_seqlen_q", p.queries);
      p.key_starts = starts_of(kType, *tensors[kCuSeqlensK], "cu_seqlens_k", counts.keys, "max_seqlen_k", p.keys);
    } else {
      p.batch = query[0];
      p.queries = query[1];
      p.keys = counts.keys;
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

// Its attributes are those of the attention, and Statistics is what that saved. Sequences are not packed.
struct AttentionWeights {
  using Params = AttentionWeightsParams;
  using Attributes = Attention::Attributes;
  static constexpr char kType[] = "custom_attention_weights";
  static constexpr const char* kInputNames[] = {PFA_ATTENTION_WEIGHTS_INPUTS(PFA_INPUT_NAME)};
  static constexpr const char* kArgumentNames[] = {PFA_ATTENTION_WEIGHTS_INPUTS(PFA_ARGUMENT_NAME)};
  static constexpr size_t kRequiredCount = 2;
  static constexpr const auto& kAttributeNames = Attention::kAttributeNames;
  static constexpr const auto& kInputs = attention_weights::kInputs;
  static constexpr bool kReadsOut = true;
  static constexpr int kMaskInput = attention_weights::kAttnMask;
  static constexpr char kOutLike[] = "shape [batch, num_heads, queries, keys] and the dtype of query";

  // Where the attention's inputs stand among these; the value is as the key.
  static constexpr int kOfAttention[] = {attention_weights::kQuery,
                                         attention_weights::kKey,
                                         attention_weights::kKey,
                                         attention_weights::kAttnMask,
                                         -1,
                                         -1,
                                         attention_weights::kStartendRowIndices};

  static Attributes of_attention(Attributes attributes) {
    const int64_t present = attributes.present;
    attributes.present = 0;
    for (int i = 0; i < bare_attention::kInputCount; ++i) {
      if (kOfAttention[i] >= 0) attributes.present |= (present >> kOfAttention[i] & 1) << i;
    }
    return attributes;
  }

  template <class T>
  static std::array<T, bare_attention::kInputCount> of_attention(const T* all) {
    std::array<T, bare_attention::kInputCount> result{};
    for (int i = 0; i < bare_attention::kInputCount; ++i) {
      if (kOfAttention[i] >= 0) result[i] = all[kOfAttention[i]];
    }
    return result;
  }

  static void check(const Arguments& arguments, const Attributes& attributes) {
    const Attributes own = of_attention(attributes);
    const auto shapes = of_attention(arguments.shapes);
    const auto dtypes = of_attention(arguments.dtypes);
    Attention::check({kType, Attention::kArgumentNames, shapes.data(), dtypes.data(), own.present}, own);
    constexpr int kStatistics = attention_weights::kStatistics;
    if (!arguments.has(kStatistics)) refuse(kType, "TypeError", "statistics", "a tensor", "none");
    if (arguments.dtypes[kStatistics] != "uint8") arguments.refuse_dtype(kStatistics, "uint8");
    if (arguments.shapes[kStatistics].rank != 1) arguments.refuse_shape(kStatistics, "shape [bytes]");
  }

  static Sizes out_shape(const Shape* shapes, const Attributes& attributes) {
    const auto of_inputs = of_attention(shapes);
    const auto [num_heads, num_kv_heads, keys] = Attention::counts_of(of_inputs.data(), of_attention(attributes));
    return {shapes[attention_weights::kQuery][0], num_heads, shapes[attention_weights::kQuery][1], keys};
  }

  static Params describe(const paddle::Tensor* const* tensors, const Attributes& attributes) {
    Params p;
    static_cast<BareAttentionParams&>(p) = Attention::describe(of_attention(tensors).data(), of_attention(attributes));
    const paddle::Tensor& statistics = *tensors[attention_weights::kStatistics];
    const auto bytes = static_cast<int64_t>(saved_bytes(static_cast<const BareAttentionParams&>(p)));
    if (statistics.numel() != bytes) {
      refuse(kType, "ValueError", "statistics", std::to_string(bytes) + " bytes, as this attention saves",
             std::to_string(statistics.numel()));
    }
    p.statistics = statistics.data();
    return p;
  }

  static bool drops(const Params&) { return false; }  // what is dropped has been drawn

  static Sharding sharding_of(const std::vector<Mapping>& mappings, const Attributes&) {
    return {{mappings[attention_weights::kQuery][0], -1, -1, -1}};
  }

  static Mapping mapping_of(int input, Shape shape, const Sharding& sharding, const Attributes&) {
    Mapping mapping(shape.rank, -1);
    if (has_rows(input, shape)) mapping[0] = sharding.out[0];
    return mapping;
  }

  static bool has_rows(int input, Shape shape) {
    if (input == attention_weights::kStatistics) return false;
    return input != attention_weights::kAttnMask || (shape.rank == 4 && shape[0] != 1);
  }

  static bool comes_before_parts(int, Shape) { return false; }
};

}  // namespace
}  // namespace pfa::op

PFA_REGISTER(custom_attention, pfa::op::Attention);
PFA_REGISTER(custom_attention_weights, pfa::op::AttentionWeights);
