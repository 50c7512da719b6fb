#include "core/cuda/attention/mma_backward.cuh"

namespace pfa {
namespace cuda {
namespace mma {

template void backward<__half, 64, 96, 128>(const Context&, const BackwardArgs&);

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
