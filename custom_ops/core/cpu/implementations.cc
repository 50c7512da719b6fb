// The list of the implementations, and which of them this processor runs.
#include "core/cpu/implementations.h"

#include "core/cpu/isa/instruction_sets.h"

namespace pfa::cpu {

const std::vector<const Implementation*>& compiled_implementations() {
  static const std::vector<const Implementation*> compiled = {
      &kBaseline,
#if PFA_X86
      &kAvx2,       &kAvx512,
#endif
#if PFA_AVX512_BF16
      &kAvx512Bf16,
#endif
#if PFA_AMX
      &kAmx,
#endif
  };
  return compiled;
}

const std::vector<const Implementation*>& usable_implementations() {
  static const std::vector<const Implementation*> usable = [] {
    std::vector<const Implementation*> found;
    for (const Implementation* implementation : compiled_implementations()) {
      if (!implementation->why_not()) found.push_back(implementation);
    }
    return found;
  }();
  return usable;
}

}  // namespace pfa::cpu
