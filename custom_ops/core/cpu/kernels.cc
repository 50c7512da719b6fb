#include "core/cpu/kernels.h"

namespace pfa::cpu {

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#if __has_include(<avx512bf16intrin.h>)
extern const Kernels kAvx512Bf16Kernels;
#if __has_include(<amxbf16intrin.h>) && defined(__linux__)
extern const Kernels kAmxKernels;
#endif
#endif
#endif

const std::vector<Kernels>& supported_kernels() {
  static const std::vector<Kernels> kernels = [] {
    std::vector<Kernels> found{kBaselineKernels};
#if defined(__x86_64__)
    const Kernels* candidates[] = {
        &kAvx2Kernels,
        &kAvx512Kernels,
#if __has_include(<avx512bf16intrin.h>)
        &kAvx512Bf16Kernels,
#if __has_include(<amxbf16intrin.h>) && defined(__linux__)
        &kAmxKernels,
#endif
#endif
    };
    for (const Kernels* candidate : candidates) {
      if (candidate->supported()) found.push_back(*candidate);
    }
#endif
    return found;
  }();
  return kernels;
}

}  // namespace pfa::cpu
