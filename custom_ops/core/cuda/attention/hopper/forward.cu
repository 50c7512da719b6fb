// Attention, forward, on Hopper: the choice of an instantiation of forward_kernel.cuh.
#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include "core/arena.h"
#include "core/cuda/attention/hopper/passes.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/passes.h"
#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {

size_t hopper_attention_forward_workspace_bytes(const Context&, const AttentionParams& p) {
  Arena arena;
  hopper::place_hidden_tiles(arena, attention_args(p), 0);
  return arena.used();
}

void hopper_attention_forward(Context& context, const AttentionParams& p) {
  const ForwardArgs args = forward_args(p);
  Arena arena(p.stage_workspace);
  const hopper::HiddenTiles hidden = hopper::place_hidden_tiles(arena, args, 0);
  hopper::make_hidden_tiles(context, args, hidden, 0);
  dispatch_16bit(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_head_dim<64, 128>(
        args.head_dim(), [&](auto head_dim) { hopper::forward<T, decltype(head_dim)::value>(context, args, hidden); });
  });
}

bool hopper_is_built(const Context& context) { return hopper::is_built<__half, 64>(context); }

}  // namespace cuda
}  // namespace pfa

#endif
