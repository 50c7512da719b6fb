// The stages for x86-64 processors with AVX-512 and its dot products of bfloat16 numbers, where the compiler knows
// them; and the same with matrix products on the tiles of AMX.
#include "core/cpu/isa/instruction_sets.h"
#if PFA_AVX512_BF16
#include "core/cpu/isa/system_headers.h"

#if PFA_AMX
#define PFA_TILE_PRODUCTS
PFA_BEGIN_WIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi2")
#else
PFA_BEGIN_WIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#endif
#define PFA_ISA avx512_bf16
#define PFA_VECTOR_BYTES 64
#define PFA_WIDE_TILES
#define PFA_BFLOAT16_PRODUCTS
#include "core/cpu/isa/stages.isa.h"

namespace pfa::cpu {
constexpr Implementation kAvx512Bf16 = avx512_bf16::make_implementation("avx512_bf16", why_not_avx512_bf16);
#if PFA_AMX
constexpr Implementation kAmx = avx512_bf16::make_implementation("amx", why_not_amx, true);
#endif
}  // namespace pfa::cpu
PFA_END_TARGET
#endif
