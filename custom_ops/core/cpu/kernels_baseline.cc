// The stages for any processor of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "core/cpu/system_headers.h"

#define PFA_ISA baseline
#define PFA_VECTOR_BYTES 16
#include "core/cpu/stages.h"

namespace pfa::cpu {
extern const Kernels kBaselineKernels;
constexpr Kernels kBaselineKernels = baseline::make_kernels("baseline", [] { return true; });
}  // namespace pfa::cpu
