#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include "core/cuda/attention/hopper/forward_kernel.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

template void forward<__half, 64>(const Context&, const ForwardArgs&, const HiddenTiles&, const TileOrder&);
template bool is_built<__half, 64>(const Context&);

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa

#endif
