#include "op/direct.h"

#include <memory>

#include "paddle/phi/core/dense_tensor.h"

// Of Python's stable interface.
extern "C" {
void Py_IncRef(_object*);
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

const paddle::Tensor* plain_tensor(PythonObject* object) {
  if (!paddle::pybind::PyCheckTensor(object)) return nullptr;
  const paddle::Tensor& tensor = paddle::pybind::CastPyArg2Tensor(object, 0);
  if (!tensor.defined() || !tensor.is_dense_tensor() || !tensor.initialized()) return nullptr;
  const auto* dense = static_cast<const phi::DenseTensor*>(tensor.impl().get());
  return dense->meta().is_contiguous() ? &tensor : nullptr;
}

PythonObject* referred(PythonObject* object) {
  Py_IncRef(object);
  return object;
}

PythonObject* python_tensor(const paddle::Tensor& tensor) { return paddle::pybind::ToPyObject(tensor, false); }

WithoutPython::WithoutPython() : state_(PyEval_SaveThread()) {}

WithoutPython::~WithoutPython() { PyEval_RestoreThread(state_); }

}  // namespace pfa::op
