// What this processor, and the system on it, lacks of each instruction set.
#include "core/cpu/isa/instruction_sets.h"

#if PFA_X86
#include <cpuid.h>

#include <cstdint>
#if PFA_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pfa::cpu {

const char* why_not_avx2() {
  if (!__builtin_cpu_supports("avx2")) return "the processor has no AVX2";
  if (!__builtin_cpu_supports("fma")) return "the processor has no fused multiply-add (FMA)";
  return nullptr;
}

const char* why_not_avx512() {
  if (!__builtin_cpu_supports("avx512f")) return "the processor has no AVX-512";
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return "the processor has not all of AVX-512 BW, DQ and VL";
  return nullptr;
}

#if PFA_AVX512_BF16
namespace {

// Registers edx and eax of cpuid's leaf 7, whose bits Intel's and AMD's manuals list: not all compilers that know
// avx512f know the names of these features.
uint64_t features(unsigned subleaf) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, subleaf, &a, &b, &c, &d) ? static_cast<uint64_t>(d) << 32 | a : 0;
}

}  // namespace

const char* why_not_avx512_bf16() {
  if (const char* missing = why_not_avx512()) return missing;
  constexpr uint64_t avx512_bf16 = uint64_t{1} << 5;  // of eax
  return features(1) & avx512_bf16 ? nullptr : "the processor has no AVX-512 bfloat16 products";
}
#endif

#if PFA_AMX
const char* why_not_amx() {
  if (const char* missing = why_not_avx512_bf16()) return missing;
  constexpr uint64_t amx = uint64_t{1} << (32 + 24) | uint64_t{1} << (32 + 22);  // of edx: AMX-TILE, AMX-BF16
  if ((features(0) & amx) != amx) return "the processor has no AMX bfloat16 products";
  // Linux lets a process use tiles once it has asked, for all its threads.
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? nullptr
                                                                     : "the system does not grant AMX's tiles";
}
#endif

}  // namespace pfa::cpu
#endif
