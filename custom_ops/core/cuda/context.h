// What every CUDA stage needs to know of where it runs, and the checks around launches.
//
// A stage only queues work on `stream`: it never synchronises and never allocates device memory, so that the block can
// be captured into a CUDA graph. The binding makes `device` current before it calls a stage.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/params.h"

namespace pfa {
namespace cuda {

struct Context {
  cudaStream_t stream = nullptr;
  int device = 0;
  int compute_capability = 0;  // 10 * major + minor: 90 on an H100
  int num_sms = 0;
  size_t max_shared_bytes = 0;  // of one block, after raising the kernel's dynamic limit
  bool allow_tf32 = false;      // float32 matrix products may round their inputs to TF32
  bool deterministic = false;   // same input, same bits: no atomic sums
};

// The context of a device, whose properties are read once per process. Throws std::runtime_error for a device below
// compute capability 7.0.
Context make_context(cudaStream_t stream, int device, bool allow_tf32, bool deterministic);

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// To be called after each launch; names the kernel in the error.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace pfa
