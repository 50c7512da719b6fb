#include "core/cuda/attention/mma_forward.cuh"

namespace pfa {
namespace cuda {
namespace mma {

template void forward<__nv_bfloat16, 64, 96, 128, 192, 256>(const Context&, const ForwardArgs&);

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
