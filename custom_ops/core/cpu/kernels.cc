#include "core/cpu/kernels.h"

namespace pfa::cpu {

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

const std::vector<Kernels>& supported_kernels() {
  static const std::vector<Kernels> kernels = [] {
    std::vector<Kernels> found{kBaselineKernels};
#if defined(__x86_64__)
    for (const Kernels& candidate : {kAvx2Kernels, kAvx512Kernels}) {
      if (candidate.supported()) found.push_back(candidate);
    }
#endif
    return found;
  }();
  return kernels;
}

}  // namespace pfa::cpu
