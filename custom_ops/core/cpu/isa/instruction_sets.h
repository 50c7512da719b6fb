// Which instruction sets the stages are compiled for: what the architecture has and the compiler knows. avx2.cc and its
// like define the implementations, processor.cc says whether this processor runs them.
#pragma once

#include "core/cpu/implementations.h"

#if defined(__x86_64__)
#define PFA_X86 1
#else
#define PFA_X86 0
#endif

#if PFA_X86 && __has_include(<avx512bf16intrin.h>)
#define PFA_AVX512_BF16 1
#else
#define PFA_AVX512_BF16 0
#endif

#if PFA_AVX512_BF16 && __has_include(<amxbf16intrin.h>) && defined(__linux__)
#define PFA_AMX 1
#else
#define PFA_AMX 0
#endif

namespace pfa::cpu {

extern const Implementation kBaseline;

#if PFA_X86
extern const Implementation kAvx2;
extern const Implementation kAvx512;
const char* why_not_avx2();
const char* why_not_avx512();
#endif

#if PFA_AVX512_BF16
extern const Implementation kAvx512Bf16;
const char* why_not_avx512_bf16();
#endif

#if PFA_AMX
extern const Implementation kAmx;
const char* why_not_amx();
#endif

}  // namespace pfa::cpu
