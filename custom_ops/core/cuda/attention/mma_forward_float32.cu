#include "core/cuda/attention/mma_forward.cuh"

namespace pfa {
namespace cuda {
namespace mma {

template void forward<float, 64, 128>(const Context&, const ForwardArgs&);

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
