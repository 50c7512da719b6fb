// Device properties, read once per device, and the kernel that puts a seed into device memory.
#include "core/cuda/context.h"

#include <mutex>
#include <vector>

namespace pfa {
namespace cuda {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

__global__ void set_random_state_kernel(uint64_t* random_state, uint64_t seed, uint64_t offset) {
  random_state[0] = seed;
  random_state[1] = offset;
}

}  // namespace

Context make_context(cudaStream_t stream, int device, bool allow_tf32, bool deterministic) {
  static std::mutex mutex;
  static std::vector<Context> known;

  Context context;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (static_cast<size_t>(device) >= known.size()) known.resize(device + 1);
    Context& entry = known[device];
    if (entry.num_sms == 0) {
      entry.device = device;
      entry.compute_capability =
          10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
      entry.max_shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      entry.num_sms = attribute(cudaDevAttrMultiProcessorCount, device);
    }
    context = entry;
  }
  if (context.compute_capability < 70) {
    throw std::runtime_error("the attention block needs a GPU of compute capability 7.0 or later, got " +
                             std::to_string(context.compute_capability / 10) + "." +
                             std::to_string(context.compute_capability % 10));
  }
  context.stream = stream;
  context.allow_tf32 = allow_tf32;
  context.deterministic = deterministic;
  return context;
}

void set_random_state(Context& context, uint64_t* random_state, uint64_t seed, uint64_t offset) {
  set_random_state_kernel<<<1, 1, 0, context.stream>>>(random_state, seed, offset);
  check_launch("set_random_state_kernel");
}

}  // namespace cuda
}  // namespace pfa
