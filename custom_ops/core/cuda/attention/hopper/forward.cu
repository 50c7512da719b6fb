// Attention, forward, on Hopper: the choice of an instantiation of forward_kernel.cuh.
#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include "core/arena.h"
#include "core/cuda/attention/hopper/mask_copy.h"
#include "core/cuda/attention/hopper/passes.h"
#include "core/cuda/attention/hopper/tile_order.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/passes.h"
#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {

namespace hopper {
namespace {

// Places the pass's memory in `arena`.
void place(Arena& arena, const Context& context, const AttentionArgs& args, Mask& mask_copy, HiddenTiles& hidden,
           TileOrder& order) {
  mask_copy = place_mask_copy(arena, args, false);
  hidden = place_hidden_tiles(arena, args, 0);
  const int64_t at_once = context.num_sms * (args.head_dim() > 64 ? 1 : 2);
  order =
      place_tile_order(arena, args, query_tiles(args), query_heads(args), at_once, args.is_packed() ? 1 : hidden.heads);
}

}  // namespace
}  // namespace hopper

size_t hopper_attention_forward_workspace_bytes(const Context& context, const AttentionParams& p) {
  Arena arena;
  Mask mask_copy;
  hopper::HiddenTiles hidden;
  hopper::TileOrder order;
  hopper::place(arena, context, attention_args(p), mask_copy, hidden, order);
  return arena.used();
}

void hopper_attention_forward(Context& context, const AttentionParams& p) {
  ForwardArgs args = forward_args(p);
  Arena arena(p.stage_workspace);
  Mask mask_copy;
  hopper::HiddenTiles hidden;
  hopper::TileOrder order;
  hopper::place(arena, context, args, mask_copy, hidden, order);
  hopper::use_mask_copy(context, mask_copy, args);
  hopper::make_hidden_tiles(context, args, hidden, order, 0);
  hopper::sort_packed_tiles(context, args, order, 0);
  dispatch_16bit(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_head_dim<64, 128>(args.head_dim(), [&](auto head_dim) {
      hopper::forward<T, decltype(head_dim)::value>(context, args, hidden, order);
    });
  });
}

bool hopper_is_built(const Context& context) { return hopper::is_built<__half, 64>(context); }

}  // namespace cuda
}  // namespace pfa

#endif
