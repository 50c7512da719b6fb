// The blocks on device memory, for Python: class CudaBlock. The caller owns all memory, whatever library it comes from,
// and says where it lies: an array is an address (an int) or an object with __cuda_array_interface__.
#include "pybind/cuda_block.h"

#ifdef PFA_WITH_CUDA

#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <variant>

#include "core/attention_block.h"
#include "core/attention_weights.h"
#include "core/bare_attention.h"
#include "core/cuda/stages.h"
#include "core/feed_forward_block.h"
#include "core/linear_block.h"
#include "core/residual_norm_block.h"
#include "pybind/config.h"

namespace py = pybind11;

namespace pfa {
namespace {

const std::string& doc() {
  static const std::string text =
      "A block on one CUDA device, for one shape and one set of switches.\n\n"
      "CudaBlock(config, device=0): " +
      std::string(kConfigDoc) +
      "\n\n"
      "Methods take `arrays`, a dict from names to addresses or objects with __cuda_array_interface__: the inputs by "
      "their\n"
      "names in core/inputs.h, their gradients with d_ before these, out and d_out; for run_stage also what else its "
      "struct in\n"
      "core/params.h points to. What is missing is an absent input or a gradient that is not wanted. `mask`, of "
      "attention, is a\n"
      "tuple of an array, its dtype (such as bool, int32 or float16) and four strides in elements, 0 where it "
      "broadcasts; startend_row_indices one of an array, its number of heads and that of columns.\n"
      "`stream` is the address of a CUDA stream. Nothing is synchronised.";
  return text;
}

void* address_of(const py::handle& array) {
  if (array.is_none()) return nullptr;
  if (py::isinstance<py::int_>(array)) return reinterpret_cast<void*>(array.cast<uintptr_t>());
  if (!py::hasattr(array, "__cuda_array_interface__")) {
    throw py::type_error("expected an address or an object with __cuda_array_interface__, got " +
                         py::repr(py::type::handle_of(array)).cast<std::string>());
  }
  const py::dict interface = array.attr("__cuda_array_interface__");
  return reinterpret_cast<void*>(interface["data"].cast<py::tuple>()[0].cast<uintptr_t>());
}

// How an array is placed in a block's struct, by its name.
template <class P>
using Setters = std::map<std::string, std::function<void(P&, void*)>>;

template <class P, class Base, class Pointer>
typename Setters<P>::mapped_type setter_of(Pointer Base::* field) {
  return [field](P& p, void* value) { p.*field = static_cast<Pointer>(value); };
}

template <class P, size_t kCount>
Setters<P> setters_of_inputs(const InputPointers<P> (&inputs)[kCount]) {
  Setters<P> setters;
  for (const InputPointers<P>& input : inputs) {
    setters[input.name] = setter_of<P>(input.value);
    setters[std::string("d_") + input.name] = setter_of<P>(input.gradient);
  }
  setters["out"] = setter_of<P>(&P::out);
  setters["d_out"] = setter_of<P>(&P::d_out);
  return setters;
}

#define PFA_FIELD(name) {#name, setter_of<P>(&P::name)}

// Of what the attention and the feed-forward block share.
template <class P, size_t kCount>
Setters<P> setters_of_block(const InputPointers<P> (&inputs)[kCount]) {
  Setters<P> setters = setters_of_inputs(inputs);
  setters.insert({PFA_FIELD(random_state), PFA_FIELD(pre_ln_mean), PFA_FIELD(pre_ln_rstd), PFA_FIELD(hidden),
                  PFA_FIELD(y), PFA_FIELD(residual), PFA_FIELD(ln_mean), PFA_FIELD(ln_rstd), PFA_FIELD(d_residual),
                  PFA_FIELD(d_linear), PFA_FIELD(d_hidden), PFA_FIELD(stage_workspace)});
  return setters;
}

const Setters<AttentionBlockParams>& setters(const AttentionBlockParams&) {
  using P = AttentionBlockParams;
  static const Setters<P> all = [] {
    Setters<P> result = setters_of_block(attention::kInputs);
    result.insert({PFA_FIELD(qkv), PFA_FIELD(log_sum_exp), PFA_FIELD(score_shift), PFA_FIELD(attn_out),
                   PFA_FIELD(d_attn_out), PFA_FIELD(d_qkv)});
    return result;
  }();
  return all;
}

const Setters<BareAttentionParams>& setters(const BareAttentionParams&) {
  static const Setters<BareAttentionParams> all = setters_of_inputs(bare_attention::kInputs);
  return all;
}

const Setters<AttentionWeightsParams>& setters(const AttentionWeightsParams&) {
  using P = AttentionWeightsParams;
  static const Setters<P> all = [] {
    Setters<P> result = setters_of_inputs(attention_weights::kInputs);
    result["statistics"] = setter_of<P>(&P::statistics);
    return result;
  }();
  return all;
}

const Setters<FeedForwardParams>& setters(const FeedForwardParams&) {
  using P = FeedForwardParams;
  static const Setters<P> all = [] {
    Setters<P> result = setters_of_block(feed_forward::kInputs);
    result.insert({PFA_FIELD(pre_activation), PFA_FIELD(activated), PFA_FIELD(d_pre_activation)});
    return result;
  }();
  return all;
}

const Setters<ResidualNormParams>& setters(const ResidualNormParams&) {
  static const Setters<ResidualNormParams> all = setters_of_inputs(residual_norm::kInputs);
  return all;
}

const Setters<LinearParams>& setters(const LinearParams&) {
  using P = LinearParams;
  static const Setters<P> all = [] {
    Setters<P> result = setters_of_inputs(linear::kInputs);
    result.insert({PFA_FIELD(pre_activation), PFA_FIELD(d_pre_activation), PFA_FIELD(stage_workspace)});
    return result;
  }();
  return all;
}

#undef PFA_FIELD

template <class P>
using Stages = std::map<std::string, void (*)(cuda::Context&, const P&)>;

#define PFA_STAGE(name) {#name, [](cuda::Context& context, const P& p) { cuda::name(context, p); }}
#define PFA_BLOCK_STAGES                                                                                           \
  PFA_STAGE(narrow_x), PFA_STAGE(layer_norm_forward), PFA_STAGE(layer_norm_backward), PFA_STAGE(residual_forward), \
      PFA_STAGE(residual_backward)

const Stages<AttentionBlockParams>& stages(const AttentionBlockParams&) {
  using P = AttentionBlockParams;
  static const Stages<P> all = {
      PFA_BLOCK_STAGES,
      PFA_STAGE(qkv_linear_forward),
      PFA_STAGE(qkv_linear_backward),
      {"attention_forward",
       [](cuda::Context& context, const P& p) { cuda::attention_forward(context, attention_of(p)); }},
      {"attention_backward",
       [](cuda::Context& context, const P& p) { cuda::attention_backward(context, attention_of(p)); }},
      PFA_STAGE(output_linear_forward),
      PFA_STAGE(output_linear_backward)};
  return all;
}

const Stages<BareAttentionParams>& stages(const BareAttentionParams&) {
  static const Stages<BareAttentionParams> none;  // it is one
  return none;
}

const Stages<AttentionWeightsParams>& stages(const AttentionWeightsParams&) {
  static const Stages<AttentionWeightsParams> none;  // it is one
  return none;
}

const Stages<FeedForwardParams>& stages(const FeedForwardParams&) {
  using P = FeedForwardParams;
  static const Stages<P> all = {PFA_BLOCK_STAGES,           PFA_STAGE(store_random_state),
                                PFA_STAGE(linear1_forward), PFA_STAGE(linear1_backward),
                                PFA_STAGE(linear2_forward), PFA_STAGE(linear2_backward)};
  return all;
}

const Stages<ResidualNormParams>& stages(const ResidualNormParams&) {
  static const Stages<ResidualNormParams> none;  // its arrays' names don't tell an input from what is saved
  return none;
}

const Stages<LinearParams>& stages(const LinearParams&) {
  using P = LinearParams;
  static const Stages<P> all = {PFA_STAGE(linear_forward), PFA_STAGE(activation_backward), PFA_STAGE(linear_backward)};
  return all;
}

#undef PFA_BLOCK_STAGES
#undef PFA_STAGE

using AnyConfig =
    std::variant<Config<AttentionBlockParams>, Config<BareAttentionParams>, Config<AttentionWeightsParams>,
                 Config<FeedForwardParams>, Config<ResidualNormParams>, Config<LinearParams>>;

template <class P>
void set_seed(P& p, uint64_t seed, uint64_t offset) {
  if constexpr (!std::is_same_v<P, LinearParams>) {
    p.seed = seed;
    p.offset = offset;
  }
}

Mask mask_of(const py::handle& value) {
  const auto tuple = value.cast<py::tuple>();
  Mask mask;
  mask.data = address_of(tuple[0]);
  mask.dtype = dtype_of(tuple[1].cast<std::string>());
  const auto strides = tuple[2].cast<py::tuple>();
  for (size_t i = 0; i < 4; ++i) mask.strides[i] = strides[i].cast<int64_t>();
  return mask;
}

// Takes an input that is described by more than its address.
bool take_described(const std::string& name, const py::handle& value, AttentionBlockParams& p) {
  if (name == "mask") {
    p.mask = mask_of(value);
    p.attn_mask = p.mask.data;
  } else if (name == "cu_seqlens") {
    p.starts = static_cast<const int32_t*>(address_of(value));
  } else {
    return false;
  }
  return true;
}
bool take_described(const std::string& name, const py::handle& value, BareAttentionParams& p) {
  AttentionParams& a = p.attention;
  if (name == "mask") {
    a.mask = mask_of(value);
    p.attn_mask = a.mask.data;
  } else if (name == "cu_seqlens_q") {
    a.query_starts = static_cast<const int32_t*>(address_of(value));
  } else if (name == "cu_seqlens_k") {
    a.key_starts = static_cast<const int32_t*>(address_of(value));
  } else if (name == "startend_row_indices") {  // the array, its number of heads, and of columns
    const auto tuple = value.cast<py::tuple>();
    const auto heads = tuple[1].cast<int64_t>();
    const auto columns = tuple[2].cast<int>();
    a.hidden_ranges = {static_cast<const int32_t*>(address_of(tuple[0])), columns, a.causal, heads * a.keys * columns,
                       heads == 1 ? 0 : a.keys * columns};
  } else {
    return false;
  }
  return true;
}
bool take_described(const std::string& name, const py::handle& value, AttentionWeightsParams& p) {
  return take_described(name, value, static_cast<BareAttentionParams&>(p));
}
template <class P>
bool take_described(const std::string&, const py::handle&, P&) {
  return false;
}

class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    cuda::check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) cuda::check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

class CudaBlock {
 private:
  // Calls f(context, params) with the block's device current.
  template <class F>
  auto visit(const py::dict& arrays, uintptr_t stream, F&& f) const {
    return std::visit(
        [&](const auto& config) {
          auto p = config.params;
          place(arrays, p);
          CurrentDevice current(device_);
          cuda::Context context = cuda::make_context(reinterpret_cast<cudaStream_t>(stream), device_, config.allow_tf32,
                                                     config.deterministic);
          return f(context, p);
        },
        config_);
  }

  template <class P>
  static void place(const py::dict& arrays, P& p) {
    for (const auto& item : arrays) {
      const std::string name = item.first.cast<std::string>();
      if (take_described(name, item.second, p)) continue;
      const auto it = setters(p).find(name);
      if (it == setters(p).end()) throw py::value_error("arrays: unknown name " + name);
      it->second(p, address_of(item.second));
    }
  }

 public:
  CudaBlock(const py::dict& config, int device)
      : config_(with_config(config, [](const auto& parsed) { return AnyConfig(parsed); })), device_(device) {}

  size_t saved_bytes(const py::dict& arrays) const {
    return visit(arrays, 0, [](const cuda::Context&, const auto& p) { return pfa::saved_bytes(p); });
  }

  size_t forward_workspace_bytes(const py::dict& arrays, bool saves) const {
    return visit(arrays, 0, [&](const cuda::Context& context, const auto& p) {
      return pfa::forward_workspace_bytes(context, p, saves);
    });
  }

  size_t backward_workspace_bytes(const py::dict& arrays) const {
    return visit(arrays, 0,
                 [](const cuda::Context& context, const auto& p) { return pfa::backward_workspace_bytes(context, p); });
  }

  void forward(const py::dict& arrays, const py::object& saved, const py::object& workspace, uintptr_t stream,
               uint64_t seed, uint64_t offset) const {
    visit(arrays, stream, [&](cuda::Context& context, auto& p) {
      set_seed(p, seed, offset);
      run_forward(context, p, address_of(saved), address_of(workspace));
    });
  }

  void backward(const py::dict& arrays, const py::object& saved, const py::object& workspace, uintptr_t stream) const {
    visit(arrays, stream, [&](cuda::Context& context, const auto& p) {
      run_backward(context, p, address_of(saved), address_of(workspace));
    });
  }

  size_t stage_workspace_bytes(const py::dict& arrays, bool backward) const {
    return visit(arrays, 0, [&](const cuda::Context& context, const auto& p) {
      const auto bytes = [&](Phase phase) {
        if constexpr (std::is_base_of_v<BareAttentionParams, std::decay_t<decltype(p)>>) {
          return cuda::stage_workspace_bytes(context, with_tensors(p), phase);
        } else {
          return cuda::stage_workspace_bytes(context, p, phase);
        }
      };
      if (!backward) return bytes(Phase::kForward);
      return std::max({bytes(Phase::kOutputBackward), bytes(Phase::kAttentionBackward), bytes(Phase::kInputBackward)});
    });
  }

  void run_stage(const std::string& name, const py::dict& arrays, uintptr_t stream, uint64_t seed,
                 uint64_t offset) const {
    visit(arrays, stream, [&](cuda::Context& context, auto& p) {
      const auto it = stages(p).find(name);
      if (it == stages(p).end()) throw py::value_error("run_stage: unknown stage " + name);
      set_seed(p, seed, offset);
      it->second(context, p);
    });
  }

 private:
  AnyConfig config_;
  int device_;
};

}  // namespace

void bind_cuda(py::module_& module) {
  py::class_<CudaBlock>(module, "CudaBlock", doc().c_str())
      .def(py::init<const py::dict&, int>(), py::arg("config"), py::arg("device") = 0)
      .def("saved_bytes", &CudaBlock::saved_bytes, py::arg("arrays"), "Bytes that forward saves for backward.")
      .def("forward_workspace_bytes", &CudaBlock::forward_workspace_bytes, py::arg("arrays"), py::arg("saves"))
      .def("backward_workspace_bytes", &CudaBlock::backward_workspace_bytes, py::arg("arrays"))
      .def("forward", &CudaBlock::forward, py::arg("arrays"), py::arg("saved"), py::arg("workspace"), py::arg("stream"),
           py::arg("seed") = 0, py::arg("offset") = 0,
           "Writes out, and what backward needs to `saved` unless that is None.")
      .def("backward", &CudaBlock::backward, py::arg("arrays"), py::arg("saved"), py::arg("workspace"),
           py::arg("stream"), "Writes the gradients that are in `arrays`.")
      .def("stage_workspace_bytes", &CudaBlock::stage_workspace_bytes, py::arg("arrays"), py::arg("backward"))
      .def("run_stage", &CudaBlock::run_stage, py::arg("name"), py::arg("arrays"), py::arg("stream"),
           py::arg("seed") = 0, py::arg("offset") = 0,
           "Runs one stage, such as residual_backward, on the arrays it reads and writes; attention_forward and "
           "store_random_state write seed and offset to random_state.");
}

}  // namespace pfa

#endif
