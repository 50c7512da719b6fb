// The stages for x86-64 processors with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#include "core/cpu/isa/system_headers.h"

// What runs on every processor comes before the instruction set is raised.
namespace {
const char* why_not() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return runs ? nullptr : "the processor lacks AVX-512 F, BW, DQ or VL";
}
}  // namespace

PFA_BEGIN_WIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define PFA_ISA avx512
#define PFA_VECTOR_BYTES 64
#include "core/cpu/isa/stages.isa.h"

namespace pfa::cpu {
extern const Implementation kAvx512;
constexpr Implementation kAvx512 = avx512::make_implementation("avx512", why_not);
}  // namespace pfa::cpu
PFA_END_TARGET
#endif
