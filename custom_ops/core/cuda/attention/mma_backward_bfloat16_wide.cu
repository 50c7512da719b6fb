#include "core/cuda/attention/mma_backward.cuh"

namespace pfa {
namespace cuda {
namespace mma {

template void backward<__nv_bfloat16, 192, 256>(const Context&, const BackwardArgs&);

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
