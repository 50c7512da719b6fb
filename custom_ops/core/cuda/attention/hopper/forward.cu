// Attention, forward, on Hopper: the choice of an instantiation of forward_kernel.cuh.
#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include "core/cuda/attention/hopper/passes.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/passes.h"
#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {

void hopper_attention_forward(Context& context, const AttentionParams& p) {
  const ForwardArgs args = forward_args(p);
  dispatch_16bit(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_head_dim<64, 128>(args.head_dim(),
                           [&](auto head_dim) { hopper::forward<T, decltype(head_dim)::value>(context, args); });
  });
}

bool hopper_is_built(const Context& context) { return hopper::is_built<__half, 64>(context); }

}  // namespace cuda
}  // namespace pfa

#endif
