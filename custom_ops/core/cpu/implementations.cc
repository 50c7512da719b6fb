#include "core/cpu/implementations.h"

namespace pfa::cpu {

extern const Implementation kBaseline;
#if defined(__x86_64__)
extern const Implementation kAvx2;
extern const Implementation kAvx512;
#if __has_include(<avx512bf16intrin.h>)
extern const Implementation kAvx512Bf16;
#if __has_include(<amxbf16intrin.h>) && defined(__linux__)
extern const Implementation kAmx;
#endif
#endif
#endif

const std::vector<const Implementation*>& implementations() {
  static const std::vector<const Implementation*> all{
      &kBaseline,
#if defined(__x86_64__)
      &kAvx2,       &kAvx512,
#if __has_include(<avx512bf16intrin.h>)
      &kAvx512Bf16,
#if __has_include(<amxbf16intrin.h>) && defined(__linux__)
      &kAmx,
#endif
#endif
#endif
  };
  return all;
}

const std::vector<const Implementation*>& usable_implementations() {
  static const std::vector<const Implementation*> usable = [] {
    std::vector<const Implementation*> found;
    for (const Implementation* implementation : implementations()) {
      if (!implementation->why_not()) found.push_back(implementation);
    }
    return found;
  }();
  return usable;
}

}  // namespace pfa::cpu
