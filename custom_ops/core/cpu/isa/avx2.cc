// The stages for x86-64 processors with AVX2 and FMA.
#if defined(__x86_64__)
#include "core/cpu/isa/system_headers.h"

// What runs on every processor comes before the instruction set is raised.
namespace {
const char* why_not() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? nullptr : "the processor lacks AVX2 or FMA";
}
}  // namespace

PFA_BEGIN_TARGET("avx2,fma,f16c,bmi2")
#define PFA_ISA avx2
#define PFA_VECTOR_BYTES 32
#include "core/cpu/isa/stages.isa.h"

namespace pfa::cpu {
extern const Implementation kAvx2;
constexpr Implementation kAvx2 = avx2::make_implementation("avx2", why_not);
}  // namespace pfa::cpu
PFA_END_TARGET
#endif
