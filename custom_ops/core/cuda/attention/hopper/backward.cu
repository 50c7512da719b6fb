// Attention, backward, on Hopper: the plan of how thread blocks share d_q (schedule.h), the pass's memory, and the
// choice of an instantiation of backward_kernel.cuh.
#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include "core/arena.h"
#include "core/cuda/attention/hopper/passes.h"
#include "core/cuda/attention/hopper/tile_order.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/passes.h"
#include "core/cuda/attention/row_statistics.cuh"
#include "core/cuda/numbers.cuh"
#include "core/cuda/rows/column_sums.h"

namespace pfa {
namespace cuda {
namespace hopper {
namespace {

// How many heads have sums, and how far behind them d_q is brought to its place.
BackwardSchedule plan(const Context& context, const BackwardArgs& args) {
  const bool uneven = has_uneven_walks(args);
  const int64_t blocks = thread_blocks(context, args);
  const int64_t tiles = key_tiles(args);
  // While a head's longest tile is worked on, thread blocks get through so many heads; and a few spare ones, so that
  // hardly anyone waits.
  const int64_t at_work = uneven ? ceil_div(2 * blocks, tiles + 1) : ceil_div(blocks, tiles);
  const int64_t spare = 1 + at_work / (uneven ? 6 : 2);
  // The heads of a group are worked on together, so what is taken must be of an earlier group. Where the shortest tiles
  // come last in it, the longest of a head `at_work` heads before are done when these are. Else a whole group or more
  // must lie between.
  const int64_t walk_bytes = 4 * int64_t{args.visibility.keys} +
                             8 * int64_t{args.visibility.queries} * args.layout.group;  // k, v; q, d_out, sums of d_q
  // A group of fewer heads than half of those at work has less to do for each thread block than half its longest tile:
  // at the end most would have nothing left while a few are at such tiles.
  const int64_t cached = heads_per_group(args, key_heads(args), walk_bytes * args.layout.head_dim);
  const int64_t group = uneven ? std::min(key_heads(args), std::max(cached, ceil_div(at_work, 2))) : cached;
  const int64_t between = ceil_div(ceil_div(blocks, tiles), group) * group;
  const int64_t behind = !uneven                  ? spare
                         : has_sorted_walks(args) ? std::max(group, at_work - group + spare)
                                                  : group + between;
  BackwardSchedule schedule{};
  schedule.columns = args.head_dim() > 64 ? 128 : 64;
  schedule.heads_per_group = static_cast<int>(group);
  schedule.heads_behind = static_cast<int>(behind);
  schedule.slots = static_cast<int>(std::min(key_heads(args), behind + std::max(at_work, group) + spare));
  // Few thread blocks would take long over many tiles.
  if (schedule.slots == key_heads(args) && query_tiles(args) * args.layout.group > 2 * tiles) {
    schedule.heads_behind = schedule.slots;
  }
  return schedule;
}

// Places the pass's memory from `memory` on, null to learn its size, which it returns.
size_t place(const Context& context, const AttentionParams& p, void* memory, BackwardArgs& args,
             BackwardSchedule& schedule, HiddenTiles& hidden) {
  Arena arena(memory);
  place_row_statistics(arena, p, args);
  hidden = place_hidden_tiles(arena, args, backward_queries(args.head_dim()));
  schedule = plan(context, args);
  // The first sums lie in memory that is lent.
  const size_t slot = sizeof(float) * args.layout.group * args.rows_padded * schedule.columns;
  if (p.spare && is_vector_aligned(p.spare)) {
    schedule.lent_sums = static_cast<float*>(p.spare);
    schedule.lent_slots = static_cast<int>(std::min<size_t>(schedule.slots, p.spare_bytes / slot));
  }
  schedule.sums = static_cast<float*>(arena.take((schedule.slots - schedule.lent_slots) * slot));
  schedule.progress = static_cast<uint32_t*>(arena.take(sizeof(uint32_t) * (1 + 2 * schedule.slots)));
  if (p.d_qkv_bias) {
    schedule.bias_sums = static_cast<float*>(arena.take(sizeof(float) * kBiasCopies * args.layout.bias_numbers()));
  }
  return arena.used();
}

}  // namespace
}  // namespace hopper

size_t hopper_attention_backward_workspace_bytes(const Context& context, const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  hopper::BackwardSchedule schedule;
  hopper::HiddenTiles hidden;
  return hopper::place(context, p, nullptr, args, schedule, hidden);
}

void hopper_attention_backward(Context& context, const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  hopper::BackwardSchedule schedule;
  hopper::HiddenTiles hidden;
  hopper::place(context, p, p.stage_workspace, args, schedule, hidden);
  hopper::make_hidden_tiles(context, args, hidden, hopper::backward_queries(args.head_dim()));
  dispatch_16bit(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    make_row_statistics<T, float>(context, args, schedule);
    with_head_dim<64, 128>(args.head_dim(), [&](auto head_dim) {
      hopper::backward<T, decltype(head_dim)::value>(context, args, schedule, hidden);
    });
  });
  if (p.d_qkv_bias) {
    add_row_groups(context, DType::kFloat32, schedule.bias_sums, hopper::kBiasCopies, args.layout.bias_numbers(),
                   {{p.d_qkv_bias, p.dtype}, {}, {}});
  }
}

}  // namespace cuda
}  // namespace pfa

#endif
