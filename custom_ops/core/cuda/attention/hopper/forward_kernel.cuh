// The kernel of attention's forward pass on Hopper, made of the roles of forward.cuh, and its launch for one dtype and
// head dim. Each file that includes this instantiates `forward` once, so that compilers can share the work.
#pragma once

#include "core/cuda/attention/hopper/forward.cuh"
#include "core/cuda/attention/hopper/passes.h"
#include "core/cuda/attention/launch.h"

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kMostTilesBytes = 225 * 1024;  // in a multiprocessor's only thread block

template <class T, int kHeadDim, MaskKind kMask, bool kDrops, bool kPacked>
__global__ void __launch_bounds__(ForwardShape<kHeadDim, kMask>::kThreads, ForwardShape<kHeadDim, kMask>::kBlocksPerSm)
    forward_kernel(const __grid_constant__ ForwardMaps maps, const MaskCopies mask_copies, const HiddenTiles hidden,
                   const TileOrder order, const ForwardArgs args, const int heads_per_group) {
#if PFA_HOPPER_CODE
  write_random_state(args);
  using Shape = ForwardShape<kHeadDim, kMask>;
  extern __shared__ unsigned char unaligned[];
  __shared__ ForwardShared shared;
  char* tiles = reinterpret_cast<char*>(unaligned) + (-shared_address(unaligned) & 1023);
  const int tiles_of_head = query_tiles<kPacked>(args);
  const OrderedTile place = ordered_tile(query_heads<kPacked>(args), blockIdx.x, heads_per_group, tiles_of_head);
  SequenceTile tile;
  if ((kPacked || kMask == kRanges) && order.places) {
    const int64_t of_head = kPacked ? 0 : hidden.head_of(args.layout.head(place.head));
    tile = order.at<kPacked>(args, of_head, place.head, place.tile);
  } else {
    tile = sequence_tile<kPacked>(args, args.layout.query_starts, place.head,
                                  tiles_of_head - 1 - place.tile);  // the last have the longest walks
  }
  ForwardRoles<T, kHeadDim, kMask, kDrops, kPacked> roles(maps, mask_copies, hidden, args, shared, tiles, tile);
  if (kPacked && tile.first >= roles.visibility().queries) return;
  if (kMask == kRanges && threadIdx.x / 32 == 1) roles.list_walk();
  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.key);
    prefetch_map(maps.value);
    if (kMask == kTiledMask) prefetch_map(maps.mask);
    shared.query_head = static_cast<int>(roles.head.index.head);
    shared.key_head = static_cast<int>(roles.head.index.kv_head);
    shared.key_map = &maps.key;
    shared.value_map = &maps.value;
    shared.query_rows = query_map_rows<kPacked>(args, roles.head);
    shared.key_rows = key_map_rows<kPacked>(args, roles.head);
    barrier_init(&shared.q_full, 1);
    shared.k.init();
    shared.v.init();
    if (kMask == kTiledMask) {
      shared.mask[0].init();
      shared.mask[1].init();
    }
    if (kMask == kKeyMask) shared.key_tiles = {0, INT_MAX, -1};
    barrier_init_fence();
  }
  __syncthreads();
  roles.begin();

  if (Shape::kCopies && threadIdx.x < 128) {
    registers_give<24>();
    roles.produce();
    return;
  }
  if (Shape::kCopies) registers_take<240>();
  const int group = threadIdx.x / 128 - (Shape::kCopies ? 1 : 0);
  const int strip = roles.row0 + group * 64 + threadIdx.x / 32 % 4 * 16;
  StripSoftmax softmax;
  float o[kHeadDim / 2];  // [64][D]
  if constexpr (Shape::kCopies) {
    roles.consume_in_turns(group, strip, softmax, o);
  } else {
    roles.consume_alone(group, strip, softmax, o);
  }
  roles.store(group, strip, softmax, o);
#endif
}

template <class T, int kHeadDim, MaskKind kMask, bool kPacked>
void launch_forward(const Context& context, const ForwardArgs& args, const HiddenTiles& hidden, const TileOrder& order,
                    const ForwardMaps& maps) {
  using Shape = ForwardShape<kHeadDim, kMask>;
  MaskCopies mask_copies{};
  int mask_bytes = 0;
  if (kMask == kKeyMask) {
    mask_bytes = std::min<int>(ceil_div(args.visibility.keys, kKeys), kMaskTiles) * kKeys * sizeof(float);
  }
  // Of at most 2^21 keys (why_not_hopper), for which there is room.
  if (kMask == kRanges) {
    mask_bytes = kStages * hidden.ranges_of_key * kRangesBytes +
                 static_cast<int>(ceil_div(args.visibility.keys, kKeys) * sizeof(uint16_t));
  }
  if (kMask == kTiledMask) {
    const int panels = static_cast<int>(size_of(args.mask.dtype));
    mask_copies.log2_parts = panels > Shape::kMaskPanels ? 1 : 0;
    mask_copies.panels = panels >> mask_copies.log2_parts;
    mask_bytes = mask_copies.panels * kQueries * kRowBytes;
    mask_copies.log2_stages = Shape::kCopies && Shape::kTilesBytes + 2 * mask_bytes <= kMostTilesBytes ? 1 : 0;
    mask_bytes <<= mask_copies.log2_stages;
  }
  with_bool(args.drops, [&](auto drops) {
    const auto kernel = forward_kernel<T, kHeadDim, kMask, decltype(drops)::value, kPacked>;
    // Tiles begin at a multiple of 1024 bytes. Two thread blocks with a tiled mask just fit, if no more is left for
    // that than lies before the first multiple behind what the kernel declares.
    size_t to_multiple = 1024;
    if (kMask == kTiledMask && Shape::kBlocksPerSm == 2) {
      to_multiple -= kernel_attributes(context, reinterpret_cast<const void*>(kernel)).sharedSizeBytes % 1024;
    }
    const size_t shared_bytes = to_multiple + Shape::kTilesBytes + mask_bytes;
    const int64_t head_bytes = 4 * args.layout.keys * args.layout.head_dim / args.layout.group;  // k, v
    const int64_t heads = query_heads(args);
    launch(context, "attention_forward_hopper", kernel, query_tiles(args) * heads, Shape::kThreads, shared_bytes, maps,
           mask_copies, hidden, order, args, heads_per_group(args, heads, std::max<int64_t>(1, head_bytes)));
  });
}

template <class T, int kHeadDim>
void forward(const Context& context, const ForwardArgs& args, const HiddenTiles& hidden, const TileOrder& order) {
  ForwardMaps maps{query_tensor_map<T>(args.query, args),
                   key_tensor_map<T>(args.key, args),
                   key_tensor_map<T>(args.value, args),
                   {}};
  if (args.is_packed()) return launch_forward<T, kHeadDim, kNoMask, true>(context, args, hidden, order, maps);
  with_mask_kind(args, [&](auto mask) {
    constexpr MaskKind kMask = decltype(mask)::value;
    if (kMask == kFullMask && mask_tensor_map(args, &maps.mask)) {
      launch_forward<T, kHeadDim, kTiledMask, false>(context, args, hidden, order, maps);
    } else {
      launch_forward<T, kHeadDim, kMask, false>(context, args, hidden, order, maps);
    }
  });
}

template <class T, int kHeadDim>
bool is_built(const Context& context) {
  const void* kernel = reinterpret_cast<const void*>(forward_kernel<T, kHeadDim, kNoMask, false, false>);
  return kernel_attributes(context, kernel).sharedSizeBytes > 0;
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
