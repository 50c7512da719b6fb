// The stages for x86-64 processors with AVX-512 and its dot products of bfloat16 numbers, where the compiler knows
// them; and the same with matrix products on the tiles of AMX.
#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#include "core/cpu/isa/system_headers.h"

// What runs on every processor comes before the instruction set is raised.
namespace {

// Not all compilers that know avx512f know the names of these.
uint64_t features(unsigned leaf) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, leaf, &a, &b, &c, &d) ? static_cast<uint64_t>(d) << 32 | a : 0;
}

const char* why_not_bfloat16_products() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && (features(1) >> 5 & 1);
  return runs ? nullptr : "the processor lacks AVX-512 BF16, or AVX-512 F, BW, DQ or VL";
}

#if __has_include(<amxbf16intrin.h>) && defined(__linux__)
#define PFA_TILE_PRODUCTS 1

// Linux lets a process use tiles once it has asked, for all its threads.
const char* why_not_tile_products() {
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;
  constexpr uint64_t tile_instructions = uint64_t{1} << (32 + 24) | uint64_t{1} << (32 + 22);  // AMX-TILE, AMX-BF16
  if (const char* reason = why_not_bfloat16_products()) return reason;
  if ((features(0) & tile_instructions) != tile_instructions) return "the processor lacks AMX-TILE or AMX-BF16";
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? nullptr : "the kernel does not permit AMX";
}
#endif

}  // namespace

#if PFA_TILE_PRODUCTS
PFA_BEGIN_WIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi2")
#else
PFA_BEGIN_WIDE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#endif
#define PFA_ISA avx512_bf16
#define PFA_VECTOR_BYTES 64
#define PFA_BFLOAT16_PRODUCTS
#include "core/cpu/isa/stages.isa.h"

namespace pfa::cpu {
extern const Implementation kAvx512Bf16;
constexpr Implementation kAvx512Bf16 = avx512_bf16::make_implementation("avx512_bf16", why_not_bfloat16_products);
#if PFA_TILE_PRODUCTS
extern const Implementation kAmx;
constexpr Implementation kAmx = avx512_bf16::make_implementation("amx", why_not_tile_products, true);
#endif
}  // namespace pfa::cpu
PFA_END_TARGET
#endif
