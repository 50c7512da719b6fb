// Host side that the attention kernels share: launching, and the choice of a kernel by head dim.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>

#include "core/cuda/context.h"

namespace pfa {
namespace cuda {

template <class... Args>
void launch(const Context& context, const char* name, void (*kernel)(Args...), int64_t blocks, int threads,
            size_t shared_bytes, const typename std::common_type<Args>::type&... args) {
  if (blocks == 0) return;
  if (blocks > INT_MAX) throw std::runtime_error(std::string(name) + ": too many blocks: " + std::to_string(blocks));
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, context.stream>>>(args...);
  check_launch(name);
}

#if CUDART_VERSION >= 12010
// Clusters of kBlocks thread blocks.
template <int kBlocks, class... Args>
void launch_clusters(const Context& context, const char* name, void (*kernel)(Args...), int64_t clusters, int threads,
                     const typename std::common_type<Args>::type&... args) {
  if (clusters * kBlocks > INT_MAX) {
    throw std::runtime_error(std::string(name) + ": too many clusters: " + std::to_string(clusters));
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kBlocks));
  config.blockDim = dim3(threads);
  config.stream = context.stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}
#endif

// The attributes of a kernel as it was built for the context's device. They are asked for once.
inline cudaFuncAttributes kernel_attributes(const Context& context, const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, cudaFuncAttributes> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(context.device, kernel);
  auto found = known.find(key);
  if (found == known.end()) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    found = known.emplace(key, attributes).first;
  }
  return found->second;
}

// Calls f with the smallest of the head dims in `kHeadDims` that is at least head_dim, as a std::integral_constant.
template <int kFirst, int... kOthers, class F>
void with_head_dim(int64_t head_dim, F&& f) {
  if constexpr (sizeof...(kOthers) > 0) {
    if (head_dim > kFirst) return with_head_dim<kOthers...>(head_dim, static_cast<F&&>(f));
  }
  if (head_dim > kFirst)
    throw std::runtime_error("attention: head_dim up to " + std::to_string(kMaxHeadDimOnGpu) + " is expected, got " +
                             std::to_string(head_dim));
  f(std::integral_constant<int, kFirst>{});
}

template <class F>
void with_bool(bool value, F&& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace cuda
}  // namespace pfa
