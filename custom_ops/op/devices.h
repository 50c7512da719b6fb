// The devices that the operator runs on: for each, the core's context from Paddle's state, and Paddle's generator of
// random numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "core/cpu/context.h"
#include "core/params.h"
#include "paddle/extension.h"
#ifdef PFA_WITH_CUDA
#include "core/cuda/stages.h"
#endif

namespace pfa::op {

struct CpuDevice {
  cpu::Context context;

  CpuDevice();
  std::pair<uint64_t, uint64_t> draw() const;  // seed and offset
  void clear(void* memory, size_t bytes) const;
};

#ifdef PFA_WITH_CUDA
// Makes a card current while it lives.
class CurrentCard {
 public:
  explicit CurrentCard(int card);
  ~CurrentCard();
  CurrentCard(const CurrentCard&) = delete;
  CurrentCard& operator=(const CurrentCard&) = delete;

 private:
  int card_;
  int previous_;
};

// The context of the current card, with Paddle's switches.
cuda::Context context_of_card(int card, cudaStream_t stream);

// The tensor's card, current while this lives, with work queued on Paddle's stream.
struct CudaDevice {
  cuda::Context context;

  explicit CudaDevice(const paddle::Tensor& tensor);
  std::pair<uint64_t, uint64_t> draw() const;
  void clear(void* memory, size_t bytes) const;

 private:
  CurrentCard current_;
};
#endif

// Whether this build has kernels for the tensor's device.
inline bool has_kernels_for(const paddle::Tensor& tensor) {
#ifdef PFA_WITH_CUDA
  if (tensor.is_gpu()) return true;
#endif
  return tensor.is_cpu();
}

// Calls f with the tensor's device.
template <class F>
auto on_device_of(const paddle::Tensor& tensor, F&& f) {
#ifdef PFA_WITH_CUDA
  if (tensor.is_gpu()) {
    CudaDevice device(tensor);
    return f(device);
  }
#endif
  CpuDevice device;
  return f(device);
}

}  // namespace pfa::op
