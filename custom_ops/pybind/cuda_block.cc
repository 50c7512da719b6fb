// The block on device memory, for Python: class CudaBlock. The caller owns all memory, whatever library it comes from,
// and says where it lies: an array is an address (an int) or an object with __cuda_array_interface__.
#include "pybind/cuda_block.h"

#ifdef PFA_WITH_CUDA

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

#include "core/attention_block.h"
#include "core/cuda/stages.h"
#include "pybind/config.h"

namespace py = pybind11;

namespace pfa {
namespace {

const std::string& doc() {
  static const std::string text =
      "The attention block on one CUDA device, for one shape and one set of switches.\n\n"
      "CudaBlock(config, device=0): " +
      std::string(kConfigDoc) +
      "\n\n"
      "Methods take `arrays`, a dict from the names of AttentionParams' pointers (x, qkv_weight, out, d_x, ...) to "
      "addresses or "
      "objects\n"
      "with __cuda_array_interface__; what is missing is an absent input or a gradient that is not wanted. `mask` is a "
      "tuple\n"
      "of an array, its dtype (such as bool, int32 or float16) and four strides in elements, 0 where it broadcasts.\n"
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

using Setter = void (*)(AttentionParams&, void*);

#define PFA_POINTER(name) \
  {#name, [](AttentionParams& p, void* value) { p.name = static_cast<decltype(p.name)>(value); }}
#define PFA_INPUT(Name, name) PFA_POINTER(name)
#define PFA_GRADIENT(Name, name) PFA_POINTER(d_##name)

const std::map<std::string, Setter>& pointers() {
  static const std::map<std::string, Setter> setters = {PFA_DIFFERENTIABLE_INPUTS(PFA_INPUT),
                                                        PFA_DIFFERENTIABLE_INPUTS(PFA_GRADIENT),
                                                        PFA_POINTER(out),
                                                        PFA_POINTER(random_state),
                                                        PFA_POINTER(pre_ln_mean),
                                                        PFA_POINTER(pre_ln_rstd),
                                                        PFA_POINTER(qkv),
                                                        PFA_POINTER(log_sum_exp),
                                                        PFA_POINTER(score_shift),
                                                        PFA_POINTER(attn_out),
                                                        PFA_POINTER(residual),
                                                        PFA_POINTER(ln_mean),
                                                        PFA_POINTER(ln_rstd),
                                                        PFA_POINTER(hidden),
                                                        PFA_POINTER(d_out),
                                                        PFA_POINTER(d_residual),
                                                        PFA_POINTER(d_linear),
                                                        PFA_POINTER(d_attn_out),
                                                        PFA_POINTER(d_qkv),
                                                        PFA_POINTER(d_hidden),
                                                        PFA_POINTER(stage_workspace)};
  return setters;
}

#undef PFA_GRADIENT
#undef PFA_INPUT
#undef PFA_POINTER

using Stage = void (*)(cuda::Context&, const AttentionParams&);

const std::map<std::string, Stage>& stages() {
  static const std::map<std::string, Stage> functions = {{"narrow_x", cuda::narrow_x},
                                                         {"layer_norm_forward", cuda::layer_norm_forward},
                                                         {"layer_norm_backward", cuda::layer_norm_backward},
                                                         {"qkv_linear_forward", cuda::qkv_linear_forward},
                                                         {"qkv_linear_backward", cuda::qkv_linear_backward},
                                                         {"attention_forward", cuda::attention_forward},
                                                         {"attention_backward", cuda::attention_backward},
                                                         {"output_linear_forward", cuda::output_linear_forward},
                                                         {"output_linear_backward", cuda::output_linear_backward},
                                                         {"residual_forward", cuda::residual_forward},
                                                         {"residual_backward", cuda::residual_backward}};
  return functions;
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
 public:
  CudaBlock(const py::dict& config, int device) : config_(parse_config(config)), device_(device) {}

  size_t saved_bytes(const py::dict& arrays) const { return pfa::saved_bytes(params(arrays)); }

  size_t forward_workspace_bytes(const py::dict& arrays, bool saves) const {
    CurrentDevice current(device_);
    return pfa::forward_workspace_bytes(context(0), params(arrays), saves);
  }

  size_t backward_workspace_bytes(const py::dict& arrays) const {
    CurrentDevice current(device_);
    return pfa::backward_workspace_bytes(context(0), params(arrays));
  }

  void forward(const py::dict& arrays, const py::object& saved, const py::object& workspace, uintptr_t stream,
               uint64_t seed, uint64_t offset) const {
    CurrentDevice current(device_);
    cuda::Context context = this->context(stream);
    AttentionParams p = params(arrays);
    p.seed = seed;
    p.offset = offset;
    run_forward(context, p, address_of(saved), address_of(workspace));
  }

  void backward(const py::dict& arrays, const py::object& saved, const py::object& workspace, uintptr_t stream) const {
    CurrentDevice current(device_);
    cuda::Context context = this->context(stream);
    run_backward(context, params(arrays), address_of(saved), address_of(workspace));
  }

  size_t stage_workspace_bytes(const py::dict& arrays, bool backward) const {
    CurrentDevice current(device_);
    const cuda::Context context = this->context(0);
    const AttentionParams p = params(arrays);
    const auto bytes = [&](Phase phase) { return cuda::stage_workspace_bytes(context, p, phase); };
    if (!backward) return bytes(Phase::kForward);
    return std::max({bytes(Phase::kOutputBackward), bytes(Phase::kAttentionBackward), bytes(Phase::kInputBackward)});
  }

  void run_stage(const std::string& name, const py::dict& arrays, uintptr_t stream, uint64_t seed,
                 uint64_t offset) const {
    const auto it = stages().find(name);
    if (it == stages().end()) throw py::value_error("run_stage: unknown stage " + name);
    CurrentDevice current(device_);
    cuda::Context context = this->context(stream);
    AttentionParams p = params(arrays);
    p.seed = seed;
    p.offset = offset;
    it->second(context, p);
  }

 private:
  cuda::Context context(uintptr_t stream) const {
    return cuda::make_context(reinterpret_cast<cudaStream_t>(stream), device_, config_.allow_tf32,
                              config_.deterministic);
  }

  AttentionParams params(const py::dict& arrays) const {
    AttentionParams p = config_.params;
    for (const auto& item : arrays) {
      const std::string name = item.first.cast<std::string>();
      if (name == "mask") {
        const auto mask = item.second.cast<py::tuple>();
        p.mask.data = address_of(mask[0]);
        p.mask.dtype = dtype_of(mask[1].cast<std::string>());
        const auto strides = mask[2].cast<py::tuple>();
        for (size_t i = 0; i < 4; ++i) p.mask.strides[i] = strides[i].cast<int64_t>();
        continue;
      }
      const auto it = pointers().find(name);
      if (it == pointers().end()) throw py::value_error("arrays: unknown name " + name);
      it->second(p, address_of(item.second));
    }
    return p;
  }

  Config config_;
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
           "Runs one stage, such as residual_backward, on the arrays it reads and writes; attention_forward writes "
           "seed and "
           "offset "
           "to random_state.");
}

}  // namespace pfa

#endif
