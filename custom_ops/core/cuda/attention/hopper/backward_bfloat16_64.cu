#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include "core/cuda/attention/hopper/backward_kernel.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

template void backward<__nv_bfloat16, 64>(const Context&, const BackwardArgs&, const BackwardSchedule&,
                                          const HiddenTiles&, const TileOrder&);

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa

#endif
