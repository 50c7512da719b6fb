// The Paddle operator custom_fused_attention and its gradient: describes tensors and attributes to the core, gets
// memory from Paddle's allocator, and runs the block on the tensors' device.
//
// Outputs: Out, and Saved, the bytes that the core keeps for backward (one byte when nothing is saved). When backward
// finds nothing saved it runs the forward pass again.

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/attention_block.h"
#include "op/attributes.h"
#include "op/checks.h"
#include "op/devices.h"
#include "op/spmd.h"
#include "paddle/common/ddim.h"
#include "paddle/common/enforce.h"
#include "paddle/extension.h"

namespace pfa::op {
namespace {

using Sizes = std::vector<int64_t>;
using Tensors = std::array<const paddle::Tensor*, kInputCount>;

DType core_dtype(paddle::DataType dtype) {
  switch (dtype) {
    case paddle::DataType::FLOAT64:
      return DType::kFloat64;
    case paddle::DataType::FLOAT16:
      return DType::kFloat16;
    case paddle::DataType::BFLOAT16:
      return DType::kBFloat16;
    case paddle::DataType::BOOL:
      return DType::kBool;
    case paddle::DataType::UINT8:
      return DType::kUInt8;
    case paddle::DataType::INT8:
      return DType::kInt8;
    case paddle::DataType::INT16:
      return DType::kInt16;
    case paddle::DataType::INT32:
      return DType::kInt32;
    case paddle::DataType::INT64:
      return DType::kInt64;
    default:
      return DType::kFloat32;
  }
}

Shape shape_of(const paddle::Tensor& tensor) {
  const auto& dims = tensor.dims();
  return Shape(dims.Get(), dims.size());
}

const char* kind_of(const paddle::Tensor& tensor) {
  if (tensor.is_selected_rows()) return "SelectedRows";
  return tensor.is_sparse_coo_tensor() || tensor.is_sparse_csr_tensor() ? "a sparse tensor"
                                                                        : "a tensor of another kind";
}

// Whether the tensor has memory that may be read; `name` is what errors call it.
void check_memory(const paddle::Tensor& tensor, const std::string& name) {
  const std::string begin = "[custom_fused_attention] ";
  if (tensor.defined() && !tensor.is_dense_tensor()) {
    throw std::invalid_argument(begin + "TypeError: " + name + ": expected a dense tensor, got " + kind_of(tensor));
  }
  // Where a program's input was never given, Paddle's shape is of rank -1.
  const bool is_known = tensor.defined() && tensor.dims().size() >= 0;
  if (!is_known || (!tensor.initialized() && tensor.numel() != 0)) {
    throw std::invalid_argument(begin + "ValueError: " + name +
                                ": expected a tensor with values, got one without memory");
  }
}

void check(const Tensors& tensors, const Attributes& attributes) {
  for (int i = 0; i < kInputCount; ++i) {
    if (attributes.has(static_cast<Input>(i))) check_memory(*tensors[i], kInputNames[i]);
  }
  std::array<Shape, kInputCount> shapes;
  std::array<std::string, kInputCount> dtypes;
  for (int i = 0; i < kInputCount; ++i) {
    if (!attributes.has(static_cast<Input>(i))) continue;
    shapes[i] = shape_of(*tensors[i]);
    dtypes[i] = phi::DataTypeToString(tensors[i]->dtype());
  }
  check_dtypes(dtypes, attributes);
  check_shapes(shapes, attributes);
  for (int i = 0; i < kInputCount; ++i) {
    if (attributes.has(static_cast<Input>(i)) && tensors[i]->place() != tensors[kX]->place()) {
      throw std::invalid_argument(std::string("[custom_fused_attention] ValueError: ") + kInputNames[i] +
                                  ": expected a tensor on the place of x, " + tensors[kX]->place().DebugString() +
                                  ", got one on " + tensors[i]->place().DebugString());
    }
  }
  if (!has_kernels_for(*tensors[kX])) {
    throw std::invalid_argument(
        "[custom_fused_attention] ValueError: x: expected a tensor on a device that this build has kernels for, got "
        "one on " +
        tensors[kX]->place().DebugString());
  }
}

Mask mask_of(const paddle::Tensor& tensor) {
  Mask mask;
  mask.data = tensor.data();
  mask.dtype = core_dtype(tensor.dtype());
  const Shape shape = shape_of(tensor);
  int64_t stride = 1;
  for (size_t i = shape.rank; i-- > 0;) {
    mask.strides[4 - shape.rank + i] = shape[i] == 1 ? 0 : stride;
    stride *= shape[i];
  }
  return mask;
}

AttentionParams describe(const Tensors& tensors, const Attributes& attributes) {
  AttentionParams p;
  const Shape x = shape_of(*tensors[kX]);
  const Shape weight = shape_of(*tensors[kQKVWeight]);
  p.batch = x[0];
  p.seq_len = x[1];
  p.rows = p.batch * p.seq_len;
  p.embed_dim = x[2];
  p.num_heads = weight[1];
  p.head_dim = weight[2];
  p.first_head = attributes.first_head;
  p.total_heads = attributes.total_heads;
  p.dtype = core_dtype(tensors[kQKVWeight]->dtype());
  p.residual_dtype = core_dtype(tensors[kX]->dtype());
  p.norm_dtype = p.residual_dtype;
  for (Input input : {kPreLnScale, kPreLnBias, kLnScale, kLnBias}) {
    if (attributes.has(input)) p.norm_dtype = core_dtype(tensors[input]->dtype());
  }
  p.pre_layer_norm = attributes.has(kPreLayerNorm);
  p.final_layer_norm = attributes.has(kFinalLayerNorm);
  p.add_residual = attributes.has(kAddResidual);
  p.causal = attributes.has(kCausal);
  p.pre_ln_epsilon = number(attributes.pre_ln_epsilon);
  p.ln_epsilon = number(attributes.ln_epsilon);
  p.attn_dropout =
      dropout_of(number(attributes.attn_dropout_rate), !attributes.is_test, attributes.has(kUpscaleInTrain));
  p.dropout = dropout_of(number(attributes.dropout_rate), !attributes.is_test, attributes.has(kUpscaleInTrain));
  for (int i = 0; i < kGradientCount; ++i) {
    if (attributes.has(static_cast<Input>(i))) p.*kInputPointers[i].value = tensors[i]->data();
  }
  if (attributes.has(kAttnMask)) p.mask = mask_of(*tensors[kAttnMask]);
  return p;
}

// Paddle 2.6 takes a tensor without memory, as an empty one is, for an output that was forgotten.
paddle::Tensor allocate(const Sizes& shape, paddle::DataType dtype, const paddle::Place& place) {
  for (int64_t size : shape) {
    if (size != 0) continue;
    paddle::Tensor tensor = paddle::empty({1}, dtype, place);
    tensor.reshape(shape);
    return tensor;
  }
  return paddle::empty(shape, dtype, place);
}

paddle::Tensor bytes(size_t count, const paddle::Place& place) {
  return paddle::empty({static_cast<int64_t>(count)}, paddle::DataType::UINT8, place);
}

// The seed and offset of this call's dropout masks; Paddle's generator moves on only if something is dropped.
template <class Device>
void choose_seed(Device& device, AttentionParams& p, const Attributes& attributes) {
  if (!p.attn_dropout.threshold && !p.dropout.threshold) return;
  if (attributes.has(kFixedSeed)) {
    p.seed = static_cast<uint64_t>(attributes.seed);
  } else {
    std::tie(p.seed, p.offset) = device.draw();
  }
}

// Runs the forward pass into p.out, which saves for backward into `saved` unless that is null.
template <class Device>
void run_forward(Device& device, AttentionParams p, const Attributes& attributes, paddle::Tensor* saved,
                 const paddle::Place& place) {
  paddle::Tensor workspace = bytes(forward_workspace_bytes(device.context, p, saved != nullptr), place);
  choose_seed(device, p, attributes);
  run_forward(device.context, p, saved ? saved->data() : nullptr, workspace.data());
}

// An exception that Paddle hands on to Python.
[[noreturn]] void raise(const common::ErrorSummary& error) {
#ifdef PADDLE_THROW
  throw common::enforce::EnforceNotMet(error, "custom_fused_attention", 0);
#else  // Paddle 2.6 has it in a header that asks for cuDNN's
  PD_THROW(error.to_string());
#endif
}

// Runs f. Paddle ends the process on exceptions other than its own, so those of the core and of the checks are made
// into these.
template <class F>
auto guarded(F&& f) {
  try {
    return f();
  } catch (const std::invalid_argument& error) {
    raise(common::errors::InvalidArgument("%s", error.what()));
  } catch (const std::runtime_error& error) {
    raise(common::errors::External("custom_fused_attention: %s", error.what()));
  } catch (const std::bad_alloc&) {
    raise(common::errors::ResourceExhausted("custom_fused_attention: out of memory"));
  }
}

// In dygraph Paddle frees what it keeps for backward once that has run.
constexpr char kReleased[] =
    "custom_fused_attention: what its gradient needs has been freed. Backward ran before through the same graph: set "
    "retain_graph=True in that call.";

// Returns Out; `saved` becomes what backward reads, unless it is null.
paddle::Tensor run_forward_op(const Tensors& tensors, const Attributes& attributes, paddle::Tensor* saved) {
  const paddle::Tensor& x = *tensors[kX];
  check(tensors, attributes);
  AttentionParams p = describe(tensors, attributes);
  paddle::Tensor out = allocate(x.shape(), x.dtype(), x.place());
  p.out = out.data();
  if (saved) *saved = bytes(saved_bytes(p), x.place());
  on_device_of(x, [&](auto& device) { run_forward(device, p, attributes, saved, x.place()); });
  return out;
}

std::vector<paddle::Tensor> run_backward_op(const Tensors& tensors, const paddle::Tensor& saved,
                                            const paddle::Tensor& d_out, const Attributes& attributes) {
  const paddle::Tensor& x = *tensors[kX];
  // Paddle leaves out what it has freed, so that the one tensor that is left stands for all.
  if (!saved.defined() || saved.impl() == d_out.impl()) raise(common::errors::Fatal("%s", kReleased));
  check(tensors, attributes);
  check_memory(d_out, "Grad(Out)");
  if (d_out.dims() != x.dims() || d_out.dtype() != x.dtype()) {
    throw std::invalid_argument(
        "[custom_fused_attention] ValueError: Grad(Out): expected a gradient of Out with the shape and dtype of x");
  }
  AttentionParams p = describe(tensors, attributes);

  paddle::Tensor saved_again;
  const paddle::Tensor* saved_memory = &saved;
  if (!attributes.saves()) {
    saved_again = bytes(saved_bytes(p), x.place());
    paddle::Tensor out = allocate(x.shape(), x.dtype(), x.place());
    p.out = out.data();
    on_device_of(x, [&](auto& device) { run_forward(device, p, attributes, &saved_again, x.place()); });
    saved_memory = &saved_again;
  }

  p.d_out = d_out.data();
  std::vector<paddle::Tensor> gradients;
  gradients.reserve(kGradientCount);
  std::vector<paddle::Tensor> unwanted;
  for (int i = 0; i < kGradientCount; ++i) {
    if (attributes.wants_gradient(static_cast<Input>(i))) {
      gradients.push_back(allocate(tensors[i]->shape(), tensors[i]->dtype(), x.place()));
      p.*kInputPointers[i].gradient = gradients.back().data();
      continue;
    }
    // A gradient that nobody reads must still be a tensor: that of an absent input, which has one element, and in
    // dygraph that of an input that needs none. One zero does for all of a dtype.
    if (unwanted.empty() || unwanted.back().dtype() != tensors[i]->dtype()) {
      unwanted.push_back(allocate({1}, tensors[i]->dtype(), x.place()));
    }
    gradients.push_back(paddle::Tensor(unwanted.back().impl()));
  }
  on_device_of(x, [&](auto& device) {
    for (paddle::Tensor& tensor : unwanted) device.clear(tensor.data(), phi::SizeOf(tensor.dtype()));
    paddle::Tensor workspace = bytes(backward_workspace_bytes(device.context, p), x.place());
    run_backward(device.context, p, saved_memory->data(), workspace.data());
  });
  return gradients;
}

std::vector<paddle::Tensor> forward(PFA_TENSORS, PFA_ATTRIBUTES) {
  return guarded([&]() -> std::vector<paddle::Tensor> {
    const Attributes attributes = PFA_ATTRIBUTE_VALUES;
    paddle::Tensor saved;
    paddle::Tensor out = run_forward_op(PFA_ADDRESSES, attributes, attributes.saves() ? &saved : nullptr);
    if (!attributes.saves()) saved = bytes(1, x.place());
    return {std::move(out), std::move(saved)};
  });
}

std::vector<paddle::Tensor> forward_alone(PFA_TENSORS, PFA_ATTRIBUTES) {
  return guarded(
      [&]() -> std::vector<paddle::Tensor> { return {run_forward_op(PFA_ADDRESSES, PFA_ATTRIBUTE_VALUES, nullptr)}; });
}

std::vector<paddle::Tensor> backward(PFA_TENSORS, const paddle::Tensor& saved, const paddle::Tensor& d_out,
                                     PFA_ATTRIBUTES) {
  return guarded([&] { return run_backward_op(PFA_ADDRESSES, saved, d_out, PFA_ATTRIBUTE_VALUES); });
}

std::vector<paddle::Tensor> double_backward(const paddle::Tensor&, const paddle::Tensor&, const paddle::Tensor&,
                                            PFA_ATTRIBUTES) {
  raise(common::errors::Unimplemented("custom_fused_attention has no second-order gradient"));
}

// No checks here: in Paddle 3's static graphs an exception at this point ends the process. Python checks what goes into
// a graph, and the kernels what comes at run time.
std::vector<Sizes> infer_shapes(PFA_SHAPES, PFA_ATTRIBUTES) {
  const Attributes attributes = PFA_ATTRIBUTE_VALUES;
  return {x, {attributes.saves() ? -1 : 1}};
}

std::vector<paddle::DataType> infer_dtypes(PFA_DTYPES, PFA_ATTRIBUTES) { return {x, paddle::DataType::UINT8}; }

std::vector<Sizes> infer_shape_of_out(PFA_SHAPES, PFA_ATTRIBUTES) { return {x}; }

std::vector<paddle::DataType> infer_dtype_of_out(PFA_DTYPES, PFA_ATTRIBUTES) { return {x}; }

}  // namespace
}  // namespace pfa::op

PD_BUILD_OP(custom_fused_attention)
    .Inputs({PFA_INPUT_NAMES})
    .Outputs({"Out", "Saved"})
    .Attrs(PFA_ATTRIBUTE_NAMES)
    .SetKernelFn(PD_KERNEL(pfa::op::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(pfa::op::infer_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pfa::op::infer_dtypes)) PFA_SPMD_RULE(pfa::op::forward_spmd);

PD_BUILD_GRAD_OP(custom_fused_attention)
    .Inputs({PFA_INPUT_NAMES, "Saved", paddle::Grad("Out")})
    .Outputs({PFA_GRADIENT_NAMES})
    .Attrs(PFA_ATTRIBUTE_NAMES)
    .SetKernelFn(PD_KERNEL(pfa::op::backward)) PFA_SPMD_RULE(pfa::op::backward_spmd);

// Without this a second-order gradient would silently be missing.
PD_BUILD_DOUBLE_GRAD_OP(custom_fused_attention)
    .Inputs({"X", paddle::Grad("Out"), paddle::Grad(paddle::Grad("X"))})
    .Outputs({paddle::Grad(paddle::Grad("Out"))})
    .Attrs(PFA_ATTRIBUTE_NAMES)
    .SetKernelFn(PD_KERNEL(pfa::op::double_backward));

// Dygraph under no_grad runs this: Paddle records an operator that has a gradient even there.
PD_BUILD_OP(custom_fused_attention_forward)
    .Inputs({PFA_INPUT_NAMES})
    .Outputs({"Out"})
    .Attrs(PFA_ATTRIBUTE_NAMES)
    .SetKernelFn(PD_KERNEL(pfa::op::forward_alone))
    .SetInferShapeFn(PD_INFER_SHAPE(pfa::op::infer_shape_of_out))
    .SetInferDtypeFn(PD_INFER_DTYPE(pfa::op::infer_dtype_of_out)) PFA_SPMD_RULE(pfa::op::forward_alone_spmd);
