// A matrix product by cuBLASLt with what can be fused to it: an added matrix, a bias, and relu.
#pragma once

#include "core/cuda/context.h"

namespace pfa {
namespace cuda {

// d[m, n] = relu?(op(a)[m, k] @ op(b)[k, n] (+ c) (+ bias)), all row-major; op(a) is a, or where a is stored as [k, m]
// its transpose, likewise b.
struct MatrixProduct {
  DType dtype = DType::kFloat32;         // of a and b
  DType result_dtype = DType::kFloat32;  // of c, d and bias: dtype, or float32 beside a 16-bit one
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  bool a_transposed = false;
  const void* b = nullptr;
  bool b_transposed = false;
  void* d = nullptr;

  bool has_bias = false;  // adds bias [n] to every row
  const void* bias = nullptr;

  bool adds_c = false;
  const void* c = nullptr;  // [m, n], may be d itself

  bool has_relu = false;
};

void matrix_product(Context& context, const MatrixProduct& product, void* workspace);

// For pointers that are not known yet.
size_t matrix_product_workspace_bytes(const Context& context, const MatrixProduct& product);

}  // namespace cuda
}  // namespace pfa
