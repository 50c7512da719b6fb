// Device properties, read once per device.
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
      entry.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                                 attribute(cudaDevAttrComputeCapabilityMinor, device);
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

}  // namespace cuda
}  // namespace pfa
