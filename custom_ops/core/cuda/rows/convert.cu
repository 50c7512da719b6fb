// A thread converts one vector.
#include "core/cuda/rows/convert.h"

#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class From, class To, int kVec>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const From* __restrict__ from, To* __restrict__ to, int64_t count) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  if (index >= count) return;
  float value[kVec];
  load(from + index, value);
  store(to + index, value);
}

template <class From, class To>
void run(Context& context, const void* from, void* to, int64_t count) {
  constexpr int kVec = 8;
  const bool vectors =
      count % kVec == 0 && (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
  const auto launch = [&](auto* kernel, int numbers) {
    kernel<<<static_cast<unsigned>(ceil_div(count, kThreads * numbers)), kThreads, 0, context.stream>>>(
        static_cast<const From*>(from), static_cast<To*>(to), count);
    check_launch("convert_kernel");
  };
  if (vectors) {
    launch(convert_kernel<From, To, kVec>, kVec);
  } else {
    launch(convert_kernel<From, To, 1>, 1);
  }
}

}  // namespace

void convert(Context& context, DType from_dtype, const void* from, DType to_dtype, void* to, int64_t count) {
  if (count == 0) return;
  const bool narrows = from_dtype == DType::kFloat32;
  if (!narrows && to_dtype != DType::kFloat32) throw std::runtime_error("convert: expected float32 on one side");
  dispatch_16bit(narrows ? to_dtype : from_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (narrows) {
      run<float, T>(context, from, to, count);
    } else {
      run<T, float>(context, from, to, count);
    }
  });
}

}  // namespace cuda
}  // namespace pfa
