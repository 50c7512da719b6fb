// Attention, backward, on Hopper: the plan of how thread blocks share d_q (schedule.h), the pass's memory, and the
// choice of an instantiation of backward_kernel.cuh.
#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include "core/arena.h"
#include "core/cuda/attention/hopper/mask_copy.h"
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

// Of a head's sums.
int columns_of(const BackwardArgs& args) { return args.head_dim() > 64 ? 128 : 64; }
int64_t slot_bytes(const BackwardArgs& args) {
  return static_cast<int64_t>(sizeof(float)) * args.layout.group * args.rows_padded * columns_of(args);
}

// How many of `heads` go together where tiles take turns, of walks of so many steps. A head's tiles start one after the
// other, each at least a turn after its predecessor, which takes about as long as a step: of so many heads each has to
// start one in kStepsApart, so that hardly anyone waits. Groups are of one size if they can be: where the last is
// smaller, its thread blocks do wait.
int64_t heads_in_turn(int64_t heads, int64_t blocks, int64_t steps) {
  constexpr int64_t kStepsApart = 6;
  const int64_t wanted = ceil_div(kStepsApart * blocks, std::max<int64_t>(1, steps));
  int64_t groups = std::max<int64_t>(2, (heads + wanted / 2) / wanted);
  while (groups > 2 && heads % groups) --groups;
  return ceil_div(heads, groups);
}

// How many heads have sums, and how far behind them d_q is brought to its place. `sorted`: by the lengths of walks that
// are known on the device only.
BackwardSchedule plan(const Context& context, const BackwardArgs& args, bool sorted) {
  const bool uneven = has_uneven_walks(args);
  const bool in_turn = context.deterministic;
  const int64_t blocks = thread_blocks(context, args);
  const int64_t tiles = key_tiles(args);
  // While a head's longest tile is worked on, thread blocks get through so many heads; and a few spare ones, so that
  // hardly anyone waits.
  const int64_t at_work = uneven ? ceil_div(2 * blocks, tiles + 1) : ceil_div(blocks, tiles);
  const int64_t spare = 1 + at_work / (uneven ? 6 : 2);
  const int64_t walk_bytes =
      4 * args.layout.keys + 8 * args.layout.queries * args.layout.group;  // k, v; q, d_out, sums of d_q
  const int64_t cached = heads_per_group(args, key_heads(args), walk_bytes * args.layout.head_dim);
  // A group of fewer heads than half of those at work has less to do for each thread block than half its longest tile:
  // at the end most would have nothing left while a few are at such tiles. Where the lengths of walks are unknown, the
  // longest may be far longer than the others: there must be a few tiles for each thread block, and many if there is
  // memory for their sums.
  int64_t least = ceil_div(at_work, 2);
  if (has_unknown_walks(args)) {
    constexpr int64_t kFewTiles = 4, kManyTiles = 16;
    constexpr int64_t kSumBytes = 128 << 20;
    const int64_t with_room = kSumBytes / std::max<int64_t>(1, slot_bytes(args));
    least = std::max(ceil_div(kFewTiles * blocks, tiles), std::min(ceil_div(kManyTiles * blocks, tiles), with_room));
    least = ceil_div(key_heads(args), std::max<int64_t>(1, key_heads(args) / least));  // of like size
  }
  const int64_t turn_queries = in_turn ? backward_queries(args.head_dim()) : 0;
  if (in_turn) {
    const int64_t steps = ceil_div(args.visibility.queries, turn_queries) * args.layout.group;
    least = std::max(uneven ? least : at_work, heads_in_turn(key_heads(args), blocks, uneven ? steps / 2 : steps));
  }
  const int64_t group = uneven || in_turn ? std::min(key_heads(args), std::max(cached, least)) : cached;
  // The heads of a group are worked on together, so what is taken must be of an earlier group. Where the shortest tiles
  // come last in it, the longest of a head `at_work` heads before are done when these are. Else a whole group or more
  // must lie between.
  const int64_t between = ceil_div(ceil_div(blocks, tiles), group) * group;
  const int64_t behind = !uneven && !in_turn                  ? spare
                         : has_unknown_walks(args) && !sorted ? group + between
                                                              : std::max(group, at_work - group + spare);
  BackwardSchedule schedule{};
  schedule.columns = columns_of(args);
  schedule.heads_per_group = static_cast<int>(group);
  schedule.heads_behind = static_cast<int>(behind);
  schedule.slots = static_cast<int>(std::min(key_heads(args), behind + std::max(at_work, group) + spare));
  schedule.turn_queries = static_cast<int>(turn_queries);
  // Few thread blocks would take long over many tiles.
  if (schedule.slots == key_heads(args) && query_tiles(args) * args.layout.group > 2 * tiles) {
    schedule.heads_behind = schedule.slots;
  }
  return schedule;
}

// Places the pass's memory from `memory` on, null to learn its size, which it returns.
size_t place(const Context& context, const AttentionParams& p, void* memory, BackwardArgs& args, Mask& mask_copy,
             BackwardSchedule& schedule, HiddenTiles& hidden, TileOrder& order) {
  Arena arena(memory);
  mask_copy = place_mask_copy(arena, args, true);
  place_row_statistics(arena, p, args);
  hidden = place_hidden_tiles(arena, args, backward_queries(args.head_dim()));
  // Tiles that take turns have to start in the order of their keys, in which walks become shorter only if no window
  // cuts the first ones.
  order = context.deterministic && args.window_left >= 0
              ? TileOrder{}
              : place_tile_order(arena, args, key_tiles(args), key_heads(args), context.num_sms,
                                 args.is_packed() ? 1 : hidden.heads);
  schedule = plan(context, args, order.tiles > 0);
  // The first sums lie in memory that is lent.
  const size_t slot = slot_bytes(args);
  if (p.spare && is_vector_aligned(p.spare)) {
    schedule.lent_sums = static_cast<float*>(p.spare);
    schedule.lent_slots = static_cast<int>(std::min<size_t>(schedule.slots, p.spare_bytes / slot));
  }
  schedule.sums = static_cast<float*>(arena.take((schedule.slots - schedule.lent_slots) * slot));
  schedule.progress = static_cast<uint32_t*>(arena.take(sizeof(uint32_t) * (1 + 2 * schedule.slots)));
  if (context.deterministic) {
    schedule.turns = static_cast<uint32_t*>(arena.take(sizeof(uint32_t) * schedule.slots * schedule.turn_count(args)));
  }
  if (!p.d_qkv_bias) return arena.used();
  if (context.deterministic) return std::max(arena.used(), qkv_bias_workspace_bytes(context, p));
  schedule.bias_sums = static_cast<float*>(arena.take(sizeof(float) * kBiasCopies * args.layout.bias_numbers()));
  return arena.used();
}

}  // namespace
}  // namespace hopper

size_t hopper_attention_backward_workspace_bytes(const Context& context, const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  Mask mask_copy;
  hopper::BackwardSchedule schedule;
  hopper::HiddenTiles hidden;
  hopper::TileOrder order;
  return hopper::place(context, p, nullptr, args, mask_copy, schedule, hidden, order);
}

void hopper_attention_backward(Context& context, const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  Mask mask_copy;
  hopper::BackwardSchedule schedule;
  hopper::HiddenTiles hidden;
  hopper::TileOrder order;
  hopper::place(context, p, p.stage_workspace, args, mask_copy, schedule, hidden, order);
  hopper::use_mask_copy(context, mask_copy, args);
  const int tile_queries = hopper::backward_queries(args.head_dim());
  hopper::make_hidden_tiles(context, args, hidden, order, tile_queries);
  hopper::sort_packed_tiles(context, args, order, tile_queries);
  dispatch_16bit(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    make_row_statistics<T, float>(context, args, schedule);
    with_head_dim<64, 128>(args.head_dim(), [&](auto head_dim) {
      hopper::backward<T, decltype(head_dim)::value>(context, args, schedule, hidden, order);
    });
  });
  if (schedule.bias_sums) {
    add_row_groups(context, DType::kFloat32, schedule.bias_sums, hopper::kBiasCopies, args.layout.bias_numbers(),
                   {{p.d_qkv_bias, p.dtype}, {}, {}});
  } else {
    qkv_bias_gradient(context, p);
  }
}

}  // namespace cuda
}  // namespace pfa

#endif
