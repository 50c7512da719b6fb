// The workspace that the stages share, and what only moves numbers.
#include "core/cuda/stages.h"

#include <algorithm>

#include "core/attention_block.h"

namespace pfa {
namespace cuda {
namespace {

// Of the stages before and after what is a block's own.
size_t common_workspace_bytes(const Context& context, const BlockParams& p, Phase phase) {
  switch (phase) {
    case Phase::kOutputBackward:
      return residual_backward_workspace_bytes(context, p);
    case Phase::kInputBackward:
      return layer_norm_backward_workspace_bytes(context, p);
    default:
      return 0;
  }
}

}  // namespace

void copy(Context& context, const void* from, void* to, size_t bytes) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, context.stream), "copy: cudaMemcpyAsync");
}

size_t stage_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase) {
  return phase == Phase::kAttentionBackward ? attention_backward_workspace_bytes(context, p)
                                            : attention_forward_workspace_bytes(context, p);
}

size_t stage_workspace_bytes(const Context& context, const AttentionBlockParams& p, Phase phase) {
  if (phase == Phase::kAttentionBackward) return attention_backward_workspace_bytes(context, attention_of(p));
  const size_t attention = phase == Phase::kForward ? attention_forward_workspace_bytes(context, attention_of(p)) : 0;
  return std::max({linear_workspace_bytes(context, p, phase), common_workspace_bytes(context, p, phase), attention});
}

size_t stage_workspace_bytes(const Context& context, const FeedForwardParams& p, Phase phase) {
  return std::max(linear_workspace_bytes(context, p, phase), common_workspace_bytes(context, p, phase));
}

size_t stage_workspace_bytes(const Context& context, const ResidualNormParams& p, Phase phase) {
  return common_workspace_bytes(context, p, phase);
}

size_t stage_workspace_bytes(const Context& context, const LinearParams& p, Phase phase) {
  return linear_workspace_bytes(context, p, phase);
}

}  // namespace cuda
}  // namespace pfa
