// The attention block as a function of PyTorch's autograd, for gpu_block.py. In C++, as the peers and Paddle's
// operators are: in small cases host time counts.
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <array>

#include "core/attention_block.h"
#include "core/cuda/stages.h"
#include "pybind/config.h"

namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum Input { kX, kQkvWeight, kQkvBias, kLinearWeight, kLinearBias, kLnScale, kLnBias, kInputs };

class Block {
 public:
  explicit Block(const pybind11::dict& config) : config_(pfa::parse_config(config)) {}

  pfa::AttentionParams params(const variable_list& inputs) const {
    pfa::AttentionParams p = config_.params;
    p.x = inputs[kX].data_ptr();
    p.qkv_weight = inputs[kQkvWeight].data_ptr();
    p.qkv_bias = inputs[kQkvBias].data_ptr();
    p.linear_weight = inputs[kLinearWeight].data_ptr();
    p.linear_bias = inputs[kLinearBias].data_ptr();
    (p.pre_layer_norm ? p.pre_ln_scale : p.ln_scale) = inputs[kLnScale].data_ptr();
    (p.pre_layer_norm ? p.pre_ln_bias : p.ln_bias) = inputs[kLnBias].data_ptr();
    return p;
  }

  pfa::cuda::Context context(const Tensor& x) const {
    const auto stream = c10::cuda::getCurrentCUDAStream(x.device().index());
    return pfa::cuda::make_context(stream.stream(), x.device().index(), config_.allow_tf32, config_.deterministic);
  }

  // Saves for the gradient into `saved` unless that is null.
  Tensor forward(const variable_list& inputs, Tensor* saved) {
    pfa::cuda::Context context = this->context(inputs[kX]);
    pfa::AttentionParams p = params(inputs);
    Tensor out = torch::empty_like(inputs[kX]);
    p.out = out.data_ptr();
    p.offset = ++calls_;
    if (saved) *saved = bytes(pfa::saved_bytes(p), out);
    const Tensor workspace = bytes(pfa::forward_workspace_bytes(context, p, saved != nullptr), out);
    pfa::run_forward(context, p, saved ? saved->data_ptr() : nullptr, workspace.data_ptr());
    return out;
  }

  variable_list backward(const variable_list& inputs, const Tensor& saved, const Tensor& d_out) {
    pfa::cuda::Context context = this->context(inputs[kX]);
    pfa::AttentionParams p = params(inputs);
    p.d_out = d_out.data_ptr();
    void*& d_scale = p.pre_layer_norm ? p.d_pre_ln_scale : p.d_ln_scale;
    void*& d_bias = p.pre_layer_norm ? p.d_pre_ln_bias : p.d_ln_bias;
    const std::array<void**, kInputs> targets{&p.d_x,           &p.d_qkv_weight, &p.d_qkv_bias, &p.d_linear_weight,
                                              &p.d_linear_bias, &d_scale,        &d_bias};
    variable_list gradients;
    for (int i = 0; i < kInputs; ++i) {
      gradients.push_back(torch::empty_like(inputs[i]));
      *targets[i] = gradients.back().data_ptr();
    }
    const Tensor workspace = bytes(pfa::backward_workspace_bytes(context, p), d_out);
    pfa::run_backward(context, p, saved.data_ptr(), workspace.data_ptr());
    return gradients;
  }

 private:
  static Tensor bytes(size_t count, const Tensor& like) {
    return torch::empty({static_cast<int64_t>(count)}, like.options().dtype(torch::kByte).requires_grad(false));
  }

  pfa::Config config_;
  uint64_t calls_ = 0;
};

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* context, Block* block, const Tensor& x, const Tensor& qkv_weight,
                        const Tensor& qkv_bias, const Tensor& linear_weight, const Tensor& linear_bias,
                        const Tensor& ln_scale, const Tensor& ln_bias) {
    variable_list kept{x, qkv_weight, qkv_bias, linear_weight, linear_bias, ln_scale, ln_bias};
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

Tensor run(Block& block, const variable_list& inputs, bool training) {
  TORCH_CHECK(inputs.size() == kInputs, "expected ", static_cast<int>(kInputs), " tensors, got ", inputs.size());
  if (!training) return block.forward(inputs, nullptr);
  return Function::apply(&block, inputs[kX], inputs[kQkvWeight], inputs[kQkvBias], inputs[kLinearWeight],
                         inputs[kLinearBias], inputs[kLnScale], inputs[kLnBias]);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  pybind11::class_<Block>(module, "Block")
      .def(pybind11::init<const pybind11::dict&>(), "config: as of pfa_core.CudaBlock")
      .def("__call__", &run, "x, qkv_weight, qkv_bias, linear_weight, linear_bias, ln_scale, ln_bias -> out",
           pybind11::arg("inputs"), pybind11::arg("training"));
}
