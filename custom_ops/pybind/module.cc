// pfa_core: the core without Paddle, on NumPy arrays and, where it is built with CUDA, on device memory.
#include <pybind11/pybind11.h>

#include "pybind/cpu_block.h"
#ifdef PFA_WITH_CUDA
#include "pybind/cuda_block.h"
#endif

PYBIND11_MODULE(pfa_core, module) {
  module.doc() = "The fused attention block without Paddle.";
  pfa::bind_cpu(module);
#ifdef PFA_WITH_CUDA
  pfa::bind_cuda(module);
#endif
}
