#include "op/direct.h"

#include "paddle/common/ddim.h"

// Of Python's stable interface.
extern "C" {
void Py_IncRef(_object*);
_object* PyTuple_New(ssize_t size);
int PyTuple_SetItem(_object* tuple, ssize_t position, _object* item);  // which it takes over
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
}

// As paddle/utils/pybind.h declares them, which includes Python.h.
namespace paddle::pybind {
bool PyCheckTensor(_object*);
Tensor& CastPyArg2Tensor(_object*, ssize_t position);
_object* ToPyObject(const Tensor&, bool none_if_not_initialized);
}  // namespace paddle::pybind

namespace pfa::op {
namespace {

// Paddle 2.6 tells it only in a header that asks for cuDNN's.
bool is_contiguous(const paddle::Tensor& tensor) {
  const auto& sizes = tensor.dims();
  const auto& strides = tensor.strides();
  if (strides.size() != sizes.size()) return false;
  int64_t expected = 1;
  for (int i = sizes.size(); i-- > 0;) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

}  // namespace

const paddle::Tensor* plain_tensor(PythonObject* object) {
  if (!paddle::pybind::PyCheckTensor(object)) return nullptr;
  const paddle::Tensor& tensor = paddle::pybind::CastPyArg2Tensor(object, 0);
  if (!tensor.defined() || !tensor.is_dense_tensor() || !tensor.initialized()) return nullptr;
  return is_contiguous(tensor) ? &tensor : nullptr;
}

PythonObject* referred(PythonObject* object) {
  Py_IncRef(object);
  return object;
}

PythonObject* python_tensor(const paddle::Tensor& tensor) { return paddle::pybind::ToPyObject(tensor, false); }

PythonObject* python_tuple(const std::vector<paddle::Tensor>& tensors) {
  PythonObject* const tuple = PyTuple_New(static_cast<ssize_t>(tensors.size()));
  for (size_t i = 0; tuple && i < tensors.size(); ++i) {
    PyTuple_SetItem(tuple, static_cast<ssize_t>(i), python_tensor(tensors[i]));
  }
  return tuple;
}

WithoutPython::WithoutPython() : state_(PyEval_SaveThread()) {}

WithoutPython::~WithoutPython() { PyEval_RestoreThread(state_); }

}  // namespace pfa::op
