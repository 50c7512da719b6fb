// The blocks on NumPy arrays, for Python: functions forward and backward.
#include "pybind/cpu_block.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "core/attention_block.h"
#include "core/attention_weights.h"
#include "core/bare_attention.h"
#include "core/cpu/context.h"
#include "core/cpu/parallel.h"
#include "core/feed_forward_block.h"
#include "core/linear_block.h"
#include "core/residual_norm_block.h"
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

const void* checked(const py::object& object, const std::string& name, DType dtype, const Sizes& shape) {
  if (!py::isinstance<py::array>(object)) throw py::type_error(name + ": expected a NumPy array");
  const py::array array = py::reinterpret_borrow<py::array>(object);
  if (!array.dtype().is(py::dtype(numpy_name(dtype))))
    throw py::type_error(name + ": expected dtype " + numpy_name(dtype));
  if (!(array.flags() & py::array::c_style)) throw py::value_error(name + ": expected a contiguous array");
  if (Sizes(array.shape(), array.shape() + array.ndim()) != shape) {
    throw py::value_error(name + ": expected shape " + py::str(py::cast(shape)).cast<std::string>() + ", got " +
                          py::str(array.attr("shape")).cast<std::string>());
  }
  return array.data();
}

// Of scores of this shape. Any strides will do.
Mask mask_of(const py::object& object, const Sizes& scores) {
  if (!py::isinstance<py::array>(object)) throw py::type_error("attn_mask: expected a NumPy array");
  const py::array array = py::reinterpret_borrow<py::array>(object);
  Mask mask;
  mask.data = array.data();
  mask.dtype = dtype_of(py::str(array.dtype()).cast<std::string>());
  const py::ssize_t rank = array.ndim();
  for (py::ssize_t i = 0; i < rank; ++i) {
    const py::ssize_t axis = 4 - rank + i;
    if (axis < 0 || (array.shape(i) != 1 && array.shape(i) != scores[axis])) {
      throw py::value_error("attn_mask: expected a shape that broadcasts to [batch, num_heads, queries, keys], got " +
                            py::str(array.attr("shape")).cast<std::string>());
    }
    // NumPy's strides are 0 where there are no elements, but nothing broadcasts there.
    const py::ssize_t stride = array.size() ? array.strides(i) / array.itemsize() : 1;
    mask.strides[axis] = array.shape(i) == 1 ? 0 : stride;
  }
  return mask;
}

using Indices = py::array_t<int32_t, py::array::c_style>;

Indices indices_of(const std::string& name, const py::object& value) {
  if (!Indices::check_(value)) throw py::type_error(name + ": expected a contiguous array of int32");
  return py::reinterpret_borrow<Indices>(value);
}

// Takes an input that is described by more than its address.
bool take_described(const std::string& name, const py::object& value, AttentionBlockParams& p) {
  if (name == "cu_seqlens") {
    p.starts = indices_of(name, value).data();
    return true;
  }
  if (name != attention::kMaskName) return false;
  p.mask = mask_of(value, {p.batch, p.num_heads, p.seq_len, p.seq_len});
  p.attn_mask = p.mask.data;
  return true;
}
bool take_described(const std::string& name, const py::object& value, BareAttentionParams& p) {
  AttentionParams& a = p.attention;
  if (name == attention::kMaskName) {
    a.mask = mask_of(value, {a.batch, a.num_heads, a.queries, a.keys});
    p.attn_mask = a.mask.data;
    return true;
  }
  if (name != "cu_seqlens_q" && name != "cu_seqlens_k" && name != "startend_row_indices") return false;
  const Indices indices = indices_of(name, value);
  if (name == "startend_row_indices") {
    if (indices.ndim() != 4 || indices.shape(0) != a.batch || indices.shape(2) != a.keys) {
      throw py::value_error(name + ": expected shape [batch, num_kv_heads or 1, keys, columns]");
    }
    const int64_t head_stride = indices.shape(2) * indices.shape(3);
    a.hidden_ranges = {indices.data(), static_cast<int>(indices.shape(3)), a.causal, indices.shape(1) * head_stride,
                       indices.shape(1) == 1 ? 0 : head_stride};
  } else {
    if (indices.size() != a.batch + 1) throw py::value_error(name + ": expected shape [batch + 1]");
    (name == "cu_seqlens_q" ? a.query_starts : a.key_starts) = indices.data();
  }
  return true;
}
bool take_described(const std::string& name, const py::object& value, AttentionWeightsParams& p) {
  if (name != "statistics") return take_described(name, value, static_cast<BareAttentionParams&>(p));
  const auto bytes = Bytes::ensure(value);
  if (!bytes || static_cast<size_t>(bytes.size()) != saved_bytes(static_cast<const BareAttentionParams&>(p))) {
    throw py::value_error("statistics: expected what forward of bare_attention returned");
  }
  p.statistics = bytes.data();
  return true;
}
template <class P>
bool take_described(const std::string&, const py::object&, P&) {
  return false;
}

template <class P>
const ArrayOf<P>* find(const std::vector<ArrayOf<P>>& arrays, const std::string& name) {
  for (const ArrayOf<P>& array : arrays) {
    if (array.pointers.name == name) return &array;
  }
  return nullptr;
}

template <class P>
void place_inputs(const py::dict& inputs, const std::vector<ArrayOf<P>>& arrays, P& p) {
  for (const auto& item : inputs) {
    const auto name = item.first.cast<std::string>();
    const auto value = py::reinterpret_borrow<py::object>(item.second);
    if (value.is_none() || take_described(name, value, p)) continue;
    const ArrayOf<P>* array = find(arrays, name);
    if (!array) throw py::value_error("inputs: unknown entry " + name);
    p.*(array->pointers.value) = checked(value, name, array->dtype, array->shape);
  }
  for (const ArrayOf<P>& array : arrays) {
    if (array.is_required && !(p.*(array.pointers.value))) {
      throw py::value_error(std::string("inputs: expected an entry ") + array.pointers.name);
    }
  }
}

cpu::Context make_context(const std::string& isa) {
  cpu::Context context;
  context.threads = cpu::max_threads();
  if (isa.empty()) return context;
  for (const cpu::Implementation* implementation : cpu::usable_implementations()) {
    if (implementation->name == isa) {
      context.implementation = implementation;
      return context;
    }
  }
  throw py::value_error("isa: this processor has no " + isa);
}

template <class P>
void set_seed(P& p, uint64_t seed, uint64_t offset) {
  if constexpr (!std::is_same_v<P, LinearParams>) {
    p.seed = seed;
    p.offset = offset;
  }
}

// Begins at a line of the caches, as Paddle's memory does: elsewhere vectors and tiles would lie across two.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : memory_(bytes + kLine) {}
  void* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (kLine - address % kLine) % kLine;
  }

 private:
  static constexpr size_t kLine = 64;
  std::vector<uint8_t> memory_;
};

py::tuple forward(const py::dict& inputs, const py::dict& config, uint64_t seed, uint64_t offset, bool saves,
                  const std::string& isa) {
  return with_config(config, [&](const auto& parsed) {
    auto p = parsed.params;
    place_inputs(inputs, arrays_of(p), p);
    set_seed(p, seed, offset);
    cpu::Context context = make_context(isa);
    const ResultOf result = result_of(p);
    py::array out(py::dtype(numpy_name(result.dtype)), result.shape);
    p.out = out.mutable_data();
    Bytes saved(saves ? saved_bytes(p) : 0);
    void* const saved_memory = saves ? saved.mutable_data() : nullptr;
    Workspace workspace(forward_workspace_bytes(context, p, saves));
    {
      py::gil_scoped_release release;
      run_forward(context, p, saved_memory, workspace.data());
    }
    return py::make_tuple(out, saves ? py::object(saved) : py::none());
  });
}

py::dict backward(const py::dict& inputs, const py::dict& config, const py::array& d_out, const Bytes& saved,
                  const std::vector<std::string>& needs, const std::string& isa, const py::object& out) {
  return with_config(config, [&](const auto& parsed) {
    auto p = parsed.params;
    const auto arrays = arrays_of(p);
    place_inputs(inputs, arrays, p);
    cpu::Context context = make_context(isa);
    const ResultOf result = result_of(p);
    p.d_out = checked(d_out, "d_out", result.dtype, result.shape);
    if (std::is_base_of_v<BareAttentionParams, decltype(p)>) {
      p.out = const_cast<void*>(checked(out, "out", result.dtype, result.shape));
    }
    if (static_cast<size_t>(saved.size()) != saved_bytes(p))
      throw py::value_error("saved: expected what forward returned");
    py::dict gradients;
    for (const std::string& name : needs) {
      const auto* array = find(arrays, name);
      if (!array || !(p.*(array->pointers.value))) throw py::value_error("needs: no such input: " + name);
      const auto like = inputs[name.c_str()].cast<py::array>();
      if (name == attention::kMaskName && like.dtype().kind() != 'f') {
        throw py::value_error("needs: attn_mask has a gradient only if it is of a float type");
      }
      py::array gradient(like.dtype(), Sizes(like.shape(), like.shape() + like.ndim()));
      p.*(array->pointers.gradient) = gradient.mutable_data();
      gradients[name.c_str()] = gradient;
    }
    Workspace workspace(backward_workspace_bytes(context, p));
    const void* const saved_memory = saved.data();
    {
      py::gil_scoped_release release;
      run_backward(context, p, saved_memory, workspace.data());
    }
    return gradients;
  });
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const cpu::Implementation* implementation : cpu::usable_implementations()) {
    names.push_back(implementation->name);
  }
  return names;
}

}  // namespace

void bind_cpu(py::module_& module) {
  static const std::string inputs_doc =
      "inputs is a dict of contiguous NumPy arrays by their names in core/inputs.h, attn_mask of any strides unless "
      "its gradient is needed; bfloat16 as uint16.\n";
  static const std::string forward_doc = "Returns (out, saved); saved, None without `saves`, is for backward.\n" +
                                         inputs_doc + kConfigDoc +
                                         "\nisa: one of instruction_sets(), by default the best.";
  static const std::string backward_doc =
      "Returns the gradients of the inputs named in `needs` as a dict; bare_attention and attention_weights read "
      "out.\n" +
      inputs_doc + kConfigDoc;
  module.def("forward", forward, py::arg("inputs"), py::arg("config"), py::arg("seed") = 0, py::arg("offset") = 0,
             py::arg("saves") = true, py::arg("isa") = "", forward_doc.c_str());
  module.def("backward", backward, py::arg("inputs"), py::arg("config"), py::arg("d_out"), py::arg("saved"),
             py::arg("needs"), py::arg("isa") = "", py::arg("out") = py::none(), backward_doc.c_str());
  module.def("instruction_sets", instruction_sets,
             "The instruction sets that the stages are compiled for and this processor has, slowest first.");
}

}  // namespace pfa
