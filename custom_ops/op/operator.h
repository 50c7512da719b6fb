// An operator of Paddle out of a block of the core: describes tensors and attributes to the core, gets memory from
// Paddle's allocator, and runs the block on the tensors' device.
//
// Outputs: Out, and Saved, the bytes that the core keeps for backward (one byte when nothing is saved). When backward
// finds nothing saved that it needs it runs the forward pass again.
//
// What is the operator's own is a struct, made in its file:
//
//   kType              its name
//   kInputNames        of its inputs as Paddle knows them, kArgumentNames as errors call them
//   kRequiredCount     how many of them, the first, must be there
//   kAttributeNames    of its own attributes; Attributes, the struct that has them
//   kInputs            where Params, the core's struct, points to the inputs that have gradients, which are the first
//   check(arguments, attributes)     throws where the inputs are not what the operator takes
//   out_shape(shapes, attributes)    also for what has not been checked and may have unknown dimensions
//   describe(tensors, attributes)    Params but for the pointers in kInputs
//   drops(params)                    whether random numbers are drawn, unless Params is LinearParams
//   kReadsOut                        whether backward reads Out
//   kMaskInput                       the input that is a mask, or -1
//   kOutLike                         how errors describe the shape and dtype of Out
//
// and what spmd.h asks for. PFA_REGISTER makes the rest.
#pragma once

#include <array>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "op/attributes.h"
#include "op/checks.h"
#include "op/devices.h"
#include "op/direct.h"
#include "op/errors.h"
#include "op/spmd.h"
#include "op/tensors.h"
#include "paddle/extension.h"

namespace pfa::op {

// The names in the core's lists of inputs.
#define PFA_INPUT_NAME(Name, name, field) #Name
#define PFA_ARGUMENT_NAME(Name, name, field) #name

template <class Operator>
constexpr size_t kInputCount = std::size(Operator::kInputNames);
template <class Operator>
constexpr size_t kGradientCount = std::size(Operator::kInputs);
template <class Operator>
constexpr size_t kAttributeCount = std::size(Operator::kAttributeNames);

template <class Operator>
using Tensors = std::array<const paddle::Tensor*, kInputCount<Operator>>;
template <class Operator>
using Shapes = std::array<Shape, kInputCount<Operator>>;
template <class Operator>
using Dtypes = std::array<std::string, kInputCount<Operator>>;

template <class Operator>
typename Operator::Attributes attributes_of(const int64_t* numbers) {
  return attributes_of<typename Operator::Attributes>(numbers, std::make_index_sequence<kAttributeCount<Operator>>());
}

// Whether input i, of this dtype, gets a gradient. Most masks are constant, and their gradient takes long, so of a mask
// `needs_grad` always tells.
template <class Operator>
bool wants_gradient(const typename Operator::Attributes& attributes, size_t i, paddle::DataType dtype) {
  if (!attributes.wants_gradient(i)) return false;
  if (static_cast<int>(i) != Operator::kMaskInput) return true;
  return attributes.needs_grad >> i & 1 &&
         is_one_of(phi::DataTypeToString(dtype), {"float32", "float64", "float16", "bfloat16"});
}

// Throws where the inputs are not what the operator takes. Those that are absent have neither shape nor dtype.
template <class Operator>
void check(const Shapes<Operator>& shapes, const Dtypes<Operator>& dtypes,
           const typename Operator::Attributes& attributes) {
  for (size_t i = 0; i < Operator::kRequiredCount; ++i) {
    if (!attributes.has_input(i)) refuse(Operator::kType, "TypeError", Operator::kArgumentNames[i], "a tensor", "none");
  }
  Operator::check({Operator::kType, Operator::kArgumentNames, shapes.data(), dtypes.data(), attributes.present},
                  attributes);
}

// Sizes, types, switches and pointers of the core's block, which have been checked.
template <class Operator>
typename Operator::Params describe(const Tensors<Operator>& tensors, const Shapes<Operator>& shapes,
                                   const typename Operator::Attributes& attributes) {
  Dtypes<Operator> dtypes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (attributes.has_input(i)) dtypes[i] = phi::DataTypeToString(tensors[i]->dtype());
  }
  check<Operator>(shapes, dtypes, attributes);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (attributes.has_input(i)) {
      check_place(Operator::kType, *tensors[i], Operator::kArgumentNames[i], *tensors[0]);
    }
  }
  check_device(Operator::kType, *tensors[0]);

  typename Operator::Params p = Operator::describe(tensors.data(), attributes);
  for (size_t i = 0; i < kGradientCount<Operator>; ++i) {
    if (attributes.has_input(i)) p.*Operator::kInputs[i].value = tensors[i]->data();
  }
  return p;
}

// The shapes of the tensors, which have memory.
template <class Operator>
Shapes<Operator> shapes_of(const Tensors<Operator>& tensors, const typename Operator::Attributes& attributes) {
  Shapes<Operator> shapes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!attributes.has_input(i)) continue;
    check_memory(Operator::kType, *tensors[i], Operator::kArgumentNames[i]);
    shapes[i] = shape_of(*tensors[i]);
  }
  return shapes;
}

// The seed and offset of this call's dropout masks; Paddle's generator moves on only if something is dropped.
template <class Operator, class Device>
void choose_seed(Device& device, typename Operator::Params& p, const typename Operator::Attributes& attributes) {
  if constexpr (!std::is_same_v<LinearParams, typename Operator::Params>) {
    if (!Operator::drops(p)) return;
    if (attributes.has(kFixedSeed)) {
      p.seed = static_cast<uint64_t>(attributes.seed);
    } else {
      std::tie(p.seed, p.offset) = device.draw();
    }
  }
}

// Returns Out, and saves for backward into `saved` unless that is null.
template <class Operator>
paddle::Tensor compute_out(typename Operator::Params p, const Sizes& out_shape, const paddle::Tensor& x,
                           const typename Operator::Attributes& attributes, paddle::Tensor* saved) {
  paddle::Tensor out = allocate(out_shape, x.dtype(), x.place());
  p.out = out.data();
  if (saved) *saved = bytes(saved_bytes(p), x.place());
  on_device_of(x, [&](auto& device) {
    Workspace workspace(forward_workspace_bytes(device.context, p, saved != nullptr), x.place());
    choose_seed<Operator>(device, p, attributes);
    run_forward(device.context, p, saved ? saved->data() : nullptr, workspace.data());
  });
  return out;
}

template <class Operator>
paddle::Tensor run_forward_operator(const Tensors<Operator>& tensors, const typename Operator::Attributes& attributes,
                                    paddle::Tensor* saved) {
  const Shapes<Operator> shapes = shapes_of<Operator>(tensors, attributes);
  const typename Operator::Params p = describe<Operator>(tensors, shapes, attributes);
  return compute_out<Operator>(p, Operator::out_shape(shapes.data(), attributes), *tensors[0], attributes, saved);
}

template <class Operator>
std::vector<paddle::Tensor> run_backward_operator(const Tensors<Operator>& tensors, const paddle::Tensor& saved,
                                                  const paddle::Tensor* out, const paddle::Tensor& d_out,
                                                  const typename Operator::Attributes& attributes) {
  const paddle::Tensor& x = *tensors[0];
  // In dygraph Paddle frees what it keeps for backward once that has run. It leaves out what it has freed, so that the
  // one tensor that is left stands for all.
  if (!saved.defined() || saved.impl() == d_out.impl()) {
    raise(Operator::kType, common::errors::Fatal("%s: what its gradient needs has been freed. Backward ran before "
                                                 "through the same graph: set retain_graph=True in that call.",
                                                 Operator::kType));
  }
  const Shapes<Operator> shapes = shapes_of<Operator>(tensors, attributes);
  typename Operator::Params p = describe<Operator>(tensors, shapes, attributes);
  using Params = typename Operator::Params;
  if constexpr (std::is_base_of_v<BlockParams, Params> || std::is_same_v<LinearParams, Params>) {
    if (p.has_arranged_weights) {
      raise(Operator::kType,
            common::errors::Unimplemented("%s has no gradient with arranged weights", Operator::kType));
    }
  }
  const Sizes out_shape = Operator::out_shape(shapes.data(), attributes);
  check_memory(Operator::kType, d_out, "Grad(Out)");
  if (d_out.shape() != out_shape || d_out.dtype() != x.dtype()) {
    throw std::invalid_argument(std::string("[") + Operator::kType +
                                "] ValueError: Grad(Out): expected a gradient of Out with the " + Operator::kOutLike);
  }

  paddle::Tensor saved_again;
  paddle::Tensor out_again;
  const paddle::Tensor* saved_memory = &saved;
  if (!attributes.saves() && saved_bytes(p) > 0) {
    out_again = compute_out<Operator>(p, out_shape, x, attributes, &saved_again);
    saved_memory = &saved_again;
    if (out) out = &out_again;
  }
  if (out) {
    check_memory(Operator::kType, *out, "Out");
    p.out = const_cast<void*>(out->data());
  }

  p.d_out = d_out.data();
  std::vector<paddle::Tensor> gradients;
  gradients.reserve(kGradientCount<Operator>);
  std::vector<paddle::Tensor> unwanted;
  for (size_t i = 0; i < kGradientCount<Operator>; ++i) {
    if (wants_gradient<Operator>(attributes, i, tensors[i]->dtype())) {
      gradients.push_back(allocate(tensors[i]->shape(), tensors[i]->dtype(), x.place()));
      p.*Operator::kInputs[i].gradient = gradients.back().data();
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
    Workspace workspace(backward_workspace_bytes(device.context, p), x.place());
    run_backward(device.context, p, saved_memory->data(), workspace.data());
  });
  return gradients;
}

// What Paddle calls. It reads the inputs and attributes off the functions' types: so many tensors, `is_test`, and so
// many other numbers.
template <class T, size_t>
using Repeated = T;

template <class Operator, class Inputs = std::make_index_sequence<kInputCount<Operator>>,
          class Numbers = std::make_index_sequence<kCommonAttributeCount - 1 + kAttributeCount<Operator>>,
          class Outs = std::make_index_sequence<Operator::kReadsOut ? 1 : 0>>
struct Functions;

template <class Operator, size_t... kInputs, size_t... kNumbers, size_t... kOuts>
struct Functions<Operator, std::index_sequence<kInputs...>, std::index_sequence<kNumbers...>,
                 std::index_sequence<kOuts...>> {
  using Result = std::vector<paddle::Tensor>;

  static auto parse(bool is_test, Repeated<int64_t, kNumbers>... numbers) {
    const int64_t all[] = {is_test, numbers...};
    return attributes_of<Operator>(all);
  }

  static Result forward(Repeated<const paddle::Tensor&, kInputs>... tensors, bool is_test,
                        Repeated<int64_t, kNumbers>... numbers) {
    return guarded(Operator::kType, [&]() -> Result {
      const auto attributes = parse(is_test, numbers...);
      const Tensors<Operator> inputs = {&tensors...};
      paddle::Tensor saved;
      paddle::Tensor out = run_forward_operator<Operator>(inputs, attributes, attributes.saves() ? &saved : nullptr);
      if (!attributes.saves()) saved = bytes(1, inputs[0]->place());
      return {std::move(out), std::move(saved)};
    });
  }

  static Result forward_alone(Repeated<const paddle::Tensor&, kInputs>... tensors, bool is_test,
                              Repeated<int64_t, kNumbers>... numbers) {
    return guarded(Operator::kType, [&]() -> Result {
      return {run_forward_operator<Operator>({&tensors...}, parse(is_test, numbers...), nullptr)};
    });
  }

  static Result backward(Repeated<const paddle::Tensor&, kInputs>... tensors, const paddle::Tensor& saved,
                         Repeated<const paddle::Tensor&, kOuts>... outs, const paddle::Tensor& d_out, bool is_test,
                         Repeated<int64_t, kNumbers>... numbers) {
    return guarded(Operator::kType, [&] {
      const std::array<const paddle::Tensor*, 1> out = {&outs...};  // null where it is not read
      return run_backward_operator<Operator>({&tensors...}, saved, out[0], d_out, parse(is_test, numbers...));
    });
  }

  static Result double_backward(const paddle::Tensor&, const paddle::Tensor&, const paddle::Tensor&, bool,
                                Repeated<int64_t, kNumbers>...) {
    raise(Operator::kType, common::errors::Unimplemented("%s has no second-order gradient", Operator::kType));
  }

  // No checks here: in Paddle 3's static graphs an exception at this point ends the process. Python checks what goes
  // into a graph, and the kernels what comes at run time.
  static std::vector<Sizes> infer_shape_of_out(Repeated<const Sizes&, kInputs>... sizes, bool is_test,
                                               Repeated<int64_t, kNumbers>... numbers) {
    const Shapes<Operator> shapes = {Shape(sizes.data(), sizes.size())...};
    return {Operator::out_shape(shapes.data(), parse(is_test, numbers...))};
  }

  static std::vector<Sizes> infer_shapes(Repeated<const Sizes&, kInputs>... sizes, bool is_test,
                                         Repeated<int64_t, kNumbers>... numbers) {
    std::vector<Sizes> result = infer_shape_of_out(sizes..., is_test, numbers...);
    result.push_back({parse(is_test, numbers...).saves() ? -1 : 1});
    return result;
  }

  static std::vector<paddle::DataType> infer_dtype_of_out(Repeated<const paddle::DataType&, kInputs>... dtypes, bool,
                                                          Repeated<int64_t, kNumbers>...) {
    return {std::get<0>(std::tie(dtypes...))};
  }

  static std::vector<paddle::DataType> infer_dtypes(Repeated<const paddle::DataType&, kInputs>... dtypes, bool,
                                                    Repeated<int64_t, kNumbers>...) {
    return {std::get<0>(std::tie(dtypes...)), paddle::DataType::UINT8};
  }

#ifdef PFA_SPMD
  static phi::distributed::SpmdInfo forward_spmd(Repeated<const phi::distributed::DistMetaTensor&, kInputs>... tensors,
                                                 bool is_test, Repeated<int64_t, kNumbers>... numbers) {
    return Spread<Operator>({&tensors...}, parse(is_test, numbers...)).forward(true);
  }

  static phi::distributed::SpmdInfo forward_alone_spmd(
      Repeated<const phi::distributed::DistMetaTensor&, kInputs>... tensors, bool is_test,
      Repeated<int64_t, kNumbers>... numbers) {
    return Spread<Operator>({&tensors...}, parse(is_test, numbers...)).forward(false);
  }

  static phi::distributed::SpmdInfo backward_spmd(Repeated<const phi::distributed::DistMetaTensor&, kInputs>... tensors,
                                                  const phi::distributed::DistMetaTensor&,
                                                  Repeated<const phi::distributed::DistMetaTensor&, kOuts>...,
                                                  const phi::distributed::DistMetaTensor& d_out, bool is_test,
                                                  Repeated<int64_t, kNumbers>... numbers) {
    return Spread<Operator>({&tensors...}, parse(is_test, numbers...)).backward(d_out);
  }
#endif
};

// The names that Paddle registers.
using Names = std::vector<std::string>;

template <class Operator>
Names input_names(std::initializer_list<std::string> others = {}) {
  Names names(std::begin(Operator::kInputNames), std::end(Operator::kInputNames));
  names.insert(names.end(), others);
  return names;
}

template <class Operator>
Names names_for_backward() {
  return Operator::kReadsOut ? input_names<Operator>({"Saved", "Out", paddle::Grad("Out")})
                             : input_names<Operator>({"Saved", paddle::Grad("Out")});
}

template <class Operator>
Names gradient_names() {
  Names names;
  for (size_t i = 0; i < kGradientCount<Operator>; ++i) names.push_back(paddle::Grad(Operator::kInputNames[i]));
  return names;
}

template <class Operator>
Names attribute_names() {
  Names names = {"is_test: bool", "switches: int64_t", "present: int64_t", "needs_grad: int64_t"};
  for (const char* name : Operator::kAttributeNames) names.push_back(std::string(name) + ": int64_t");
  return names;
}

// For Python, which checks with it what goes into a static graph: there an exception during Paddle's shape inference
// would end the process. shapes holds the dimensions of all inputs one after another, attributes all attributes in
// order. Returns null, or a message that is valid until the next call on this thread.
template <class Operator>
const char* checked(const int64_t* shapes, const int32_t* ranks, const char* const* dtypes, const int64_t* attributes) {
  thread_local std::string message;
  Shapes<Operator> dimensions;
  Dtypes<Operator> names;
  for (size_t i = 0; i < dimensions.size(); ++i) {
    dimensions[i] = Shape(shapes, ranks[i]);
    shapes += ranks[i];
    names[i] = dtypes[i];
  }
  const auto all = attributes_of<Operator>(attributes);
  try {
    check<Operator>(dimensions, names, all);
  } catch (const std::invalid_argument& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

// The tensors behind Python's objects. False where one is not plain.
template <class Operator>
bool find_plain(PythonObject* const* inputs, const typename Operator::Attributes& attributes,
                Tensors<Operator>& tensors) {
  static const paddle::Tensor absent;
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = attributes.has_input(i) ? plain_tensor(inputs[i]) : &absent;
    if (!tensors[i]) return false;
  }
  return true;
}

// For Python: `type`_forward on the inputs, whose gradient nobody wants. `attributes` are all of them. Returns
// `otherwise` where the call is Paddle's to make: for tensors that are not plain, and for what fails, that it raises.
template <class Operator>
PythonObject* call_directly(PythonObject* const* inputs, const int64_t* numbers, PythonObject* otherwise) {
  const auto attributes = attributes_of<Operator>(numbers);
  Tensors<Operator> tensors;
  if (!find_plain<Operator>(inputs, attributes, tensors)) return referred(otherwise);
  paddle::Tensor out;
  try {
    const WithoutPython scope;
    out = run_forward_operator<Operator>(tensors, attributes, nullptr);
  } catch (...) {
    return referred(otherwise);
  }
  return python_tensor(out);
}

}  // namespace pfa::op

// Registers the operator `type`, its gradient, and `type`_forward, the operator without one, for dygraph under no_grad
// where call_directly leaves the call to Paddle: that records an operator that has a gradient even there. Without the
// refusal of a second-order gradient that would silently be missing.
#define PFA_REGISTER(type, Operator)                                                                                 \
  PD_BUILD_OP(type)                                                                                                  \
      .Inputs(pfa::op::input_names<Operator>())                                                                      \
      .Outputs({"Out", "Saved"})                                                                                     \
      .Attrs(pfa::op::attribute_names<Operator>())                                                                   \
      .SetKernelFn(PD_KERNEL(pfa::op::Functions<Operator>::forward))                                                 \
      .SetInferShapeFn(PD_INFER_SHAPE(pfa::op::Functions<Operator>::infer_shapes))                                   \
      .SetInferDtypeFn(PD_INFER_DTYPE(pfa::op::Functions<Operator>::infer_dtypes))                                   \
          PFA_SPMD_RULE(pfa::op::Functions<Operator>::forward_spmd);                                                 \
  PD_BUILD_GRAD_OP(type)                                                                                             \
      .Inputs(pfa::op::names_for_backward<Operator>())                                                               \
      .Outputs(pfa::op::gradient_names<Operator>())                                                                  \
      .Attrs(pfa::op::attribute_names<Operator>())                                                                   \
      .SetKernelFn(PD_KERNEL(pfa::op::Functions<Operator>::backward))                                                \
          PFA_SPMD_RULE(pfa::op::Functions<Operator>::backward_spmd);                                                \
  PD_BUILD_DOUBLE_GRAD_OP(type)                                                                                      \
      .Inputs({Operator::kInputNames[0], paddle::Grad("Out"), paddle::Grad(paddle::Grad(Operator::kInputNames[0]))}) \
      .Outputs({paddle::Grad(paddle::Grad("Out"))})                                                                  \
      .Attrs(pfa::op::attribute_names<Operator>())                                                                   \
      .SetKernelFn(PD_KERNEL(pfa::op::Functions<Operator>::double_backward));                                        \
  PD_BUILD_OP(type##_forward)                                                                                        \
      .Inputs(pfa::op::input_names<Operator>())                                                                      \
      .Outputs({"Out"})                                                                                              \
      .Attrs(pfa::op::attribute_names<Operator>())                                                                   \
      .SetKernelFn(PD_KERNEL(pfa::op::Functions<Operator>::forward_alone))                                           \
      .SetInferShapeFn(PD_INFER_SHAPE(pfa::op::Functions<Operator>::infer_shape_of_out))                             \
      .SetInferDtypeFn(PD_INFER_DTYPE(pfa::op::Functions<Operator>::infer_dtype_of_out))                             \
          PFA_SPMD_RULE(pfa::op::Functions<Operator>::forward_alone_spmd);                                           \
  extern "C" __attribute__((visibility("default"))) const char* type##_check(                                        \
      const int64_t* shapes, const int32_t* ranks, const char* const* dtypes, const int64_t* attributes) {           \
    return pfa::op::checked<Operator>(shapes, ranks, dtypes, attributes);                                            \
  }                                                                                                                  \
  extern "C" __attribute__((visibility("default"))) pfa::op::PythonObject* type##_direct(                            \
      pfa::op::PythonObject* const* inputs, const int64_t* attributes, pfa::op::PythonObject* otherwise) {           \
    return pfa::op::call_directly<Operator>(inputs, attributes, otherwise);                                          \
  }                                                                                                                  \
  static_assert(true)
