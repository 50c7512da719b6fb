// Layer norm, dropout and the parameters' gradients, backward (norm_rows.h).
//
//   g = d_out * scale,  n = (z - mean) * rstd,  d_z = rstd * (g - mean(g) - n * mean(g * n)) + d_added,  d_y =
//   dropout'(d_z) d_scale = sum of d_out * n,  d_bias = sum of d_out,  d_y_sum = sum of d_y, over the rows
//
// With dropout, n is given in place of z.
//
// Few thread blocks walk over many rows, so that sums over rows stay in registers until the end; then each writes
// one row of sums, and a second kernel adds those (column_sums.h). A thread copies what it will need of the next rows
// into its own slots of shared memory while it works on the present one. Rows that no group can hold, or that cannot be
// read by vectors, take one kernel for d_z and d_y and another for the sums.
#include "core/cuda/rows/norm_rows.h"

#include <type_traits>

#include "core/cuda/rows/column_sums.h"
#include "core/cuda/rows/norm_rows.cuh"

namespace pfa {
namespace cuda {
namespace {

constexpr int kLongThreads = 256;
constexpr int kSumWidth = 32;
constexpr int kSumHeight = 16;

// kNormSum: d_y is d_z, or what its type holds of it, and its sum is wanted, or it goes to memory of its own.
enum class Kind { kNorm, kNormSum, kNormDropout, kDropout };

// T: the type of z, d_added and d_z; P: of the scale; G: of d_out; Y: of d_y. Vectors are as many numbers as 16 bytes
// hold of T.
template <class T, class P, class G, class Y>
struct Kernel {
  using A = Accumulator<T>;
  int64_t rows;
  int64_t cols;
  const G* d_out;
  const T* z;
  const A* mean;
  const A* rstd;
  const P* scale;
  const T* d_added;
  uint32_t threshold;
  A dropout_scale;
  const uint64_t* random_state;
  T* d_z;
  Y* d_y;
  A* partial;  // [kMaxColumnSums][row groups][cols]: d_scale, d_bias, d_y_sum

  __device__ PhiloxState philox() const {
    return threshold ? philox_state(random_state[0], random_state[1], DropoutStage::kOutput) : PhiloxState{};
  }

  __device__ __forceinline__ PhiloxWords words(PhiloxState state, int64_t index) const {
    return threshold ? output_words(state, index) : PhiloxWords{};
  }

  __device__ __forceinline__ A normal(int64_t row, int64_t col) const {
    const A value = widen(z[row * cols + col]);
    return mean ? (value - mean[row]) * rstd[row] : value;
  }

  template <int N>
  __device__ __forceinline__ void dropout(const PhiloxWords& words, int64_t index, A (&value)[N]) const {
    if (threshold) {
      apply_output_dropout(words, threshold, dropout_scale, index, value);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] *= dropout_scale;
    }
  }
};

// Starts a copy of 16 or 8 bytes, or of zeros if there is nothing to copy, into the thread's own shared memory.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
  static_assert(kBytes == 16 || kBytes == 8, "a vector of 16 bytes, or of as many numbers of half the size");
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(exists ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(exists ? 8 : 0) : "memory");
  }
#else
  using Bytes = std::conditional_t<kBytes == 16, uint4, uint2>;
  *static_cast<Bytes*>(shared) = exists ? *static_cast<const Bytes*>(global) : Bytes{};
#endif
}

__device__ __forceinline__ void end_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending later groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

template <Kind kKind>
constexpr int kInputs = kKind == Kind::kNorm      ? 3
                        : kKind == Kind::kDropout ? 1
                                                  : 2;  // d_out, z, d_added

template <Kind kKind>
constexpr int kSums = kKind == Kind::kNorm      ? 2
                      : kKind == Kind::kDropout ? 1
                                                : 3;

constexpr int kBlockThreads = 512;

// Vectors of a row that a thread holds; with 512 threads there are registers for the sums of no more.
template <class T>
constexpr int kItems = sizeof(T) == 2 ? 2 : 4;

// Rows of a group on their way at a time, the present one included: as many as 192 KiB hold, but 2 to 4.
template <class T, Kind kKind>
constexpr int kRowsInFlight = std::max(2, std::min(4, (192 << 10) / (16 * kInputs<kKind> * kItems<T> * kBlockThreads)));

// The shared memory for the sums of groups.
template <class T>
constexpr size_t kStaticBytes = 4 * kMaxWarps * sizeof(Accumulator<T>);

// Numbers between the rows of the exchange of sums, so that reading neighbouring columns meets different banks.
template <class T>
constexpr int kPadding = 128 / sizeof(Accumulator<T>) / kVectorSize<T>;

template <class T, class P, class G, class Y, Kind kKind>
__global__ void __launch_bounds__(kBlockThreads, 1) norm_rows_backward_kernel(const Kernel<T, P, G, Y> k) {
  using A = Accumulator<T>;
  constexpr int kVec = kVectorSize<T>;
  constexpr int kItems = cuda::kItems<T>;
  constexpr int kDepth = kRowsInFlight<T, kKind>;
  constexpr bool kHasNorm = kKind != Kind::kDropout;
  constexpr bool kGivesNormal = kKind == Kind::kNormDropout;  // z holds n
  constexpr bool kHasDropout = kGivesNormal || kKind == Kind::kDropout;
  extern __shared__ uint4 shared[];
  __shared__ A slots[2][2 * kMaxWarps];
  static_assert(sizeof(slots) == kStaticBytes<T>, "shared memory beside the dynamic");

  const int threads = blockDim.x * blockDim.y;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int cols = static_cast<int>(k.cols);
  const int vectors = cols / kVec;
  const auto in_row = [&](int item) { return static_cast<int>(item * blockDim.x + threadIdx.x) < vectors; };

  // All groups of a thread block take as many turns. Where there is no row or column the copies are zeros, and so is
  // what they add to sums.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y;
  const int step = static_cast<int>(gridDim.x * blockDim.y);
  const auto turns_from = [&](int64_t row) {
    return row < k.rows ? static_cast<int>((k.rows - row + step - 1) / step) : 0;
  };
  const int turns = turns_from(first);
  const int own_turns = turns_from(first + threadIdx.y);

  // Places in a matrix are counted in bytes of T.
  const int64_t stride = static_cast<int64_t>(step) * vectors * 16;
  int64_t place = ((first + threadIdx.y) * vectors + threadIdx.x) * 16;
  const auto at = [&](auto* matrix, int64_t from, int item) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(matrix)>>, const char, char>;
    constexpr int kShare = sizeof(T) / sizeof(*matrix);
    return reinterpret_cast<decltype(matrix)>(reinterpret_cast<Byte*>(matrix) + from / kShare) +
           static_cast<int>(item * blockDim.x) * kVec;
  };
  // A warp's copies lie together.
  const int stage_slots = kInputs<kKind> * kItems * threads;
  const int first_slot = thread / 32 * (32 * kInputs<kKind> * kItems) + thread % 32;
  const auto slot = [&](int stage_slot, int input, int item) {
    return shared + first_slot + stage_slot + (input * kItems + item) * 32;
  };

  const auto fetch = [&](int turn, int64_t from, int stage_slot) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const bool exists = turn < own_turns && in_row(item);
      copy_async<kVec * sizeof(G)>(slot(stage_slot, 0, item), at(k.d_out, from, item), exists);
      if constexpr (kHasNorm) copy_async<16>(slot(stage_slot, 1, item), at(k.z, from, item), exists);
      if constexpr (kKind == Kind::kNorm) {
        if (k.d_added) copy_async<16>(slot(stage_slot, 2, item), at(k.d_added, from, item), exists);
      }
    }
    end_copies();
  };

  A sums[kSums<kKind>][kItems][kVec] = {};
#pragma unroll
  for (int stage = 0; stage < kDepth - 1; ++stage) fetch(stage, place + stage * stride, stage * stage_slots);

  // The scale lies in shared memory, as registers are scarce.
  P* factors = reinterpret_cast<P*>(shared + kDepth * stage_slots) + threadIdx.x * kVec;
  if constexpr (kHasNorm) {
#pragma unroll
    for (int item = 0; item < kItems && threadIdx.y == 0; ++item) {
      const int col = static_cast<int>(item * blockDim.x) * kVec;
      Vector<P, kVec> factor;
#pragma unroll
      for (int i = 0; i < kVec; ++i) factor.value[i] = narrow<P>(1);
      if (k.scale && in_row(item)) factor = load_vector<kVec>(k.scale + threadIdx.x * kVec + col);
      store_vector(factors + col, factor);
    }
    __syncthreads();
  }
  const PhiloxState philox = kHasDropout ? k.philox() : PhiloxState{};

  const A inverse_cols = A(1) / static_cast<A>(k.cols);
  A mean = 0, rstd = 0, next_mean = 0, next_rstd = 0;
  const auto fetch_statistics = [&](int turn) {
    if (kHasNorm && turn < own_turns) {
      const int64_t row = first + threadIdx.y + static_cast<int64_t>(turn) * step;
      if (!kGivesNormal) next_mean = k.mean[row];
      next_rstd = k.rstd[row];
    }
  };
  fetch_statistics(0);

  int stage_slot = 0;
  for (int turn = 0; turn < turns; ++turn) {
    mean = next_mean;
    rstd = next_rstd;
    fetch_statistics(turn + 1);
    const int slot_ahead = stage_slot == 0 ? (kDepth - 1) * stage_slots : stage_slot - stage_slots;
    fetch(turn + kDepth - 1, place + (kDepth - 1) * stride, slot_ahead);
    wait_copies<kDepth - 1>();

    // n = z * z_factor + z_shift; d_z = g * rstd + z * slope + offset.
    A slope = 0, offset = 0;
    if constexpr (kHasNorm) {
      A means[2] = {0, 0};
      const A z_factor = kGivesNormal ? A(1) : rstd;
      const A z_shift = -mean * z_factor;
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        A g[kVec], z[kVec], factor[kVec];
        load(factors + static_cast<int>(item * blockDim.x) * kVec, factor);
        load(reinterpret_cast<const G*>(slot(stage_slot, 0, item)), g);
        load(reinterpret_cast<const T*>(slot(stage_slot, 1, item)), z);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const A n = kGivesNormal ? z[i] : z[i] * z_factor + z_shift;
          sums[0][item][i] += g[i] * n;
          sums[1][item][i] += g[i];
          g[i] *= factor[i];
          means[0] += g[i];
          means[1] += g[i] * n;
        }
      }
      group_sum<false>(means, slots[turn % 2]);
      slope = -rstd * z_factor * (means[1] * inverse_cols);
      offset = -rstd * (means[0] * inverse_cols) - (kGivesNormal ? A(0) : slope * mean);
    }

    // g is formed anew: registers are scarcer than arithmetic.
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const bool exists = turn < own_turns && in_row(item);
      A d[kVec];
      load(reinterpret_cast<const G*>(slot(stage_slot, 0, item)), d);
      if constexpr (kHasNorm) {
        A z[kVec], factor[kVec];
        load(factors + static_cast<int>(item * blockDim.x) * kVec, factor);
        load(reinterpret_cast<const T*>(slot(stage_slot, 1, item)), z);
#pragma unroll
        for (int i = 0; i < kVec; ++i) d[i] = d[i] * factor[i] * rstd + (z[i] * slope + offset);
        if constexpr (kKind == Kind::kNorm) {
          if (k.d_added) {
            A added[kVec];
            load(reinterpret_cast<const T*>(slot(stage_slot, 2, item)), added);
#pragma unroll
            for (int i = 0; i < kVec; ++i) d[i] += added[i];
          }
        }
        if (k.d_z && exists) store(at(k.d_z, place, item), d);
        if constexpr (kKind == Kind::kNormSum) {
          if (k.d_y && exists) store(at(k.d_y, place, item), d);
        }
      }
      if constexpr (kHasDropout) {
        const int64_t index = (place / 16 + static_cast<int>(item * blockDim.x)) * kVec;
        k.dropout(k.words(philox, index), index, d);
        if (k.d_y && exists) store(at(k.d_y, place, item), d);
      }
      if constexpr (kKind != Kind::kNorm) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sums[kSums<kKind> - 1][item][i] += d[i];
      }
    }
    place += stride;
    stage_slot = stage_slot == (kDepth - 1) * stage_slots ? 0 : stage_slot + stage_slots;
  }

  // The thread block's sums: over its groups, through the shared memory that the copies no longer use.
  wait_copies<0>();
  __syncthreads();
  A* exchange = reinterpret_cast<A*>(shared);
  const int pitch = threads + kPadding<T>;
#pragma unroll
  for (int s = 0; s < kSums<kKind>; ++s) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) exchange[((s * kItems + item) * kVec + i) * pitch + thread] = sums[s][item][i];
    }
  }
  __syncthreads();
  for (int col = thread; col < cols; col += threads) {
    const int vector = col / kVec;
    const int place = (vector / blockDim.x * kVec + col % kVec) * pitch + vector % blockDim.x;
#pragma unroll
    for (int s = 0; s < kSums<kKind>; ++s) {
      A total = 0;
      for (int group = 0; group < static_cast<int>(blockDim.y); ++group) {
        total += exchange[s * kItems * kVec * pitch + place + group * blockDim.x];
      }
      const int target = kKind == Kind::kDropout ? 2 : s;
      k.partial[(static_cast<int64_t>(target) * gridDim.x + blockIdx.x) * cols + col] = total;
    }
  }
}

template <class T, class P, class G, class Y>
__global__ void __launch_bounds__(kLongThreads) norm_long_rows_backward_kernel(const Kernel<T, P, G, Y> k) {
  using A = Accumulator<T>;
  __shared__ A slots[2 * kMaxWarps];
  const int64_t row = blockIdx.x;
  const PhiloxState state = k.philox();
  const G* d_out = k.d_out + row * k.cols;
  const bool has_norm = k.z != nullptr;

  A rstd = 0;
  A means[2] = {0, 0};
  if (has_norm) {
    rstd = k.rstd[row];
    for (int64_t col = threadIdx.x; col < k.cols; col += blockDim.x) {
      const A g = widen(d_out[col]) * (k.scale ? widen(k.scale[col]) : A(1));
      means[0] += g;
      means[1] += g * k.normal(row, col);
    }
    group_sum<true>(means, slots);
    means[0] /= static_cast<A>(k.cols);
    means[1] /= static_cast<A>(k.cols);
  }
  for (int64_t col = threadIdx.x; col < k.cols; col += blockDim.x) {
    const int64_t index = row * k.cols + col;
    A d[1] = {widen(d_out[col])};
    if (has_norm) {
      d[0] = rstd * (d[0] * (k.scale ? widen(k.scale[col]) : A(1)) - means[0] - k.normal(row, col) * means[1]);
      if (k.d_added) d[0] += widen(k.d_added[index]);
      if (k.d_z) store(k.d_z + index, d);
    }
    if (k.d_y) {
      k.dropout(k.words(state, index), index, d);
      store(k.d_y + index, d);
    }
  }
}

// d_scale and d_bias alone; d_y_sum is a plain column sum.
template <class T, class P, class G, class Y>
__global__ void __launch_bounds__(kSumWidth* kSumHeight) norm_long_rows_sums_kernel(const Kernel<T, P, G, Y> k) {
  using A = Accumulator<T>;
  __shared__ A shared[2][kSumHeight][kSumWidth];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kSumWidth + threadIdx.x;
  A sums[2] = {0, 0};
  if (col < k.cols) {
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kSumHeight + threadIdx.y; row < k.rows;
         row += static_cast<int64_t>(gridDim.y) * kSumHeight) {
      const A d_out = widen(k.d_out[row * k.cols + col]);
      sums[0] += d_out * k.normal(row, col);
      sums[1] += d_out;
    }
  }
  shared[0][threadIdx.y][threadIdx.x] = sums[0];
  shared[1][threadIdx.y][threadIdx.x] = sums[1];
  __syncthreads();
  if (threadIdx.y < 2 && col < k.cols) {
    A total = 0;
    for (int i = 0; i < kSumHeight; ++i) total += shared[threadIdx.y][i][threadIdx.x];
    k.partial[(static_cast<int64_t>(threadIdx.y) * gridDim.y + blockIdx.y) * k.cols + col] = total;
  }
}

// Returns how many thread blocks wrote sums; 0 if the rows do not fit, and nothing was launched.
template <Kind kKind, class T, class P, class G, class Y>
int64_t launch(Context& context, const Kernel<T, P, G, Y>& kernel) {
  RowShape shape = row_shape(kernel.cols / kVectorSize<T>, kItems<T>, kBlockThreads);
  const auto shared_bytes = [&] {
    const size_t threads = shape.group_threads * shape.groups;
    const size_t copies = sizeof(uint4) * kRowsInFlight<T, kKind> * kInputs<kKind> * kItems<T> * threads;
    const size_t exchange =
        sizeof(Accumulator<T>) * kVectorSize<T> * kItems<T> * kSums<kKind> * (threads + kPadding<T>);
    const size_t factors = kKind == Kind::kDropout ? 0 : sizeof(P) * kVectorSize<T> * kItems<T> * shape.group_threads;
    return std::max(copies + factors, exchange);
  };
  while (shape.groups > 0 && shared_bytes() + kStaticBytes<T> > context.max_shared_bytes) --shape.groups;
  if (shape.groups == 0 || shape.group_threads > kBlockThreads) return 0;
  const int64_t blocks = std::min<int64_t>(shape.row_groups(kernel.rows), context.num_sms);
  const size_t shared = shared_bytes();
  const auto function = norm_rows_backward_kernel<T, P, G, Y, kKind>;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "norm_rows_backward_kernel: shared memory");
  function<<<static_cast<unsigned>(blocks), dim3(shape.group_threads, shape.groups), shared, context.stream>>>(kernel);
  check_launch("norm_rows_backward_kernel");
  return blocks;
}

template <class T, class P, class G, class Y>
void run(Context& context, const NormRowsBackward& args, void* workspace) {
  using A = Accumulator<T>;
  const Kernel<T, P, G, Y> kernel = {args.rows,
                                     args.cols,
                                     static_cast<const G*>(args.d_out),
                                     args.has_norm ? static_cast<const T*>(args.z) : nullptr,
                                     static_cast<const A*>(args.mean),
                                     static_cast<const A*>(args.rstd),
                                     static_cast<const P*>(args.scale),
                                     static_cast<const T*>(args.d_added),
                                     args.dropout.threshold,
                                     static_cast<A>(args.dropout.scale),
                                     args.random_state,
                                     static_cast<T*>(args.d_z),
                                     static_cast<Y*>(args.d_y),
                                     static_cast<A*>(workspace)};
  const bool by_vectors = args.cols % kVectorSize<T> == 0 &&
                          all_aligned({args.d_out, args.z, args.scale, args.d_added, args.d_z, args.d_y});
  const ColumnSum d_scale = {args.d_scale, args.norm_dtype};
  const ColumnSum d_bias = {args.d_bias, args.norm_dtype};
  const ColumnSum d_y_sum = {args.d_y_sum, args.d_y_dtype};

  int64_t blocks = 0;
  if constexpr (!std::is_same_v<T, G>) {  // never another kind
    if (by_vectors) blocks = launch<Kind::kNorm>(context, kernel);
  } else if (by_vectors) {
    constexpr Kind kWithoutSum = std::is_same_v<T, Y> ? Kind::kNorm : Kind::kNormSum;
    blocks = !args.has_norm             ? launch<Kind::kDropout>(context, kernel)
             : !args.mean               ? launch<Kind::kNormDropout>(context, kernel)
             : args.d_y_sum || args.d_y ? launch<Kind::kNormSum>(context, kernel)
                                        : launch<kWithoutSum>(context, kernel);
  }
  if (blocks) {
    add_row_groups(context, accumulator_of(args.dtype), workspace, blocks, args.cols, {d_scale, d_bias, d_y_sum});
    return;
  }

  // First the sums: d_z may be written over what they read.
  if (args.d_scale || args.d_bias) {
    const int64_t row_groups = std::min<int64_t>((args.rows + kSumHeight - 1) / kSumHeight, context.num_sms);
    const dim3 grid(static_cast<unsigned>((args.cols + kSumWidth - 1) / kSumWidth), static_cast<unsigned>(row_groups));
    norm_long_rows_sums_kernel<<<grid, dim3(kSumWidth, kSumHeight), 0, context.stream>>>(kernel);
    check_launch("norm_long_rows_sums_kernel");
    add_row_groups(context, accumulator_of(args.dtype), workspace, row_groups, args.cols, {d_scale, d_bias, {}});
  }
  norm_long_rows_backward_kernel<<<static_cast<unsigned>(args.rows), kLongThreads, 0, context.stream>>>(kernel);
  check_launch("norm_long_rows_backward_kernel");
  if (args.d_y_sum) {
    const void* d_y = args.d_y ? args.d_y : args.d_z ? args.d_z : args.d_out;
    column_sums(context, args.d_y_dtype, d_y, args.rows, args.cols, args.d_y_sum, workspace);
  }
}

}  // namespace

void norm_rows_backward(Context& context, const NormRowsBackward& args, void* workspace) {
  if (args.rows == 0) {
    for (const ColumnSum& sum : {ColumnSum{args.d_scale, args.norm_dtype}, ColumnSum{args.d_bias, args.norm_dtype},
                                 ColumnSum{args.d_y_sum, args.d_y_dtype}}) {
      if (sum.sum) {
        check(cudaMemsetAsync(sum.sum, 0, args.cols * size_of(sum.dtype), context.stream),
              "norm_rows_backward: cudaMemsetAsync");
      }
    }
    return;
  }
  if (args.d_out_dtype != args.dtype) {
    return dispatch_narrow(args.dtype, args.norm_dtype, args.d_out_dtype, [&](auto* type) {
      run<float, float, std::remove_pointer_t<decltype(type)>, float>(context, args, workspace);
    });
  }
  if (args.d_y_dtype != args.dtype) {
    return dispatch_narrow(args.dtype, args.norm_dtype, args.d_y_dtype, [&](auto* type) {
      run<float, float, float, std::remove_pointer_t<decltype(type)>>(context, args, workspace);
    });
  }
  dispatch_norm(args.dtype, args.norm_dtype, [&](auto* type, auto* norm_type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run<T, std::remove_pointer_t<decltype(norm_type)>, T, T>(context, args, workspace);
  });
}

size_t norm_rows_backward_workspace_bytes(const Context& context, DType dtype, int64_t cols) {
  return kMaxColumnSums * max_row_groups(context) * cols * size_of(accumulator_of(dtype));
}

}  // namespace cuda
}  // namespace pfa
