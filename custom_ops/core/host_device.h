// What a function is marked with that the CPU's code and the GPU's kernels both call. On the CPU it is inlined by
// force, so that no copy of it for a higher instruction set takes the place of one that others call.
#pragma once

#if defined(__CUDACC__)
#define PFA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PFA_HOST_DEVICE inline __attribute__((always_inline))
#endif
