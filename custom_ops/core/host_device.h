// What a function is marked with that the CPU's code and the GPU's kernels both call.
#pragma once

#if defined(__CUDACC__)
#define PFA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PFA_HOST_DEVICE inline
#endif
