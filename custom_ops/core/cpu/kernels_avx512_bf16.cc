// The stages for x86-64 processors with AVX-512 and its dot products of bfloat16 numbers, where the compiler knows them.
#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#include "core/cpu/system_headers.h"

PFA_BEGIN_WIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#define PFA_ISA avx512_bf16
#define PFA_VECTOR_BYTES 64
#define PFA_BFLOAT16_PRODUCTS
#include "core/cpu/stages.h"

namespace pfa::cpu {
namespace {

// Not all compilers that know avx512f know the name of this one.
bool has_bfloat16_products() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

}  // namespace

extern const Kernels kAvx512Bf16Kernels;
const Kernels kAvx512Bf16Kernels = avx512_bf16::make_kernels("avx512_bf16", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && has_bfloat16_products();
});
}  // namespace pfa::cpu
PFA_END_TARGET
#endif
