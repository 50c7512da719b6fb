// The stages for x86-64 processors with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#include "core/cpu/system_headers.h"

PFA_BEGIN_WIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define PFA_ISA avx512
#define PFA_VECTOR_BYTES 64
#include "core/cpu/stages.h"

namespace pfa::cpu {
extern const Kernels kAvx512Kernels;
constexpr Kernels kAvx512Kernels = avx512::make_kernels("avx512", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
});
}  // namespace pfa::cpu
PFA_END_TARGET
#endif
