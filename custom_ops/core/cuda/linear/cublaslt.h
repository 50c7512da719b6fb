// The part of cuBLASLt that the linear stages use, opened at run time: a build needs neither its headers nor its
// library, and uses whichever of versions 11 to 13 the process has loaded. Types and values are those of cublasLt.h,
// whose binary interface is the same in these versions.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace pfa {
namespace cuda {
namespace cublaslt {

using Status = int;  // 0: success
using Handle = void*;
using MatmulDesc = void*;
using MatrixLayout = void*;
using Preference = void*;

enum ComputeType : int { kCompute32F = 68, kCompute64F = 70, kCompute32FFastTF32 = 77 };

enum DescAttribute : int { kDescTransA = 3, kDescTransB = 4, kDescEpilogue = 7, kDescBiasPointer = 8 };

enum PreferenceAttribute : int {
  kPreferenceMaxWorkspaceBytes = 1,
  kPreferenceReductionSchemes = 3,
  kPreferenceMinAlignmentA = 5,
  kPreferenceMinAlignmentB = 6,
  kPreferenceMinAlignmentC = 7,
  kPreferenceMinAlignmentD = 8,
};

enum AlgorithmAttribute : int { kAlgorithmTile = 1, kAlgorithmParts = 2 };  // parts that a sum is cut into

enum Tile : int { kTile128x128 = 20, kTile128x160 = 29, kTile176x128 = 201 };

enum ReductionScheme : uint32_t { kReduceInComputeType = 2 };

enum Operation : int32_t { kNormal = 0, kTransposed = 1 };

enum Epilogue : uint32_t { kEpilogueRelu = 2, kEpilogueBias = 4, kEpilogueReluBias = 6 };

struct Algorithm {
  uint64_t data[8];
};

struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status status;
  float waves;
  int reserved[4];
};

struct Api {
  Status (*create)(Handle*);
  Status (*desc_create)(MatmulDesc*, ComputeType, cudaDataType_t);
  Status (*desc_destroy)(MatmulDesc);
  Status (*desc_set)(MatmulDesc, DescAttribute, const void*, size_t);
  Status (*layout_create)(MatrixLayout*, cudaDataType_t, uint64_t rows, uint64_t cols, int64_t leading_dimension);
  Status (*layout_destroy)(MatrixLayout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, PreferenceAttribute, const void*, size_t);
  Status (*heuristic)(Handle, MatmulDesc, MatrixLayout a, MatrixLayout b, MatrixLayout c, MatrixLayout d, Preference,
                      int requested, HeuristicResult*, int* returned);
  Status (*algorithm_get)(const Algorithm*, AlgorithmAttribute, void*, size_t, size_t* written);
  Status (*matmul)(Handle, MatmulDesc, const void* alpha, const void* a, MatrixLayout, const void* b, MatrixLayout,
                   const void* beta, const void* c, MatrixLayout, void* d, MatrixLayout, const Algorithm*,
                   void* workspace, size_t workspace_bytes, cudaStream_t);
};

// The library's functions. Looks first in what set_library was given, then among the libraries that the process has
// loaded, then along the loader's search path. Throws std::runtime_error if there is none.
const Api& api();

// A dlopen handle of cuBLASLt, for a binding that knows where the library lies; to be called before the first stage
// runs.
void set_library(void* library);

// The handle of the current device, created at its first use.
Handle handle(int device);

void check(Status status, const char* call);

}  // namespace cublaslt
}  // namespace cuda
}  // namespace pfa
