// The kernel that sorts the tiles of packed sequences (tile_order.h): a thread block for each segment of them.
#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include "core/cuda/attention/heads.cuh"
#include "core/cuda/attention/hopper/tile_order.cuh"
#include "core/cuda/attention/launch.h"

namespace pfa {
namespace cuda {
namespace hopper {
namespace {

// kOfKeys: tiles of keys, which walk over tiles of tile_queries queries; else of queries.
template <bool kOfKeys>
__global__ void __launch_bounds__(kSortedTiles)
    sort_packed_kernel(const AttentionArgs args, const TileOrder order, const int tile_queries) {
  const int32_t* starts = kOfKeys ? args.layout.key_starts : args.layout.query_starts;
  const auto heads = static_cast<uint32_t>(args.layout.num_heads);
  sort_tiles(sorted_segment(order.tiles, blockIdx.x), order.places, [&](int i) -> MeasuredTile {
    const SequenceTile of_head = sequence_tile<true>(args, starts, 0, i);
    const PlacedTile tile{static_cast<int>(of_head.head / heads), of_head.first};
    const Visibility<int> visibility = visibility_of_sequence<true>(args, tile.sequence);
    if (tile.first >= (kOfKeys ? visibility.keys : visibility.queries)) return {tile, 0};
    const Range<int> walk =
        kOfKeys ? walk_over_queries(visibility, tile.first, tile_queries) : walk_over_keys(visibility, tile.first);
    return {tile, walk.end - walk.first};
  });
}

}  // namespace

void sort_packed_tiles(const Context& context, const AttentionArgs& args, const TileOrder& order,
                       int backward_queries) {
  if (!order.places || !args.is_packed()) return;
  with_bool(backward_queries > 0, [&](auto of_keys) {
    launch(context, "attention_sort_packed", sort_packed_kernel<decltype(of_keys)::value>, sorted_segments(order.tiles),
           kSortedTiles, 0, args, order, backward_queries);
  });
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa

#endif
