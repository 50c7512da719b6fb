// The blocks as functions of PyTorch's autograd, for gpu_block.py and gpu_layer.py. In C++, as the peers and Paddle's
// operators are: in small cases host time counts.
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "core/attention_block.h"
#include "core/bare_attention.h"
#include "core/cuda/stages.h"
#include "core/feed_forward_block.h"
#include "core/linear_block.h"
#include "core/residual_norm_block.h"
#include "pybind/config.h"

namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t kInputs = 7;  // x, two weights with their biases, a layer norm's scale and bias

class Block {
 public:
  virtual ~Block() = default;
  // Saves for the gradient into `saved` unless that is null.
  virtual Tensor forward(const variable_list& inputs, Tensor* saved) = 0;
  virtual variable_list backward(const variable_list& inputs, const Tensor& saved, const Tensor& d_out) = 0;
};

template <class P>
class BlockOf : public Block {
 public:
  BlockOf(const pfa::Config<P>& config, const std::vector<std::string>& names) : config_(config) {
    for (const std::string& name : names) {
      for (const pfa::ArrayOf<P>& array : pfa::arrays_of(config.params)) {
        if (name == array.pointers.name) inputs_.push_back(array.pointers);
      }
    }
    TORCH_CHECK(inputs_.size() == kInputs && names.size() == kInputs, "expected the names of ", kInputs, " inputs");
  }

  Tensor forward(const variable_list& inputs, Tensor* saved) override {
    pfa::cuda::Context context = this->context(inputs[0]);
    P p = params(inputs);
    Tensor out = torch::empty_like(inputs[0]);
    p.out = out.data_ptr();
    if constexpr (!std::is_same_v<P, pfa::LinearParams>) p.offset = ++calls_;
    if (saved) *saved = bytes(pfa::saved_bytes(p), out);
    const Tensor workspace = bytes(pfa::forward_workspace_bytes(context, p, saved != nullptr), out);
    pfa::run_forward(context, p, saved ? saved->data_ptr() : nullptr, workspace.data_ptr());
    return out;
  }

  variable_list backward(const variable_list& inputs, const Tensor& saved, const Tensor& d_out) override {
    pfa::cuda::Context context = this->context(inputs[0]);
    P p = params(inputs);
    p.d_out = d_out.data_ptr();
    variable_list gradients;
    for (size_t i = 0; i < kInputs; ++i) {
      gradients.push_back(torch::empty_like(inputs[i]));
      p.*(inputs_[i].gradient) = gradients.back().data_ptr();
    }
    const Tensor workspace = bytes(pfa::backward_workspace_bytes(context, p), d_out);
    pfa::run_backward(context, p, saved.data_ptr(), workspace.data_ptr());
    return gradients;
  }

 private:
  P params(const variable_list& inputs) const {
    P p = config_.params;
    for (size_t i = 0; i < kInputs; ++i) p.*(inputs_[i].value) = inputs[i].data_ptr();
    return p;
  }

  pfa::cuda::Context context(const Tensor& x) const {
    const auto stream = c10::cuda::getCurrentCUDAStream(x.device().index());
    return pfa::cuda::make_context(stream.stream(), x.device().index(), config_.allow_tf32, config_.deterministic);
  }

  static Tensor bytes(size_t count, const Tensor& like) {
    return torch::empty({static_cast<int64_t>(count)}, like.options().dtype(torch::kByte).requires_grad(false));
  }

  pfa::Config<P> config_;
  std::vector<pfa::InputPointers<P>> inputs_;
  uint64_t calls_ = 0;
};

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* context, Block* block, const Tensor& x, const Tensor& weight1,
                        const Tensor& bias1, const Tensor& weight2, const Tensor& bias2, const Tensor& ln_scale,
                        const Tensor& ln_bias) {
    variable_list kept{x, weight1, bias1, weight2, bias2, ln_scale, ln_bias};
    Tensor saved;
    Tensor out = block->forward(kept, &saved);
    kept.push_back(saved);
    context->save_for_backward(kept);
    context->saved_data["block"] = reinterpret_cast<int64_t>(block);
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& d_out) {
    variable_list inputs = context->get_saved_variables();
    const Tensor saved = inputs.back();
    inputs.pop_back();
    auto* block = reinterpret_cast<Block*>(context->saved_data["block"].toInt());
    variable_list gradients = block->backward(inputs, saved, d_out[0]);
    gradients.insert(gradients.begin(), Tensor());  // of `block`
    return gradients;
  }
};

std::unique_ptr<Block> make_block(const pybind11::dict& config, const std::vector<std::string>& names) {
  return pfa::with_config(config, [&](const auto& parsed) -> std::unique_ptr<Block> {
    return std::make_unique<BlockOf<std::decay_t<decltype(parsed.params)>>>(parsed, names);
  });
}

Tensor run(Block& block, const variable_list& inputs, bool training) {
  TORCH_CHECK(inputs.size() == kInputs, "expected ", kInputs, " tensors, got ", inputs.size());
  if (!training) return block.forward(inputs, nullptr);
  return Function::apply(&block, inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6]);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  pybind11::class_<Block>(module, "Block")
      .def(pybind11::init(&make_block), "config: as of pfa_core.CudaBlock; names: of the inputs, in their order",
           pybind11::arg("config"), pybind11::arg("names"))
      .def("__call__", &run, pybind11::arg("inputs"), pybind11::arg("training"));
}
