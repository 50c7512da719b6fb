// What stands between two products, number by number: activation, gate and dropout, and their gradients.
#pragma once

#include "core/cuda/context.h"

namespace pfa {
namespace cuda {

// u = dropout(activation(h)); gated, with a and b the halves of a row of h: u = dropout(activation(a) * b). d_h is the
// gradient of h from d_u. Matrices of one size may be the same: a number is read before it is overwritten.
struct ActivationRows {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kRelu;
  bool gated = false;
  int64_t rows = 0;
  int64_t cols = 0;  // of u
  // Backward, where the columns are part of h's: how many there are of h or, gated, of each of its halves. 0: cols.
  int64_t all_cols = 0;
  Dropout dropout;
  const uint64_t* random_state = nullptr;
  // Dropout counts u[i][j] as element i * elements_in_row + first_element + j.
  int64_t first_element = 0;
  int64_t elements_in_row = 0;

  const void* h = nullptr;    // [M, all_cols], gated [M, 2 * all_cols], from the first column on
  void* u = nullptr;          // [M, cols]; backward: null: not wanted
  const void* d_u = nullptr;  // [M, cols]
  void* d_h = nullptr;        // as h

  // Backward: the column sums of d_h, before it is rounded, likewise from the first column on; null: not wanted. They
  // need the workspace.
  void* d_h_sums = nullptr;
  void* workspace = nullptr;
};

void activate(Context& context, const ActivationRows& args);

// Forms d_h and, unless it is null, u anew.
void activate_backward(Context& context, const ActivationRows& args);

// d_h of relu, not gated, from u, which is not 0 where relu and dropout let a number pass.
void relu_backward(Context& context, const ActivationRows& args);

// Of args it reads what says how large the matrices are.
size_t activation_sums_workspace_bytes(const Context& context, const ActivationRows& args);

}  // namespace cuda
}  // namespace pfa
