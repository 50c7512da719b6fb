// Residual sum with dropout, and layer norm, forward (norm_rows.h).
//
// A group of threads holds its row in registers and goes from row to row, the next on its way while it sums up this
// one. Rows that no group can hold, or that cannot be read by vectors, go through a kernel that keeps z, rounded to its
// dtype, where the result will be, unless z is y itself, and reads it again for each step.
#include "core/cuda/rows/norm_rows.h"

#include <type_traits>

#include "core/cuda/rows/norm_rows.cuh"

namespace pfa {
namespace cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kMaxGroupThreads = 512;
constexpr int kLongThreads = 256;
constexpr size_t kMaxParameterBytes = 40 * 1024;  // what a thread block gets without asking for more, but for its slots
// A thread may hold 1 to 4 vectors, twice: of this row and of the next. With so many, two of the largest thread blocks
// share a multiprocessor's registers.
template <class T>
constexpr int kFewItems = sizeof(T) == 4 ? 3 : 2;
// Threads of a multiprocessor, as many as the registers are for.
template <class T, int kRowItems>
constexpr int kThreads = kMaxGroupThreads * (kRowItems <= kFewItems<T> ? 2 : 1);

// T: the type of y, x, z and n; P: of the parameters; O: of the result.
template <class T, class P, class O>
struct Kernel {
  using A = Accumulator<T>;
  int64_t rows;
  int64_t cols;
  const T* y;
  const T* y_bias;
  const T* x;
  uint32_t threshold;
  A dropout_scale;
  const uint64_t* random_state;
  T* z;
  bool rounds_z;
  T* normalized;
  O* out;
  T* kept;  // for rows that no group can hold: where z waits; null: z is y
  const P* scale;
  const P* bias;
  bool shares_parameters;
  A epsilon;
  A* mean;
  A* rstd;

  __device__ PhiloxState philox() const {
    return threshold ? philox_state(random_state[0], random_state[1], DropoutStage::kOutput) : PhiloxState{};
  }

  // What the instantiations for a bias have in addition.
  template <bool kMayHaveBias, int N>
  __device__ __forceinline__ void add_bias(int64_t col, A (&value)[N]) const {
    if (!kMayHaveBias || !y_bias) return;
    A added[N];
    load(y_bias + col, added);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] += added[i];
  }

  // z of N neighbouring columns.
  template <bool kMayHaveBias, int N>
  __device__ __forceinline__ void form_z(PhiloxState state, int64_t index, int64_t col, const Vector<T, N>& y_vector,
                                         const Vector<T, N>& x_vector, A (&value)[N]) const {
    if (threshold) {
      const PhiloxWords words = output_words(state, index);
      widen(y_vector, value);
      add_bias<kMayHaveBias>(col, value);
      apply_output_dropout(words, threshold, dropout_scale, index, value);
    } else {
      widen(y_vector, value);
      add_bias<kMayHaveBias>(col, value);
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] *= dropout_scale;
    }
    if (x) {
      A added[N];
      widen(x_vector, added);
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] += added[i];
    }
  }

  // The parameters that out is made of, of all columns. A thread block copies them once for its many rows to `shared`,
  // where there is room.
  struct Parameters {
    const P* scale;
    const P* bias;
  };
  template <int N>
  __device__ __forceinline__ Parameters parameters(P* shared) const {
    if (!out || !shares_parameters) return {scale, bias};
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int threads = blockDim.x * blockDim.y;
    for (int col = thread * N; col < cols; col += threads * N) {
      A ones[N], zeros[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        ones[i] = 1;
        zeros[i] = 0;
      }
      store_vector(shared + col, scale ? load_vector<N>(scale + col) : narrow_vector<P>(ones));
      store_vector(shared + cols + col, bias ? load_vector<N>(bias + col) : narrow_vector<P>(zeros));
    }
    __syncthreads();
    return {shared, shared + cols};
  }

  // Stores n and out of N neighbouring columns of z.
  template <bool kIsNorm, int N>
  __device__ __forceinline__ void finish(const Parameters& parameters, int64_t row, int64_t col, A row_mean, A row_rstd,
                                         A (&value)[N]) const {
    const int64_t index = row * cols + col;
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = rounded_product(value[i] - row_mean, row_rstd);
    if (!kIsNorm && normalized) store(normalized + index, value);
    A factor[N], offset[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      factor[i] = 1;
      offset[i] = 0;
    }
    if (kIsNorm || parameters.scale) load(parameters.scale + col, factor);
    if (kIsNorm || parameters.bias) load(parameters.bias + col, offset);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = value[i] * factor[i] + offset[i];
    store(out + index, value);
  }
};

// What is apart from the rest, so that the rest, and what is apart, need no registers for it. kNorm: z is y, and the
// parameters are shared. kAlone: y may have a bias, and out be wanted beside z or made of z as it is rounded.
enum class Kind { kNorm, kBlock, kAlone };

template <class T, class P, class O, int kRowItems, Kind kKind>
__global__ void __launch_bounds__(kMaxGroupThreads, kRowItems <= kFewItems<T> ? 2 : 1)
    norm_rows_forward_kernel(const Kernel<T, P, O> k) {
  using A = Accumulator<T>;
  constexpr int kVec = kVectorSize<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ A slots[2][kMaxWarps];
  constexpr bool kIsNorm = kKind == Kind::kNorm, kAlone = kKind == Kind::kAlone;
  const PhiloxState state = kIsNorm ? PhiloxState{} : k.philox();
  P* const shared_parameters = reinterpret_cast<P*>(shared);
  auto parameters = k.template parameters<kVec>(shared_parameters);
  if constexpr (kIsNorm) parameters = {shared_parameters, shared_parameters + k.cols};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;

  Vector<T, kVec> y[kRowItems], x[kRowItems];
  const auto read = [&](int64_t row) {
    const int cols = row < k.rows ? static_cast<int>(k.cols) : 0;
    const int64_t first = row * k.cols;
#pragma unroll
    for (int item = 0; item < kRowItems; ++item) {
      const int col = (item * blockDim.x + threadIdx.x) * kVec;
      if (col < cols) {
        y[item] = load_vector<kVec>(k.y + first + col);
        if (!kIsNorm && k.x) x[item] = load_vector<kVec>(k.x + first + col);
      }
    }
  };
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  read(row);
  // All groups go on as long as one has a row, so as to take part in the barriers.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < k.rows; first += step, row += step) {
    const int cols = row < k.rows ? static_cast<int>(k.cols) : 0;
    A z[kRowItems][kVec];
    A sum[1] = {0};
#pragma unroll
    for (int item = 0; item < kRowItems; ++item) {
      const int col = (item * blockDim.x + threadIdx.x) * kVec;
      if (col < cols) {
        const int64_t index = row * k.cols + col;
        if constexpr (kIsNorm) {
          widen(y[item], z[item]);
        } else {
          k.template form_z<kAlone>(state, index, col, y[item], x[item], z[item]);
        }
        if constexpr (kAlone) {
          const Vector<T, kVec> rounded = narrow_vector<T>(z[item]);
          if (k.z) store_vector(k.z + index, rounded);
          if (k.rounds_z) widen(rounded, z[item]);
        } else if (!kIsNorm && !k.out) {
          store(k.z + index, z[item]);
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[0] += z[item][i];
      }
    }
    read(row + step);
    if (!kIsNorm && !k.out) continue;

    group_sum<true>(sum, slots[0]);
    const A mean = sum[0] / static_cast<A>(k.cols);
    A squares[1] = {0};
#pragma unroll
    for (int item = 0; item < kRowItems; ++item) {
      const int col = (item * blockDim.x + threadIdx.x) * kVec;
      if (col < cols) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) squares[0] += (z[item][i] - mean) * (z[item][i] - mean);
      }
    }
    group_sum<true>(squares, slots[1]);
    const A rstd = reciprocal_root(squares[0] / static_cast<A>(k.cols) + k.epsilon);

    if (threadIdx.x == 0 && row < k.rows) {
      if (k.mean) k.mean[row] = mean;
      if (k.rstd) k.rstd[row] = rstd;
    }
#pragma unroll
    for (int item = 0; item < kRowItems; ++item) {
      const int col = (item * blockDim.x + threadIdx.x) * kVec;
      if (col < cols) k.template finish<kIsNorm>(parameters, row, col, mean, rstd, z[item]);
    }
  }
}

// Any number of columns. What a thread reads again it has written itself, or nobody writes before.
template <class T, class P, class O>
__global__ void __launch_bounds__(kLongThreads) norm_long_rows_forward_kernel(const Kernel<T, P, O> k) {
  using A = Accumulator<T>;
  __shared__ A slots[2][kMaxWarps];
  const int64_t row = blockIdx.x;
  const PhiloxState state = k.philox();
  const T* z_row = (k.kept ? k.kept : k.y) + row * k.cols;

  A sum[1] = {0};
  for (int64_t col = threadIdx.x; col < k.cols; col += blockDim.x) {
    const int64_t index = row * k.cols + col;
    Vector<T, 1> x = {};
    if (k.x) x = load_vector<1>(k.x + index);
    A z[1];
    k.template form_z<true>(state, index, col, load_vector<1>(k.y + index), x, z);
    const T rounded = narrow<T>(z[0]);
    if (k.kept) k.kept[index] = rounded;
    sum[0] += widen(rounded);
  }
  if (!k.out) return;

  group_sum<true>(sum, slots[0]);
  const A mean = sum[0] / static_cast<A>(k.cols);
  A squares[1] = {0};
  for (int64_t col = threadIdx.x; col < k.cols; col += blockDim.x) {
    const A centred = widen(z_row[col]) - mean;
    squares[0] += centred * centred;
  }
  group_sum<true>(squares, slots[1]);
  const A rstd = reciprocal_root(squares[0] / static_cast<A>(k.cols) + k.epsilon);

  if (threadIdx.x == 0) {
    if (k.mean) k.mean[row] = mean;
    if (k.rstd) k.rstd[row] = rstd;
  }
  for (int64_t col = threadIdx.x; col < k.cols; col += blockDim.x) {
    A value[1] = {widen(z_row[col])};
    k.template finish<false>({k.scale, k.bias}, row, col, mean, rstd, value);
  }
}

// So that the fewest threads have nothing to do, and of equals those with 16 numbers; 0 where no group can hold a row.
template <class T>
int items_per_thread(int64_t vectors) {
  if (vectors <= 32) return 1;
  int best = 0;
  int64_t least = 0;
  for (int items : {sizeof(T) == 2 ? 2 : 4, 4, 3, 2}) {
    const int threads = row_shape(vectors, items, kBlockThreads).group_threads;
    if (threads > kMaxGroupThreads || (best && items * threads >= least)) continue;
    best = items;
    least = items * threads;
  }
  return best;
}

template <class T, class P, class O>
void run(Context& context, const NormRowsForward& args) {
  using A = Accumulator<T>;
  const bool is_y =
      args.out && !args.z && !args.y_bias && !args.x && args.dropout.threshold == 0 && args.dropout.scale == 1.0;
  if (!std::is_same<T, O>::value && !is_y)
    throw std::runtime_error("norm_rows_forward: z waits where only out may lie");
  void* kept = is_y ? nullptr : args.z ? args.z : args.normalized ? args.normalized : args.out;
  const size_t parameter_bytes = args.out ? 2 * args.cols * sizeof(P) : 0;
  const bool shares_parameters = parameter_bytes <= kMaxParameterBytes;
  const Kernel<T, P, O> kernel = {args.rows,
                                  args.cols,
                                  static_cast<const T*>(args.y),
                                  static_cast<const T*>(args.y_bias),
                                  static_cast<const T*>(args.x),
                                  args.dropout.threshold,
                                  static_cast<A>(args.dropout.scale),
                                  args.random_state,
                                  static_cast<T*>(args.z),
                                  args.rounds_z,
                                  static_cast<T*>(args.normalized),
                                  static_cast<O*>(args.out),
                                  static_cast<T*>(kept),
                                  static_cast<const P*>(args.scale),
                                  static_cast<const P*>(args.bias),
                                  shares_parameters,
                                  static_cast<A>(args.epsilon),
                                  static_cast<A*>(args.mean),
                                  static_cast<A*>(args.rstd)};
  constexpr int kVec = kVectorSize<T>;
  const int64_t vectors = args.cols / kVec;
  const bool by_vectors = args.cols % kVec == 0 && all_aligned({args.y, args.y_bias, args.x, args.z, args.normalized,
                                                                args.out, args.scale, args.bias});
  const auto launch = [&](auto items, auto kind) {
    const RowShape shape = row_shape(vectors, items, kBlockThreads);
    const int64_t resident =
        kThreads<T, decltype(items)::value> / (shape.group_threads * shape.groups) * context.num_sms;
    const int64_t blocks = std::min(shape.row_groups(args.rows), resident);
    norm_rows_forward_kernel<T, P, O, decltype(items)::value, decltype(kind)::value>
        <<<static_cast<unsigned>(blocks), dim3(shape.group_threads, shape.groups),
           shares_parameters ? parameter_bytes : 0, context.stream>>>(kernel);
    check_launch("norm_rows_forward_kernel");
  };
  const auto launch_items = [&](auto items) {
    if (is_y && shares_parameters && !args.normalized) {
      return launch(items, std::integral_constant<Kind, Kind::kNorm>{});
    }
    if constexpr (std::is_same_v<T, O>) {
      if (args.y_bias || args.rounds_z) return launch(items, std::integral_constant<Kind, Kind::kAlone>{});
    }
    launch(items, std::integral_constant<Kind, Kind::kBlock>{});
  };
  switch (by_vectors ? items_per_thread<T>(vectors) : 0) {
    case 1:
      return launch_items(std::integral_constant<int, 1>{});
    case 2:
      return launch_items(std::integral_constant<int, 2>{});
    case 3:
      return launch_items(std::integral_constant<int, 3>{});
    case 4:
      return launch_items(std::integral_constant<int, 4>{});
    default:
      norm_long_rows_forward_kernel<T, P, O>
          <<<static_cast<unsigned>(args.rows), kLongThreads, 0, context.stream>>>(kernel);
      check_launch("norm_long_rows_forward_kernel");
  }
}

}  // namespace

void norm_rows_forward(Context& context, const NormRowsForward& args) {
  if (args.rows == 0 || args.cols == 0) return;
  if (args.out_dtype != args.dtype) {
    return dispatch_narrow(args.dtype, args.norm_dtype, args.out_dtype, [&](auto* out_type) {
      run<float, float, std::remove_pointer_t<decltype(out_type)>>(context, args);
    });
  }
  dispatch_norm(args.dtype, args.norm_dtype, [&](auto* type, auto* norm_type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run<T, std::remove_pointer_t<decltype(norm_type)>, T>(context, args);
  });
}

}  // namespace cuda
}  // namespace pfa
