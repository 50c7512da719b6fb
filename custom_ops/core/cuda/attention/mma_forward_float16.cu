#include "core/cuda/attention/mma_forward.cuh"

namespace pfa {
namespace cuda {
namespace mma {

template void forward<__half, 64, 96, 128, 192, 256>(const Context&, const ForwardArgs&);
template bool is_built<__half>(const Context&);

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
