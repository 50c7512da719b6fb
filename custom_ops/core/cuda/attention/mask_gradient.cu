// The gradient of a float mask: the last part of attention_backward, beside any family of kernels.
#include <algorithm>

#include "core/arena.h"
#include "core/cuda/attention/mask_gradient.cuh"
#include "core/cuda/attention/passes.h"
#include "core/cuda/attention/row_statistics.cuh"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 2;  // that there are at least, if the work can be shared out

mask_units::Plan plan_of(const Context& context, const AttentionParams& p) {
  const int tile = p.dtype == DType::kFloat64 ? plain::Tile<double>::kRows : plain::Tile<float>::kRows;
  const int64_t* strides = p.mask.strides;
  mask_units::Plan plan{};
  plan.batches = strides[0] ? p.batch : 1;
  plan.heads = strides[1] ? p.num_heads : 1;
  plan.query_tiles = strides[2] ? ceil_div(p.queries, tile) : 1;
  plan.key_tiles = strides[3] ? ceil_div(p.keys, tile) : 1;
  plan.rows = strides[2] ? tile : 1;
  plan.columns = strides[3] ? tile : 1;
  plan.walk_batches = strides[0] ? 1 : p.batch;
  plan.walk_heads = strides[1] ? 1 : p.num_heads;
  plan.walk_tiles = strides[2] ? 1 : ceil_div(p.queries, tile);
  const int64_t wanted = plan.units() ? ceil_div(kBlocksPerMultiprocessor * int64_t{context.num_sms}, plan.units()) : 1;
  plan.parts = std::max<int64_t>(1, std::min(wanted, plan.walk()));
  plan.d_mask = p.d_mask;
  return plan;
}

// Places the pass's memory from `memory` on, null to learn its size, which it returns.
size_t place(const AttentionParams& p, void* memory, BackwardArgs& args, mask_units::Plan& plan) {
  Arena arena(memory);
  place_row_statistics(arena, p, args);
  if (plan.parts > 1) {
    plan.partial_sums = static_cast<double*>(arena.take(sizeof(double) * plan.parts * plan.units() * plan.elements()));
  }
  return arena.used();
}

}  // namespace

size_t mask_gradient_workspace_bytes(const Context& context, const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  mask_units::Plan plan = plan_of(context, p);
  return place(p, nullptr, args, plan);
}

void mask_gradient(Context& context, const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  mask_units::Plan plan = plan_of(context, p);
  place(p, p.stage_workspace, args, plan);
  dispatch_float(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Acc = Accumulator<T>;
    make_row_statistics<T, Acc>(context, args);
    launch(context, "attention_mask_gradient", mask_units::attention_mask_gradient<T, Acc>, plan.units() * plan.parts,
           mask_units::kThreads, 0, args, plan);
  });
  if (plan.parts > 1) {
    launch(context, "attention_mask_gradient_sum", mask_units::attention_mask_gradient_sum,
           ceil_div(plan.units() * plan.elements(), mask_units::kThreads), mask_units::kThreads, 0, args, plan);
  }
}

}  // namespace cuda
}  // namespace pfa
