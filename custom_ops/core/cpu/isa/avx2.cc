// The stages for x86-64 processors with AVX2 and FMA.
#include "core/cpu/isa/instruction_sets.h"
#if PFA_X86
#include "core/cpu/isa/system_headers.h"

PFA_BEGIN_TARGET("avx2,fma,f16c,bmi2")
#define PFA_ISA avx2
#define PFA_VECTOR_BYTES 32
#include "core/cpu/isa/stages.isa.h"

namespace pfa::cpu {
constexpr Implementation kAvx2 = avx2::make_implementation("avx2", why_not_avx2);
}  // namespace pfa::cpu
PFA_END_TARGET
#endif
