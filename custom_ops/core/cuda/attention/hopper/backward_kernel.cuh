// The kernels of attention's backward pass on Hopper, the first made of the roles of backward.cuh, and their launches
// for one dtype and head dim. Each file that includes this instantiates `backward` once, so that compilers can share
// the work.
#pragma once

#include "core/cuda/attention/hopper/backward.cuh"
#include "core/cuda/attention/hopper/passes.h"
#include "core/cuda/attention/launch.h"

namespace pfa {
namespace cuda {
namespace hopper {

template <class T, int kHeadDim, MaskKind kMask, bool kDrops, bool kPacked>
__global__ void __launch_bounds__(BackwardShape<kHeadDim>::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardMaps maps, const BackwardArgs args, const BackwardSchedule schedule,
                    const HiddenTiles hidden, const TileOrder order, const float scale_log2) {
#if PFA_HOPPER_CODE
  constexpr int kArrivals = BackwardShape<kHeadDim>::kArrivals;
  extern __shared__ unsigned char unaligned[];
  __shared__ BackwardShared<kArrivals> shared;
  char* tiles = reinterpret_cast<char*>(unaligned) + (-shared_address(unaligned) & 1023);
  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.key);
    prefetch_map(maps.value);
    prefetch_map(maps.d_out);
    shared.kv.init(schedule.turns ? 1 + kTurnThreads : 1);
    shared.q.init();
    shared.d_out.init();
    shared.turn.init();
    for (uint64_t& barrier : shared.step_added) barrier_init(&barrier, kArrivals);
    barrier_init(&shared.added, kArrivals);
    barrier_init(&shared.may_take, 1);
    barrier_init(&shared.has_taken, kArrivals);
    barrier_init_fence();
  }
  __syncthreads();

  const BackwardRoles<T, kHeadDim, kMask, kDrops, kPacked> roles{maps,  args,       schedule, hidden,
                                                                 order, scale_log2, shared,   tiles};
  if (threadIdx.x < 128) {
    registers_give<24>();
    if (threadIdx.x == 0) roles.produce();
    if (threadIdx.x == 32) roles.exchange();
    if (schedule.turns && threadIdx.x / 32 == 2) roles.await_turns();
    if (schedule.turns && threadIdx.x / 32 == 3) roles.end_turns();
  } else {
    registers_take<240>();
    roles.consume();
  }
#endif
}

// d_q of the last `heads` heads, which no thread block took: a thread block per 128 queries.
template <class T, int kHeadDim, bool kPacked>
__global__ void __launch_bounds__(256)
    query_gradient_kernel(const BackwardArgs args, const BackwardSchedule schedule, const int heads) {
#if PFA_HOPPER_CODE
  __shared__ alignas(1024) char panel[kQueryTile * kRowBytes];
  const int tiles = query_tiles<kPacked>(args) * static_cast<int>(args.layout.group);
  const uint32_t head = key_heads<kPacked>(args) - heads + blockIdx.x / tiles;
  const int tile = static_cast<int>(blockIdx.x % tiles);
  const int strip = threadIdx.x / 32 * 16;
  QueryGradient<T, kHeadDim, kPacked> d_q;
  d_q.load(args, schedule, head, tile, strip);
  d_q.store(args, schedule, head, tile, strip, panel);
#endif
}

template <class T, int kHeadDim>
void backward(const Context& context, const BackwardArgs& args, const BackwardSchedule& schedule,
              const HiddenTiles& hidden, const TileOrder& order) {
  using Shape = BackwardShape<kHeadDim>;
  const BackwardMaps maps{query_tensor_map<T>(args.query, args), key_tensor_map<T>(args.key, args),
                          key_tensor_map<T>(args.value, args), query_tensor_map<T>(args.d_out, args)};
  const auto run = [&](auto mask, auto packed) {
    constexpr bool kPacked = decltype(packed)::value;
    with_bool(args.drops, [&](auto drops) {
      launch(context, "attention_backward_hopper",
             backward_kernel<T, kHeadDim, decltype(mask)::value, decltype(drops)::value, kPacked>,
             thread_blocks(context, args), Shape::kThreads, Shape::kSharedBytes, maps, args, schedule, hidden, order,
             static_cast<float>(args.score_scale * kLog2e));
    });
    const int64_t heads = std::min<int64_t>(schedule.heads_behind, key_heads(args));
    launch(context, "attention_query_gradient", query_gradient_kernel<T, kHeadDim, kPacked>,
           heads * args.layout.group * query_tiles(args), 256, 0, args, schedule, static_cast<int>(heads));
  };
  if (args.is_packed()) return run(std::integral_constant<MaskKind, kNoMask>{}, std::true_type{});
  with_mask_kind(args, [&](auto mask) { run(mask, std::false_type{}); });
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
