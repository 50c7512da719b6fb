// The stages for x86-64 processors with AVX-512 F, BW, DQ and VL.
#include "core/cpu/isa/instruction_sets.h"
#if PFA_X86
#include "core/cpu/isa/system_headers.h"

PFA_BEGIN_WIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define PFA_ISA avx512
#define PFA_VECTOR_BYTES 64
#define PFA_WIDE_TILES
#include "core/cpu/isa/stages.isa.h"

namespace pfa::cpu {
constexpr Implementation kAvx512 = avx512::make_implementation("avx512", why_not_avx512);
}  // namespace pfa::cpu
PFA_END_TARGET
#endif
