#include "op/devices.h"

#include <cstring>

#ifdef PFA_WITH_CUDA
#include <dlfcn.h>

#include "core/cuda/linear/cublaslt.h"
#include "paddle/phi/backends/dynload/dynamic_loader.h"
#endif

#include "core/cpu/parallel.h"
#include "paddle/phi/core/generator.h"

#ifdef PFA_WITH_CUDA
#if __has_include("paddle/common/flags.h")
#include "paddle/common/flags.h"
COMMON_DECLARE_bool(cudnn_deterministic);
#else  // Paddle 2.6
#include "paddle/phi/core/flags.h"
PD_DECLARE_bool(cudnn_deterministic);
#endif
#endif

namespace pfa::op {

CpuDevice::CpuDevice() { context.threads = cpu::max_threads(); }

std::pair<uint64_t, uint64_t> CpuDevice::draw() const { return phi::DefaultCPUGenerator()->IncrementOffset(1); }

void CpuDevice::clear(void* memory, size_t bytes) const { std::memset(memory, 0, bytes); }

#ifdef PFA_WITH_CUDA
namespace {

// Paddle's switch for TF32 in matrix products, of which no header of all supported versions speaks.
bool allows_tf32() {
  static const auto function = reinterpret_cast<bool (*)()>(dlsym(RTLD_DEFAULT, "_ZN3phi15AllowTF32CublasEv"));
  return function ? function() : true;
}

int current_card() {
  int card = 0;
  cuda::check(cudaGetDevice(&card), "cudaGetDevice");
  return card;
}

}  // namespace

CurrentCard::CurrentCard(int card) : card_(card), previous_(current_card()) {
  if (card_ != previous_) cuda::check(cudaSetDevice(card_), "cudaSetDevice");
}

CurrentCard::~CurrentCard() {
  if (card_ != previous_) cudaSetDevice(previous_);
}

cuda::Context context_of_card(int card, cudaStream_t stream) {
  return cuda::make_context(stream, card, allows_tf32(), FLAGS_cudnn_deterministic);
}

CudaDevice::CudaDevice(const paddle::Tensor& tensor) : current_(tensor.place().GetDeviceId()) {
  static const bool has_library = (cuda::cublaslt::set_library(phi::dynload::GetCublasLtDsoHandle()), true);
  static_cast<void>(has_library);
  context = context_of_card(tensor.place().GetDeviceId(), tensor.stream());
}

std::pair<uint64_t, uint64_t> CudaDevice::draw() const {
  return phi::DefaultCUDAGenerator(context.device)->IncrementOffset(1);
}

void CudaDevice::clear(void* memory, size_t bytes) const {
  cuda::check(cudaMemsetAsync(memory, 0, bytes, context.stream), "cudaMemsetAsync");
}
#endif

}  // namespace pfa::op
