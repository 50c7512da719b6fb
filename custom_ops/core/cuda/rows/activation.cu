// Activation, gate and dropout (activation.h).
//
//   relu       max(x, 0)
//   gelu       x * cdf(x), cdf of the standard normal distribution
//   gelu_tanh  x * (1 + tanh(y)) / 2 = x * sigmoid(2 y) with y = sqrt(2 / pi) * (x + 0.044715 x^3)
//   silu       x * sigmoid(x)
//
// All but relu are x * cdf(x) with cdf(-x) = 1 - cdf(x), and are formed of cdf(-|x|), which is small far from 0 on
// either side and keeps its digits there:
//
//   value  max(x, 0) - |x| * cdf(-|x|)
//   slope  s for x < 0, else 1 - s, with s = cdf(-|x|) - |x| * cdf'(x)
//
// A thread has eight neighbouring columns, whose random numbers one call of Philox gives; or one, where rows or
// elements do not begin at multiples of eight. It walks up the rows, as the last of them may still lie in the cache
// from the product that wrote them, and the next product begins with the first. On its way it sums up the gradients of
// its columns; its thread block adds these and writes one row of sums (column_sums.h).
#include "core/cuda/rows/activation.h"

#include <algorithm>
#include <type_traits>

#include "core/cuda/numbers.cuh"
#include "core/cuda/rows/column_sums.h"

namespace pfa {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNumbers = 8;
// Thread blocks of a multiprocessor: as many are launched as run at a time, so that all walk equally far. Those of
// compute capability 7.5 hold no more than four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int kMostBlocks = 4;
#else
constexpr int kMostBlocks = 6;
#endif
template <class T>
constexpr int kForwardBlocks = sizeof(T) == 8 ? 2 : kMostBlocks;
template <class T, bool kGated>
constexpr int kBackwardBlocks = sizeof(T) == 8 ? 1 : (sizeof(T) == 4 ? 2 : 3) + (kGated ? 0 : 1);
template <class T>
constexpr int kReluBackwardBlocks = sizeof(T) == 2 ? kMostBlocks : 4;
// Numbers between the rows of the exchange of sums, so that reading neighbouring columns meets different banks.
constexpr int kPadding = 4;

// Of a thread's numbers of a row: where they begin in u and d_u, and in h and d_h, and as which element dropout counts
// the first.
struct Place {
  int64_t row;
  int64_t u;
  int64_t h;
  int64_t element;
};

template <class T>
struct Kernel {
  using A = Accumulator<T>;
  int64_t rows;
  int64_t cols;
  uint32_t threshold;
  A dropout_scale;
  const uint64_t* random_state;
  int64_t first_element;
  int64_t elements_in_row;
  const T* h;
  T* u;
  const T* d_u;
  T* d_h;
  int64_t all_cols;  // of h, gated of each of its halves
  A* partial;        // [halves of h][row groups][cols]: sums of d_h; null: not wanted
  // From a row of a thread to its next one, further up: in rows, in numbers of u and of h, and in what dropout counts.
  int64_t row_step;
  int64_t u_step;
  int64_t h_step;
  int64_t element_step;

  // kDrops: threshold is not 0.
  template <bool kDrops>
  __device__ PhiloxState philox() const {
    return kDrops ? philox_state(random_state[0], random_state[1], DropoutStage::kHidden) : PhiloxState{};
  }

  template <bool kDrops>
  __device__ __forceinline__ PhiloxWords words(PhiloxState state, int64_t element) const {
    return kDrops ? output_words(state, element) : PhiloxWords{};
  }

  template <bool kDrops, int N>
  __device__ __forceinline__ void drop(const PhiloxWords& words, int64_t element, A (&value)[N]) const {
    if constexpr (kDrops) {
      apply_output_dropout(words, threshold, dropout_scale, element, value);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] *= dropout_scale;
    }
  }

  // What dropout leaves of a value, element `number` of the eight of a call.
  template <bool kDrops>
  __device__ __forceinline__ A dropped(const PhiloxWords& words, int number, A value) const {
    return !kDrops || is_kept(words, threshold, number) ? value * dropout_scale : A(0);
  }

  // The first of this thread's N columns.
  template <int N>
  __device__ __forceinline__ int64_t col() const {
    return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  }

  // The rows that are this thread's, from the last to the first; behind that `row` is below 0.
  template <bool kGated>
  __device__ __forceinline__ Place first_place(int64_t col) const {
    if (col >= cols) return {-1, 0, 0, 0};
    const int64_t row = rows - 1 - static_cast<int64_t>(blockIdx.y) * blockDim.y - threadIdx.y;
    return {row, row * cols + col, row * (kGated ? 2 : 1) * all_cols + col,
            row * elements_in_row + first_element + col};
  }
  __device__ __forceinline__ Place next_place(const Place& place) const {
    return {place.row - row_step, place.u - u_step, place.h - h_step, place.element - element_step};
  }

  // Adds the thread block's sums of N * blockDim.x columns of a half of h and writes them.
  template <int N>
  __device__ __forceinline__ void write_sums(const A (&sum)[N], int half) const {
    __shared__ A exchange[N][kThreads + kPadding];
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) exchange[i][thread] = sum[i];
    __syncthreads();
    const int64_t first_col = static_cast<int64_t>(blockIdx.x) * blockDim.x * N;
    for (int j = thread; j < static_cast<int>(blockDim.x) * N && first_col + j < cols; j += kThreads) {
      A total = 0;
      for (int i = j / N; i < kThreads; i += blockDim.x) total += exchange[j % N][i];
      partial[(static_cast<int64_t>(half) * gridDim.y + blockIdx.y) * cols + first_col + j] = total;
    }
  }
};

// Of float, the hardware's approximations, whose errors lie in the last digits; what is subnormal counts as 0.
__device__ __forceinline__ float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// The smaller and the larger of two, where NaN stays NaN; the second is none.
__device__ __forceinline__ float lesser(float x, float limit) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(limit));
  return result;
#else
  return x > limit ? limit : x;
#endif
}
__device__ __forceinline__ double lesser(double x, double limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float greater(float x, float limit) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(limit));
  return result;
#else
  return x < limit ? limit : x;
#endif
}
__device__ __forceinline__ double greater(double x, double limit) { return x < limit ? limit : x; }

// The sum of c[i] * x^i.
template <class A>
__device__ __forceinline__ A polynomial(A, A c) {
  return c;
}
template <class A, class... Rest>
__device__ __forceinline__ A polynomial(A x, A c, Rest... rest) {
  return polynomial(x, rest...) * x + c;
}

// cdf(-y) for 0 <= y, and y * cdf'(y). y is at most kLimit, where cdf(-y) is 0.
template <class A>
struct Tail {
  A beyond;
  A moment;
};

template <Activation kActivation, class T>
struct TailOf;

// The normal distribution's tail is exp(-y^2 / 2) times Mills' ratio, of which a quotient of polynomials lies, up to
// kLimit, nowhere farther than 2.4e-5 of the value in 16-bit types and 6e-9 in float (minimax).
template <class T>
struct TailOf<Activation::kGelu, T> {
  using A = Accumulator<T>;
  static constexpr A kLimit = sizeof(A) == 8 ? 40 : 13.5;

  __device__ __forceinline__ static Tail<A> of(A y) {
    const A bell = exp2_of(y * y * A(-0.72134752044448170368));  // -log2(e) / 2
    const A moment = y * bell * A(0.39894228040143267794);       // 1 / sqrt(2 pi)
    if constexpr (sizeof(T) == 8) {
      return {A(0.5) * erfc(y * A(0.70710678118654752440)), moment};
    } else if constexpr (sizeof(T) == 4) {
      const A above = polynomial(y, 0.500000002562913f, 0.4361456686198023f, 0.18164540936086707f, 0.04009792026198537f,
                                 0.004036978259570424f);
      const A below = polynomial(y, 1.0f, 1.6701762666683506f, 1.1958944296983829f, 0.46527411432514804f,
                                 0.10051779066948238f, 0.010119065003975913f);
      return {bell * above * reciprocal(below), moment};
    } else {
      const A above = polynomial(y, 0.5000116384352454f, 0.2774486785350251f, 0.06217795769737276f);
      const A below = polynomial(y, 1.0f, 1.3535078929220687f, 0.7006784190379315f, 0.15567249261627553f);
      return {bell * above * reciprocal(below), moment};
    }
  }
};

template <class T>
struct TailOf<Activation::kGeluTanh, T> {
  using A = Accumulator<T>;
  static constexpr A kLimit = 32;

  __device__ __forceinline__ static Tail<A> of(A y) {
    const A square = y * y;
    const A factor = A(2 * 0.79788456080286535588);  // 2 sqrt(2 / pi)
    const A log2_e = A(1.4426950408889634074);
    const A e = exp2_of(y * polynomial(square, -factor * log2_e, -factor * log2_e * A(0.044715)));
    const A beyond = e * reciprocal(A(1) + e);
    return {beyond, y * (beyond - beyond * beyond) * polynomial(square, factor, factor * A(3 * 0.044715))};
  }
};

template <class T>
struct TailOf<Activation::kSilu, T> {
  using A = Accumulator<T>;
  static constexpr A kLimit = sizeof(A) == 8 ? 800 : 100;

  __device__ __forceinline__ static Tail<A> of(A y) {
    const A e = exp2_of(y * A(-1.4426950408889634074));  // -log2(e)
    const A beyond = e * reciprocal(A(1) + e);
    return {beyond, y * (beyond - beyond * beyond)};
  }
};

template <class A>
struct ValueAndSlope {
  A value;
  A slope;
};

// The compiler leaves out what nobody reads.
template <Activation kActivation, class T>
__device__ __forceinline__ ValueAndSlope<Accumulator<T>> value_and_slope(Accumulator<T> x) {
  using A = Accumulator<T>;
  if constexpr (kActivation == Activation::kRelu) {
    return {greater(x, A(0)), x > A(0) ? A(1) : A(0)};
  } else {
    const A y = lesser(fabs(x), TailOf<kActivation, T>::kLimit);
    const Tail<A> tail = TailOf<kActivation, T>::of(y);
    const A slope = tail.beyond - tail.moment;
    return {fmax(x, A(0)) - y * tail.beyond, x < A(0) ? slope : A(1) - slope};
  }
}

template <class T, int N, Activation kActivation, bool kGated, bool kDrops>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T>) activate_kernel(const Kernel<T> k) {
  using A = Accumulator<T>;
  const PhiloxState state = k.template philox<kDrops>();
  for (Place place = k.template first_place<kGated>(k.template col<N>()); place.row >= 0; place = k.next_place(place)) {
    A value[N];
    load(k.h + place.h, value);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = value_and_slope<kActivation, T>(value[i]).value;
    if constexpr (kGated) {
      A gate[N];
      load(k.h + place.h + k.all_cols, gate);
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] *= gate[i];
    }
    k.template drop<kDrops>(k.template words<kDrops>(state, place.element), place.element, value);
    store(k.u + place.u, value);
  }
}

// What a thread reads next is on its way while it works on what it has.
template <class T, int N, Activation kActivation, bool kGated, bool kDrops>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, kGated>) activate_backward_kernel(const Kernel<T> k) {
  using A = Accumulator<T>;
  const PhiloxState state = k.template philox<kDrops>();
  Place place = k.template first_place<kGated>(k.template col<N>());
  Vector<T, N> d_u, h, h_gate;
  const auto read = [&] {
    if (place.row < 0) return;
    d_u = load_vector<N>(k.d_u + place.u);
    h = load_vector<N>(k.h + place.h);
    if constexpr (kGated) h_gate = load_vector<N>(k.h + place.h + k.all_cols);
  };
  read();
  A sums[kGated ? 2 : 1][N] = {};
  while (place.row >= 0) {
    A d[N], value[N], gate[N];
    widen(d_u, d);
    widen(h, value);
    if constexpr (kGated) widen(h_gate, gate);
    T* const d_h = k.d_h + place.h;
    T* const u = k.u + place.u;
    const PhiloxWords words = k.template words<kDrops>(state, place.element);
    const int number = N == kNumbers ? 0 : static_cast<int>(place.element % kNumbers);
    place = k.next_place(place);
    read();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const ValueAndSlope<A> a = value_and_slope<kActivation, T>(value[i]);
      value[i] = a.value;
      if constexpr (kGated) {
        d[i] = k.template dropped<kDrops>(words, number + i, d[i]);
        value[i] *= gate[i];
        const A d_gated = d[i] * gate[i];
        gate[i] = d[i] * a.value;
        sums[1][i] += gate[i];
        d[i] = a.slope * d_gated;
      } else {
        d[i] = k.template dropped<kDrops>(words, number + i, a.slope * d[i]);
      }
      sums[0][i] += d[i];
      value[i] = k.template dropped<kDrops>(words, number + i, value[i]);
    }
    store(d_h, d);
    if constexpr (kGated) store(d_h + k.all_cols, gate);
    if (k.u) store(u, value);
  }
  if (k.partial) {
    k.write_sums(sums[0], 0);
    if constexpr (kGated) k.write_sums(sums[1], 1);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, kReluBackwardBlocks<T>) relu_backward_kernel(const Kernel<T> k) {
  using A = Accumulator<T>;
  A sums[N] = {};
  for (Place place = k.template first_place<false>(k.template col<N>()); place.row >= 0; place = k.next_place(place)) {
    A d[N], u[N];
    load(k.d_u + place.u, d);
    load(k.u + place.u, u);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      d[i] = u[i] > A(0) ? d[i] * k.dropout_scale : A(0);
      sums[i] += d[i];
    }
    store(k.d_h + place.h, d);
  }
  if (k.partial) k.write_sums(sums, 0);
}

template <class F>
void dispatch_bool(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

// Calls f with, as constants, the activation, whether there is a gate, and whether something is dropped.
template <class F>
void dispatch(const ActivationRows& args, F&& f) {
  const auto with = [&](auto activation) {
    dispatch_bool(args.gated, [&](auto gated) {
      dispatch_bool(args.dropout.threshold != 0, [&](auto drops) { f(activation, gated, drops); });
    });
  };
  switch (args.activation) {
    case Activation::kRelu:
      return with(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return with(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return with(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return with(std::integral_constant<Activation, Activation::kSilu>{});
    default:
      throw std::runtime_error("expected an activation");
  }
}

// How the threads lie over the matrix. A thread block takes as many rows at a time as `width` leaves it.
struct Shape {
  unsigned width;
  int64_t col_blocks;
  int64_t row_groups;
};

// width: the most of which no more than an eighth are idle, but at least a warp where a row has as many vectors.
Shape shape_of(int64_t rows, int64_t cols, int numbers, int64_t blocks) {
  const int64_t vectors = ceil_div(cols, numbers);
  unsigned width = kThreads;
  const auto is_wide = [&] {
    return width > 32 ? ceil_div(vectors, width) * width * 7 > vectors * 8 : width > vectors;
  };
  while (width > 1 && is_wide()) width /= 2;
  const int64_t col_blocks = ceil_div(vectors, width);
  const int64_t turns_of_one = ceil_div(rows, kThreads / width);
  const int64_t turns = ceil_div(turns_of_one, std::max<int64_t>(1, blocks / col_blocks));
  return {width, col_blocks, ceil_div(turns_of_one, turns)};
}

int64_t halves_of_h(const ActivationRows& args) { return args.gated ? 2 : 1; }

int64_t all_cols(const ActivationRows& args) { return args.all_cols ? args.all_cols : args.cols; }

// Where the sums of the first columns of a half of d_h lie.
void* sums_of_half(const ActivationRows& args, int half) {
  return static_cast<char*>(args.d_h_sums) + half * all_cols(args) * size_of(args.dtype);
}

// A kernel, and how many of its thread blocks a multiprocessor runs.
template <class T>
struct Launch {
  void (*function)(Kernel<T>);
  int64_t blocks;
};

// Calls f with a null pointer to the device type and, as a constant, how many numbers a thread takes at a time; f
// returns the Launch.
template <class F>
void launch(Context& context, const ActivationRows& args, const char* name, F&& f) {
  if (args.cols == 0) return;
  if (args.rows == 0) {
    for (int half = 0; args.d_h_sums && half < halves_of_h(args); ++half) {
      check(cudaMemsetAsync(sums_of_half(args, half), 0, args.cols * size_of(args.dtype), context.stream), name);
    }
    return;
  }
  dispatch_float(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    Kernel<T> kernel = {args.rows,
                        args.cols,
                        args.dropout.threshold,
                        static_cast<A>(args.dropout.scale),
                        args.random_state,
                        args.first_element,
                        args.elements_in_row,
                        static_cast<const T*>(args.h),
                        static_cast<T*>(args.u),
                        static_cast<const T*>(args.d_u),
                        static_cast<T*>(args.d_h),
                        all_cols(args),
                        static_cast<A*>(args.d_h_sums ? args.workspace : nullptr)};
    const auto start = [&](auto numbers) {
      const auto [function, blocks] = f(type, numbers);
      const Shape shape = shape_of(args.rows, args.cols, numbers, blocks * context.num_sms);
      const dim3 grid(static_cast<unsigned>(shape.col_blocks), static_cast<unsigned>(shape.row_groups));
      const dim3 block(shape.width, kThreads / shape.width);
      kernel.row_step = shape.row_groups * block.y;
      kernel.u_step = kernel.row_step * args.cols;
      kernel.h_step = kernel.row_step * halves_of_h(args) * kernel.all_cols;
      kernel.element_step = kernel.row_step * args.elements_in_row;
      function<<<grid, block, 0, context.stream>>>(kernel);
      check_launch(name);
      if (args.d_h_sums) {
        void* const gate_sums = args.gated ? sums_of_half(args, 1) : nullptr;
        add_row_groups(context, accumulator_of(args.dtype), args.workspace, shape.row_groups, args.cols,
                       {{args.d_h_sums, args.dtype}, {gate_sums, args.dtype}, {}});
      }
    };
    const auto is_vector = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    const bool counts_by_vectors =
        args.dropout.threshold == 0 || (args.first_element % kNumbers == 0 && args.elements_in_row % kNumbers == 0);
    if (args.cols % kNumbers == 0 && all_cols(args) % kNumbers == 0 && counts_by_vectors && is_vector(args.h) &&
        is_vector(args.u) && is_vector(args.d_u) && is_vector(args.d_h)) {
      start(std::integral_constant<int, kNumbers>{});
    } else {
      start(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

void activate(Context& context, const ActivationRows& args) {
  launch(context, args, "activate_kernel", [&](auto* type, auto numbers) {
    using T = std::remove_pointer_t<decltype(type)>;
    Launch<T> result = {};
    dispatch(args, [&](auto activation, auto gated, auto drops) {
      result.function = activate_kernel<T, decltype(numbers)::value, decltype(activation)::value,
                                        decltype(gated)::value, decltype(drops)::value>;
      result.blocks = kForwardBlocks<T>;
    });
    return result;
  });
}

void activate_backward(Context& context, const ActivationRows& args) {
  launch(context, args, "activate_backward_kernel", [&](auto* type, auto numbers) {
    using T = std::remove_pointer_t<decltype(type)>;
    Launch<T> result = {};
    dispatch(args, [&](auto activation, auto gated, auto drops) {
      result.function = activate_backward_kernel<T, decltype(numbers)::value, decltype(activation)::value,
                                                 decltype(gated)::value, decltype(drops)::value>;
      result.blocks = kBackwardBlocks<T, decltype(gated)::value>;
    });
    return result;
  });
}

void relu_backward(Context& context, const ActivationRows& args) {
  launch(context, args, "relu_backward_kernel", [](auto* type, auto numbers) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launch<T>{relu_backward_kernel<T, decltype(numbers)::value>, kReluBackwardBlocks<T>};
  });
}

size_t activation_sums_workspace_bytes(const Context& context, const ActivationRows& args) {
  if (args.rows == 0 || args.cols == 0) return 0;
  int64_t row_groups = 0;
  dispatch_float(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (const int numbers : {kNumbers, 1}) {
      for (const int64_t blocks : {kBackwardBlocks<T, false>, kBackwardBlocks<T, true>, kReluBackwardBlocks<T>}) {
        row_groups = std::max(row_groups, shape_of(args.rows, args.cols, numbers, blocks * context.num_sms).row_groups);
      }
    }
  });
  return halves_of_h(args) * row_groups * args.cols * size_of(accumulator_of(args.dtype));
}

}  // namespace cuda
}  // namespace pfa
