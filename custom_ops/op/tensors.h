// Paddle's tensors as the core takes them: dtypes, shapes, memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/params.h"
#include "op/checks.h"
#include "paddle/extension.h"

namespace pfa::op {

using Sizes = std::vector<int64_t>;

DType core_dtype(paddle::DataType dtype);

Shape shape_of(const paddle::Tensor& tensor);  // valid while the tensor lives

inline Sizes sizes_of(Shape shape) { return Sizes(shape.sizes, shape.sizes + shape.rank); }

// Throws, as the checks do, unless the tensor has memory that may be read; `name` is what errors call it.
void check_memory(const char* op, const paddle::Tensor& tensor, const std::string& name);

// Throws unless the tensor lies where x does.
void check_place(const char* op, const paddle::Tensor& tensor, const std::string& name, const paddle::Tensor& x);

// Throws unless an arranged weight lies on the CPU.
void check_on_cpu(const char* op, const paddle::Tensor& weight, const std::string& name);

// Throws unless this build has kernels for the device of x.
void check_device(const char* op, const paddle::Tensor& x);

paddle::Tensor allocate(const Sizes& shape, paddle::DataType dtype, const paddle::Place& place);

// Memory of so many bytes; one at least.
paddle::Tensor bytes(size_t count, const paddle::Place& place);

// The same for the time of a call. On the CPU it is kept for later calls, since the system clears the pages of new
// memory one by one as they are written to: pieces of at least kLeastKeptBytes, kMostKeptBytes in all.
class Workspace {
 public:
  static constexpr size_t kLeastKeptBytes = size_t{12} << 20;
  static constexpr size_t kMostKeptBytes = size_t{128} << 20;

  Workspace(size_t count, const paddle::Place& place);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() { return memory_.data(); }

 private:
  paddle::Tensor memory_;
};

}  // namespace pfa::op
