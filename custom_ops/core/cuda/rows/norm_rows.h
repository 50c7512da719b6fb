// The memory-bound stages, row by row: each number is read once and written once. Rows of `cols` numbers, M = rows.
#pragma once

#include "core/cuda/context.h"

namespace pfa {
namespace cuda {

// z = x + dropout(y + y_bias), n = (z - mean) * rstd, out = n * scale + bias. Pointers to numbers of one type may be
// equal: a number is read before it is overwritten.
struct NormRowsForward {
  DType dtype = DType::kFloat32;      // of y, y_bias, x, z and n
  DType out_dtype = DType::kFloat32;  // dtype; or 16-bit beside a float32 z that is y
  DType norm_dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  const void* y = nullptr;
  const void* y_bias = nullptr;  // [cols] or null
  const void* x = nullptr;       // null: nothing is added
  Dropout dropout;
  const uint64_t* random_state = nullptr;
  void* z = nullptr;            // null: not wanted, with a layer norm
  bool rounds_z = false;        // the layer norm is that of z as dtype holds it
  void* normalized = nullptr;   // n; null: not wanted
  void* out = nullptr;          // null: no layer norm
  const void* scale = nullptr;  // [cols] or null
  const void* bias = nullptr;   // [cols] or null
  double epsilon = 0.0;
  void* mean = nullptr;  // [M] or null
  void* rstd = nullptr;  // [M] or null
};

void norm_rows_forward(Context& context, const NormRowsForward& args);

// d_z = layer_norm'(d_out) + d_added, d_y = dropout'(d_z), and the sums of the parameters' gradients over the rows.
// Without a layer norm d_z is d_out. d_z may lie where d_out or d_added does, if their types are the same.
struct NormRowsBackward {
  DType dtype = DType::kFloat32;        // of z, d_added and d_z
  DType d_out_dtype = DType::kFloat32;  // dtype, or 16-bit beside float32
  DType d_y_dtype = DType::kFloat32;    // dtype; or 16-bit beside float32, and then d_y is never d_z
  DType norm_dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  const void* d_out = nullptr;
  bool has_norm = true;
  const void* z = nullptr;     // with dropout n = (z - mean) * rstd in its place
  const void* mean = nullptr;  // null with dropout
  const void* rstd = nullptr;
  const void* scale = nullptr;    // [cols] or null
  const void* d_added = nullptr;  // null: nothing is added
  Dropout dropout;
  const uint64_t* random_state = nullptr;
  void* d_z = nullptr;      // null: not wanted
  void* d_y = nullptr;      // null: not wanted, or the same as d_z
  void* d_scale = nullptr;  // [cols] of norm_dtype, or null: not wanted
  void* d_bias = nullptr;   // [cols] of norm_dtype, or null: not wanted
  void* d_y_sum = nullptr;  // [cols] of d_y_dtype, or null: not wanted; not without d_y where d_y_dtype is not dtype
};

void norm_rows_backward(Context& context, const NormRowsBackward& args, void* workspace);
size_t norm_rows_backward_workspace_bytes(const Context& context, DType dtype, int64_t cols);

}  // namespace cuda
}  // namespace pfa
