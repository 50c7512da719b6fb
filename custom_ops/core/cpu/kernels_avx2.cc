// The stages for x86-64 processors with AVX2 and FMA.
#if defined(__x86_64__)
#include "core/cpu/system_headers.h"

PFA_BEGIN_TARGET("avx2,fma,f16c,bmi2")
#define PFA_ISA avx2
#define PFA_VECTOR_BYTES 32
#include "core/cpu/stages.h"

namespace pfa::cpu {
extern const Kernels kAvx2Kernels;
constexpr Kernels kAvx2Kernels =
    avx2::make_kernels("avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); });
}  // namespace pfa::cpu
PFA_END_TARGET
#endif
