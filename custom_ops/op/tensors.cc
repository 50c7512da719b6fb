#include "op/tensors.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>

#include "op/devices.h"
#include "paddle/common/ddim.h"

namespace pfa::op {
namespace {

const char* kind_of(const paddle::Tensor& tensor) {
  if (tensor.is_selected_rows()) return "SelectedRows";
  return tensor.is_sparse_coo_tensor() || tensor.is_sparse_csr_tensor() ? "a sparse tensor"
                                                                        : "a tensor of another kind";
}

bool may_be_kept(size_t count, const paddle::Place& place) {
  return place.GetType() == phi::AllocationType::CPU && count >= Workspace::kLeastKeptBytes &&
         count <= Workspace::kMostKeptBytes;
}

// Kept workspaces, which outlive Paddle's own statics. No lock: a process may be forked at any time.
std::atomic<paddle::Tensor*> kept[8];
std::atomic<size_t> kept_bytes{0};

std::unique_ptr<paddle::Tensor> take_kept() {
  for (std::atomic<paddle::Tensor*>& slot : kept) {
    std::unique_ptr<paddle::Tensor> memory(slot.exchange(nullptr));
    if (!memory) continue;
    kept_bytes -= static_cast<size_t>(memory->numel());
    return memory;
  }
  return nullptr;
}

void keep(paddle::Tensor&& memory) {
  const size_t count = static_cast<size_t>(memory.numel());
  std::unique_ptr<paddle::Tensor> owned(new (std::nothrow) paddle::Tensor(std::move(memory)));
  if (owned && kept_bytes.fetch_add(count) + count <= Workspace::kMostKeptBytes) {
    for (std::atomic<paddle::Tensor*>& slot : kept) {
      paddle::Tensor* none = nullptr;
      if (!slot.compare_exchange_strong(none, owned.get())) continue;
      owned.release();
      return;
    }
  }
  if (owned) kept_bytes -= count;
}

}  // namespace

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

namespace {

// Paddle's own count of a view's numbers wraps around.
void check_count(const char* op, const paddle::Tensor& tensor, const std::string& name) {
  const Shape shape = shape_of(tensor);
  int64_t count = 1;
  bool fits = true;
  for (size_t i = 0; i < shape.rank; ++i) {
    if (shape[i] == 0) return;
    fits = fits && !__builtin_mul_overflow(count, shape[i], &count);
  }
  if (!fits) refuse(op, "ValueError", name, "a tensor of less than 2^63 numbers", "shape " + text(shape));
}

}  // namespace

void check_memory(const char* op, const paddle::Tensor& tensor, const std::string& name) {
  if (tensor.defined() && !tensor.is_dense_tensor()) {
    refuse(op, "TypeError", name, "a dense tensor", kind_of(tensor));
  }
  // Where a program's input was never given, Paddle's shape is of rank -1.
  const bool is_known = tensor.defined() && tensor.dims().size() >= 0;
  if (!is_known || (!tensor.initialized() && tensor.numel() != 0)) {
    refuse(op, "ValueError", name, "a tensor with values", "one without memory");
  }
  check_count(op, tensor, name);
}

void check_place(const char* op, const paddle::Tensor& tensor, const std::string& name, const paddle::Tensor& x) {
  if (tensor.place() == x.place()) return;
  refuse(op, "ValueError", name, "a tensor on the place of x, " + x.place().DebugString(),
         "one on " + tensor.place().DebugString());
}

void check_on_cpu(const char* op, const paddle::Tensor& weight, const std::string& name) {
  if (weight.is_cpu()) return;
  refuse(op, "ValueError", name, "a weight that is arranged for the CPU there",
         "it on " + weight.place().DebugString());
}

void check_device(const char* op, const paddle::Tensor& x) {
  if (has_kernels_for(x)) return;
  refuse(op, "ValueError", "x", "a tensor on a device that this build has kernels for",
         "one on " + x.place().DebugString());
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
  return paddle::empty({static_cast<int64_t>(std::max<size_t>(count, 1))}, paddle::DataType::UINT8, place);
}

// Kept ones that are too small are given up, so that all are soon of the size that is needed.
Workspace::Workspace(size_t count, const paddle::Place& place) {
  if (may_be_kept(count, place)) {
    while (const std::unique_ptr<paddle::Tensor> found = take_kept()) {
      if (static_cast<size_t>(found->numel()) < count) continue;
      memory_ = std::move(*found);
      return;
    }
  }
  memory_ = bytes(count, place);
}

Workspace::~Workspace() {
  if (may_be_kept(static_cast<size_t>(memory_.numel()), memory_.place())) keep(std::move(memory_));
}

}  // namespace pfa::op
