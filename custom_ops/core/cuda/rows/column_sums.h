// Sums over the rows of a matrix, in two steps of fixed order: every thread block sums a group of rows into the
// workspace, then the groups' sums are added. The gradients of biases and of layer-norm parameters are such sums.
#pragma once

#include "core/cuda/context.h"

namespace pfa {
namespace cuda {

// sums[j] = sum over i of matrix[i][j], both of `dtype`.
void column_sums(Context& context, DType dtype, const void* matrix, int64_t rows, int64_t cols, void* sums,
                 void* workspace);

size_t column_sums_workspace_bytes(const Context& context, DType dtype, int64_t rows, int64_t cols);

// The most groups that the rows of a matrix are cut into in the first step.
int64_t max_row_groups(const Context& context);

struct ColumnSum {
  void* sum = nullptr;  // [cols] of dtype; null: not wanted
  DType dtype = DType::kFloat32;
};

constexpr int kMaxColumnSums = 3;

// The second step: sums[k][j] = sum over i of partial[k][i][j], where partial is of `accumulator`.
void add_row_groups(Context& context, DType accumulator, const void* partial, int64_t row_groups, int64_t cols,
                    const ColumnSum (&sums)[kMaxColumnSums]);

// matrix[i][j] += bias[j]
void add_bias(Context& context, DType dtype, void* matrix, const void* bias, int64_t rows, int64_t cols);

}  // namespace cuda
}  // namespace pfa
