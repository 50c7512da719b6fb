// Activation, gate and dropout (activation.h).
//
//   relu       max(x, 0)
//   gelu       x * cdf(x), cdf of the standard normal distribution
//   gelu_tanh  x * (1 + tanh(y)) / 2 = x * sigmoid(2 y) with y = sqrt(2 / pi) * (x + 0.044715 x^3)
//   silu       x * sigmoid(x)
//
// A thread has eight neighbouring numbers, whose random numbers one call of Philox gives; or one, where rows or
// elements do not begin at multiples of eight. Threads go along rows, so that nothing is divided.
#include "core/cuda/rows/activation.h"

#include <algorithm>
#include <type_traits>

#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNumbers = 8;
constexpr int64_t kMaxGridY = 65535;
// Of the backward kernels, so that a multiprocessor holds half of the threads that it can.
template <class T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 1 : 4;

template <class T>
struct Kernel {
  using A = Accumulator<T>;
  int64_t rows;
  int64_t cols;
  bool gated;
  uint32_t threshold;
  A dropout_scale;
  const uint64_t* random_state;
  int64_t first_element;
  int64_t elements_in_row;
  const T* h;
  T* u;
  const T* d_u;
  T* d_h;

  __device__ PhiloxState philox() const {
    return threshold ? philox_state(random_state[0], random_state[1], DropoutStage::kHidden) : PhiloxState{};
  }

  __device__ __forceinline__ int64_t element(int64_t row, int64_t col) const {
    return row * elements_in_row + first_element + col;
  }

  __device__ __forceinline__ PhiloxWords words(PhiloxState state, int64_t element) const {
    return threshold ? output_words(state, element) : PhiloxWords{};
  }

  template <int N>
  __device__ __forceinline__ void drop(const PhiloxWords& words, int64_t element, A (&value)[N]) const {
    if (threshold) {
      apply_output_dropout(words, threshold, dropout_scale, element, value);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] *= dropout_scale;
    }
  }

  // Calls f(row, col) for the vectors of N numbers that are this thread's.
  template <int N, class F>
  __device__ __forceinline__ void for_own(F&& f) const {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x * N;
    for (int64_t col = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N; col < cols; col += step) {
      f(row, col);
    }
  }
};

// Of float, the hardware's approximations: their errors lie in the last digits of what is computed from them.
__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }
__device__ __forceinline__ float error_function(float x) { return erff(x); }
__device__ __forceinline__ double error_function(double x) { return erf(x); }

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
  return quotient(A(1), A(1) + exponential(-x));
}

template <class A>
struct ValueAndSlope {
  A value;
  A slope;
};

// The compiler leaves out what nobody reads.
template <Activation kActivation, class A>
__device__ __forceinline__ ValueAndSlope<A> value_and_slope(A x) {
  if constexpr (kActivation == Activation::kRelu) {
    // As written NaN stays NaN.
    return {x < A(0) ? A(0) : x, x > A(0) ? A(1) : A(0)};
  } else if constexpr (kActivation == Activation::kGelu) {
    const A below = A(0.5) + A(0.5) * error_function(x * A(0.70710678118654752440));
    const A density = exponential(A(-0.5) * x * x) * A(0.39894228040143267794);  // 1 / sqrt(2 pi)
    return {x * below, below + x * density};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const A factor = A(2 * 0.79788456080286535588);  // 2 sqrt(2 / pi)
    const A square = x * x;
    const A s = sigmoid(factor * x * (A(1) + A(0.044715) * square));
    return {x * s, s + x * s * (A(1) - s) * factor * (A(1) + A(3 * 0.044715) * square)};
  } else {
    static_assert(kActivation == Activation::kSilu, "the last one");
    const A s = sigmoid(x);
    return {x * s, s + x * s * (A(1) - s)};
  }
}

template <class T, int N, Activation kActivation>
__global__ void __launch_bounds__(kThreads) activate_kernel(const Kernel<T> k) {
  using A = Accumulator<T>;
  const PhiloxState state = k.philox();
  k.template for_own<N>([&](int64_t row, int64_t col) {
    const T* h = k.h + row * k.cols * (k.gated ? 2 : 1) + col;
    A value[N];
    load(h, value);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = value_and_slope<kActivation>(value[i]).value;
    if (k.gated) {
      A gate[N];
      load(h + k.cols, gate);
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] *= gate[i];
    }
    const int64_t element = k.element(row, col);
    k.drop(k.words(state, element), element, value);
    store(k.u + row * k.cols + col, value);
  });
}

template <class T, int N, Activation kActivation>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>) activate_backward_kernel(const Kernel<T> k) {
  using A = Accumulator<T>;
  const PhiloxState state = k.philox();
  k.template for_own<N>([&](int64_t row, int64_t col) {
    const int64_t place = row * k.cols + col;
    const int64_t place_h = row * k.cols * (k.gated ? 2 : 1) + col;
    A d[N], u[N];
    load(k.d_u + place, d);
    load(k.h + place_h, u);
    A gate[N];
    if (k.gated) load(k.h + place_h + k.cols, gate);
    const int64_t element = k.element(row, col);
    const PhiloxWords words = k.words(state, element);
    k.drop(words, element, d);
    A slope[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const ValueAndSlope<A> a = value_and_slope<kActivation>(u[i]);
      u[i] = a.value;
      slope[i] = a.slope;
    }
    if (k.gated) {
      A d_gate[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        d_gate[i] = d[i] * u[i];
        d[i] *= gate[i];
        u[i] *= gate[i];
      }
      store(k.d_h + place_h + k.cols, d_gate);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] *= slope[i];
    store(k.d_h + place_h, d);
    if (k.u) {
      k.drop(words, element, u);
      store(k.u + place, u);
    }
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) relu_backward_kernel(const Kernel<T> k) {
  using A = Accumulator<T>;
  k.template for_own<N>([&](int64_t row, int64_t col) {
    const int64_t place = row * k.cols + col;
    A d[N], u[N];
    load(k.d_u + place, d);
    load(k.u + place, u);
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = u[i] > A(0) ? d[i] * k.dropout_scale : A(0);
    store(k.d_h + place, d);
  });
}

// Calls f with the activation as a constant.
template <class F>
void dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    default:
      throw std::runtime_error("expected an activation");
  }
}

// Calls f with a null pointer to the device type and, as a constant, how many numbers a thread takes at a time; f
// returns the kernel to launch.
template <class F>
void launch(Context& context, const ActivationRows& args, const char* name, F&& f) {
  if (args.rows == 0 || args.cols == 0) return;
  dispatch_float(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Kernel<T> kernel = {args.rows,
                              args.cols,
                              args.gated,
                              args.dropout.threshold,
                              static_cast<Accumulator<T>>(args.dropout.scale),
                              args.random_state,
                              args.first_element,
                              args.elements_in_row,
                              static_cast<const T*>(args.h),
                              static_cast<T*>(args.u),
                              static_cast<const T*>(args.d_u),
                              static_cast<T*>(args.d_h)};
    const auto start = [&](auto numbers) {
      const auto function = f(type, numbers);
      const int64_t vectors = ceil_div(args.cols, numbers);
      unsigned width = 1;
      while (width < kThreads && width < vectors) width *= 2;
      const unsigned height = kThreads / width;
      const dim3 grid(static_cast<unsigned>(ceil_div(args.rows, height)),
                      static_cast<unsigned>(std::min(ceil_div(vectors, width), kMaxGridY)));
      function<<<grid, dim3(width, height), 0, context.stream>>>(kernel);
      check_launch(name);
    };
    const auto is_vector = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    const bool counts_by_vectors =
        args.dropout.threshold == 0 || (args.first_element % kNumbers == 0 && args.elements_in_row % kNumbers == 0);
    if (args.cols % kNumbers == 0 && counts_by_vectors && is_vector(args.h) && is_vector(args.u) &&
        is_vector(args.d_u) && is_vector(args.d_h)) {
      start(std::integral_constant<int, kNumbers>{});
    } else {
      start(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

void activate(Context& context, const ActivationRows& args) {
  dispatch_activation(args.activation, [&](auto activation) {
    launch(context, args, "activate_kernel", [](auto* type, auto numbers) {
      return activate_kernel<std::remove_pointer_t<decltype(type)>, decltype(numbers)::value,
                             decltype(activation)::value>;
    });
  });
}

void activate_backward(Context& context, const ActivationRows& args) {
  dispatch_activation(args.activation, [&](auto activation) {
    launch(context, args, "activate_backward_kernel", [](auto* type, auto numbers) {
      return activate_backward_kernel<std::remove_pointer_t<decltype(type)>, decltype(numbers)::value,
                                      decltype(activation)::value>;
    });
  });
}

void relu_backward(Context& context, const ActivationRows& args) {
  launch(context, args, "relu_backward_kernel", [](auto* type, auto numbers) {
    return relu_backward_kernel<std::remove_pointer_t<decltype(type)>, decltype(numbers)::value>;
  });
}

}  // namespace cuda
}  // namespace pfa
