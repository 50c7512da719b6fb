// Column sums of a matrix and of the row groups' sums; see column_sums.h.
//
// A thread block is 32 threads wide, each thread holding one vector of neighbouring columns, and 16 threads high.
#include "core/cuda/rows/column_sums.h"

#include <algorithm>

#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {
namespace {

constexpr int kWidth = 32;
constexpr int kHeight = 16;

template <class T, int kVec>
__global__ void __launch_bounds__(kWidth* kHeight)
    column_sums_kernel(const T* __restrict__ matrix, int64_t rows, int64_t cols, Accumulator<T>* __restrict__ partial) {
  using A = Accumulator<T>;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kWidth + threadIdx.x) * kVec;
  A sum[kVec] = {};
  if (col < cols) {
    const int64_t step = static_cast<int64_t>(gridDim.y) * kHeight;
#pragma unroll 4
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kHeight + threadIdx.y; row < rows; row += step) {
      A value[kVec];
      load(matrix + row * cols + col, value);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += value[i];
    }
  }
  __shared__ A sums[kHeight][kVec][kWidth];
#pragma unroll
  for (int i = 0; i < kVec; ++i) sums[threadIdx.y][i][threadIdx.x] = sum[i];
  __syncthreads();
  if (threadIdx.y < kVec && col < cols) {
    A total = 0;
#pragma unroll
    for (int k = 0; k < kHeight; ++k) total += sums[k][threadIdx.y][threadIdx.x];
    partial[blockIdx.y * cols + col + threadIdx.y] = total;
  }
}

__device__ __forceinline__ void store_as(DType dtype, void* target, int64_t index, float value) {
  if (dtype == DType::kFloat32) static_cast<float*>(target)[index] = value;
  if (dtype == DType::kFloat16) static_cast<__half*>(target)[index] = __float2half_rn(value);
  if (dtype == DType::kBFloat16) static_cast<__nv_bfloat16*>(target)[index] = __float2bfloat16_rn(value);
}

__device__ __forceinline__ void store_as(DType, void* target, int64_t index, double value) {
  static_cast<double*>(target)[index] = value;
}

template <class A>
__global__ void __launch_bounds__(kWidth* kHeight)
    add_row_groups_kernel(const A* __restrict__ partial, int64_t row_groups, int64_t cols, ColumnSum sum0,
                          ColumnSum sum1, ColumnSum sum2) {
  const ColumnSum target = blockIdx.y == 0 ? sum0 : blockIdx.y == 1 ? sum1 : sum2;
  if (!target.sum) return;
  partial += blockIdx.y * row_groups * cols;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWidth + threadIdx.x;
  A sum = 0;
  if (col < cols) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < row_groups; row += kHeight) sum += partial[row * cols + col];
  }
  __shared__ A sums[kHeight][kWidth];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && col < cols) {
    A total = 0;
#pragma unroll
    for (int k = 0; k < kHeight; ++k) total += sums[k][threadIdx.x];
    store_as(target.dtype, target.sum, col, total);
  }
}

template <class T>
__global__ void add_bias_kernel(T* __restrict__ matrix, const T* __restrict__ bias, int64_t size, int64_t cols) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    matrix[i] = narrow<T>(widen(matrix[i]) + widen(bias[i % cols]));
  }
}

template <class T, int kVec>
int64_t launch_column_sums(Context& context, const void* matrix, int64_t rows, int64_t cols, void* partial) {
  const int64_t col_blocks = (cols + kWidth * kVec - 1) / (kWidth * kVec);
  const int64_t wanted = std::max<int64_t>(1, 4 * context.num_sms / col_blocks);
  const int64_t row_groups = std::min({wanted, max_row_groups(context), (rows + kHeight - 1) / kHeight});
  const dim3 grid(static_cast<unsigned>(col_blocks), static_cast<unsigned>(row_groups));
  column_sums_kernel<T, kVec><<<grid, dim3(kWidth, kHeight), 0, context.stream>>>(
      static_cast<const T*>(matrix), rows, cols, static_cast<Accumulator<T>*>(partial));
  check_launch("column_sums_kernel");
  return row_groups;
}

}  // namespace

int64_t max_row_groups(const Context& context) { return 2 * static_cast<int64_t>(context.num_sms); }

size_t column_sums_workspace_bytes(const Context& context, DType dtype, int64_t rows, int64_t cols) {
  return std::min(max_row_groups(context), (rows + kHeight - 1) / kHeight) * cols * size_of(accumulator_of(dtype));
}

void column_sums(Context& context, DType dtype, const void* matrix, int64_t rows, int64_t cols, void* sums,
                 void* workspace) {
  if (rows == 0) {
    check(cudaMemsetAsync(sums, 0, cols * size_of(dtype), context.stream), "column_sums: cudaMemsetAsync");
    return;
  }
  dispatch_float(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVec = kVectorSize<T>;
    const bool vectors = cols % kVec == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0;
    const int64_t row_groups = vectors ? launch_column_sums<T, kVec>(context, matrix, rows, cols, workspace)
                                       : launch_column_sums<T, 1>(context, matrix, rows, cols, workspace);
    const ColumnSum targets[kMaxColumnSums] = {{sums, dtype}, {}, {}};
    add_row_groups(context, accumulator_of(dtype), workspace, row_groups, cols, targets);
  });
}

void add_row_groups(Context& context, DType accumulator, const void* partial, int64_t row_groups, int64_t cols,
                    const ColumnSum (&sums)[kMaxColumnSums]) {
  int count = kMaxColumnSums;
  while (count > 0 && !sums[count - 1].sum) --count;
  if (count == 0) return;
  const dim3 grid(static_cast<unsigned>((cols + kWidth - 1) / kWidth), count);
  const dim3 block(kWidth, kHeight);
  if (accumulator == DType::kFloat64) {
    add_row_groups_kernel<<<grid, block, 0, context.stream>>>(static_cast<const double*>(partial), row_groups, cols,
                                                              sums[0], sums[1], sums[2]);
  } else {
    add_row_groups_kernel<<<grid, block, 0, context.stream>>>(static_cast<const float*>(partial), row_groups, cols,
                                                              sums[0], sums[1], sums[2]);
  }
  check_launch("add_row_groups_kernel");
}

void add_bias(Context& context, DType dtype, void* matrix, const void* bias, int64_t rows, int64_t cols) {
  const int64_t size = rows * cols;
  if (size == 0) return;
  constexpr int kThreads = 256;
  const int64_t blocks = std::min<int64_t>((size + kThreads - 1) / kThreads, 8 * static_cast<int64_t>(context.num_sms));
  dispatch_float(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    add_bias_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, context.stream>>>(
        static_cast<T*>(matrix), static_cast<const T*>(bias), size, cols);
    check_launch("add_bias_kernel");
  });
}

}  // namespace cuda
}  // namespace pfa
