// Calls from dygraph that want no gradient, past Paddle's dispatch of custom operators, which takes longer than the
// work of a short call: it copies what it knows of all such operators every time. What else it does, for gradients,
// strided tensors and tensors that are spread over processes, is not needed where this is called, or is left to it.
//
// Python's objects are only handed through, so that one library serves all versions of Python.
#pragma once

#include <vector>

#include "paddle/extension.h"

struct _object;

namespace pfa::op {

using PythonObject = _object;

// The tensor behind an object, if the core can take it as it is: dense, contiguous, with memory. Else null.
const paddle::Tensor* plain_tensor(PythonObject* object);

// A new reference.
PythonObject* referred(PythonObject* object);
PythonObject* python_tensor(const paddle::Tensor& tensor);
PythonObject* python_tuple(const std::vector<paddle::Tensor>& tensors);

// Lets other threads of Python run while it lives.
class WithoutPython {
 public:
  WithoutPython();
  ~WithoutPython();
  WithoutPython(const WithoutPython&) = delete;
  WithoutPython& operator=(const WithoutPython&) = delete;

 private:
  void* state_;
};

}  // namespace pfa::op
