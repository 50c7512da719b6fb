// A matrix product by cuBLASLt with what can be fused to it: an added matrix, a bias, the sums that are bias gradients.
#pragma once

#include "core/cuda/context.h"

namespace pfa {
namespace cuda {

// d[m, n] = op(a)[m, k] @ op(b)[k, n] (+ c) (+ bias), all row-major; op(a) is a, or where a is stored as [k, m] its transpose,
// likewise b.
struct MatrixProduct {
  DType dtype = DType::kFloat32;
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  bool a_transposed = false;
  const void* b = nullptr;
  bool b_transposed = false;
  void* d = nullptr;

  // At most one of the following three.
  bool has_bias = false;   // adds bias [n] to every row
  bool sums_a = false;     // sum_a[m] = sum over k of op(a); needs a_transposed
  bool sums_b = false;     // sum_b[n] = sum over k of op(b); needs b not transposed
  void* vector = nullptr;  // that bias or sum

  bool adds_c = false;
  const void* c = nullptr;  // [m, n], may be d itself
};

void matrix_product(Context& context, const MatrixProduct& product, void* workspace);

// For pointers that are not known yet.
size_t matrix_product_workspace_bytes(const Context& context, const MatrixProduct& product);

}  // namespace cuda
}  // namespace pfa
