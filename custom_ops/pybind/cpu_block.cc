// The block on NumPy arrays, for Python: functions forward and backward.
#include "pybind/cpu_block.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "core/block.h"
#include "core/cpu/context.h"
#include "core/cpu/parallel.h"
#include "pybind/config.h"

namespace py = pybind11;

namespace pfa {
namespace {

using Bytes = py::array_t<uint8_t>;

// NumPy has no bfloat16: its bits come and go as uint16.
std::string numpy_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "uint16";
    default:
      return "float32";
  }
}

// The tensors of a block by name: where Params points to them and to their gradients, their types and shapes.
struct Entry {
  const void* Params::* input;
  void* Params::* gradient;
  DType dtype;
  bool required;
  std::vector<py::ssize_t> shape;
};

std::map<std::string, Entry> entries(const Params& p) {
  const std::vector<py::ssize_t> activation{p.batch, p.seq_len, p.embed_dim};
  const std::vector<py::ssize_t> row{p.embed_dim};
  return {
      {"x", {&Params::x, &Params::d_x, p.residual_dtype, true, activation}},
      {"qkv_weight", {&Params::qkv_weight, &Params::d_qkv_weight, p.dtype, true, {3, p.num_heads, p.head_dim, p.embed_dim}}},
      {"linear_weight", {&Params::linear_weight, &Params::d_linear_weight, p.dtype, true, {p.heads_dim(), p.embed_dim}}},
      {"qkv_bias", {&Params::qkv_bias, &Params::d_qkv_bias, p.dtype, false, {3, p.num_heads, p.head_dim}}},
      {"linear_bias", {&Params::linear_bias, &Params::d_linear_bias, p.dtype, false, row}},
      {"pre_ln_scale", {&Params::pre_ln_scale, &Params::d_pre_ln_scale, p.norm_dtype, false, row}},
      {"pre_ln_bias", {&Params::pre_ln_bias, &Params::d_pre_ln_bias, p.norm_dtype, false, row}},
      {"ln_scale", {&Params::ln_scale, &Params::d_ln_scale, p.norm_dtype, false, row}},
      {"ln_bias", {&Params::ln_bias, &Params::d_ln_bias, p.norm_dtype, false, row}}};
}

const void* checked(const py::object& object, const std::string& name, DType dtype, const std::vector<py::ssize_t>& shape) {
  if (!py::isinstance<py::array>(object)) throw py::type_error(name + ": expected a NumPy array");
  const py::array array = py::reinterpret_borrow<py::array>(object);
  if (!array.dtype().is(py::dtype(numpy_name(dtype)))) throw py::type_error(name + ": expected dtype " + numpy_name(dtype));
  if (!(array.flags() & py::array::c_style)) throw py::value_error(name + ": expected a contiguous array");
  if (std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) != shape) {
    throw py::value_error(name + ": expected shape " + py::str(py::cast(shape)).cast<std::string>() + ", got " +
                          py::str(array.attr("shape")).cast<std::string>());
  }
  return array.data();
}

// Any strides will do.
Mask mask_of(const py::object& object, const Params& p) {
  if (!py::isinstance<py::array>(object)) throw py::type_error("attn_mask: expected a NumPy array");
  const py::array array = py::reinterpret_borrow<py::array>(object);
  Mask mask;
  mask.data = array.data();
  mask.dtype = dtype_of(py::str(array.dtype()).cast<std::string>());
  const py::ssize_t scores[4] = {p.batch, p.num_heads, p.seq_len, p.seq_len};
  const py::ssize_t rank = array.ndim();
  for (py::ssize_t i = 0; i < rank; ++i) {
    const py::ssize_t axis = 4 - rank + i;
    if (axis < 0 || (array.shape(i) != 1 && array.shape(i) != scores[axis])) {
      throw py::value_error("attn_mask: expected a shape that broadcasts to [batch, num_heads, seq_len, seq_len], got " +
                            py::str(array.attr("shape")).cast<std::string>());
    }
    mask.strides[axis] = array.shape(i) == 1 ? 0 : array.strides(i) / array.itemsize();
  }
  return mask;
}

Params describe(const py::dict& inputs, const py::dict& config) {
  Params p = parse_config(config).params;
  const auto tensors = entries(p);
  for (const auto& item : inputs) {
    const auto name = item.first.cast<std::string>();
    const auto value = py::reinterpret_borrow<py::object>(item.second);
    if (value.is_none()) continue;
    if (name == "attn_mask") {
      p.mask = mask_of(value, p);
      continue;
    }
    const auto it = tensors.find(name);
    if (it == tensors.end()) throw py::value_error("inputs: unknown entry " + name);
    p.*it->second.input = checked(value, name, it->second.dtype, it->second.shape);
  }
  for (const auto& [name, entry] : tensors) {
    if (entry.required && !(p.*entry.input)) throw py::value_error("inputs: expected an entry " + name);
  }
  return p;
}

cpu::Context make_context(const std::string& isa) {
  cpu::Context context;
  context.threads = cpu::max_threads();
  if (isa.empty()) return context;
  for (const cpu::Kernels& kernels : cpu::supported_kernels()) {
    if (kernels.name == isa) {
      context.kernels = &kernels;
      return context;
    }
  }
  throw py::value_error("isa: this processor has no " + isa);
}

py::tuple forward(const py::dict& inputs, const py::dict& config, uint64_t seed, uint64_t offset, bool saves,
                  const std::string& isa) {
  Params p = describe(inputs, config);
  const cpu::Context shared = make_context(isa);
  py::array out(py::dtype(numpy_name(p.residual_dtype)), entries(p).at("x").shape);
  p.out = out.mutable_data();
  Bytes saved(saves ? saved_bytes(p) : 0);
  if (saves) {
    Arena arena(saved.mutable_data());
    plan_saved(p, arena);
  }
  std::vector<uint8_t> workspace(forward_workspace_bytes(shared, p, saves));
  {
    py::gil_scoped_release release;
    cpu::Context context = shared;
    Arena arena(workspace.data());
    plan_forward(context, p, arena, saves);
    p.seed = seed;
    p.offset = offset;
    block_forward(context, p);
  }
  return py::make_tuple(out, saves ? py::object(saved) : py::none());
}

py::dict backward(const py::dict& inputs, const py::dict& config, const py::array& d_out, const Bytes& saved,
                  const std::vector<std::string>& needs, const std::string& isa) {
  Params p = describe(inputs, config);
  const cpu::Context shared = make_context(isa);
  const auto tensors = entries(p);
  p.d_out = checked(d_out, "d_out", p.residual_dtype, tensors.at("x").shape);
  if (static_cast<size_t>(saved.size()) != saved_bytes(p)) throw py::value_error("saved: expected what forward returned");
  py::dict gradients;
  for (const std::string& name : needs) {
    const auto it = tensors.find(name);
    if (it == tensors.end() || !(p.*it->second.input)) throw py::value_error("needs: no such input: " + name);
    py::array gradient(py::dtype(numpy_name(it->second.dtype)), it->second.shape);
    p.*it->second.gradient = gradient.mutable_data();
    gradients[name.c_str()] = gradient;
  }
  Arena saved_arena(const_cast<uint8_t*>(saved.data()));
  plan_saved(p, saved_arena);
  std::vector<uint8_t> workspace(backward_workspace_bytes(shared, p));
  {
    py::gil_scoped_release release;
    cpu::Context context = shared;
    Arena arena(workspace.data());
    plan_backward(context, p, arena);
    block_backward(context, p);
  }
  return gradients;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const cpu::Kernels& kernels : cpu::supported_kernels()) names.push_back(kernels.name);
  return names;
}

}  // namespace

void bind_cpu(py::module_& module) {
  static const std::string inputs_doc =
      "inputs is a dict of contiguous NumPy arrays: x, qkv_weight, linear_weight, and optionally qkv_bias, linear_bias,\n"
      "pre_ln_scale, pre_ln_bias, ln_scale, ln_bias, attn_mask (any strides); bfloat16 as uint16.\n";
  static const std::string forward_doc = "Returns (out, saved); saved, None without `saves`, is for backward.\n" + inputs_doc +
                                         kConfigDoc + "\nisa: one of instruction_sets(), by default the best.";
  static const std::string backward_doc =
      "Returns the gradients of the inputs named in `needs` as a dict.\n" + inputs_doc + kConfigDoc;
  module.def("forward", forward, py::arg("inputs"), py::arg("config"), py::arg("seed") = 0, py::arg("offset") = 0,
             py::arg("saves") = true, py::arg("isa") = "", forward_doc.c_str());
  module.def("backward", backward, py::arg("inputs"), py::arg("config"), py::arg("d_out"), py::arg("saved"), py::arg("needs"),
             py::arg("isa") = "", backward_doc.c_str());
  module.def("instruction_sets", instruction_sets, "The instruction sets that this processor has kernels for, slowest first.");
}

}  // namespace pfa
