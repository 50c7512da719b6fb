// The workspace that the stages share.
#include "core/cuda/stages.h"

#include <algorithm>

namespace pfa {
namespace cuda {

size_t stage_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase) {
  const size_t linear = linear_workspace_bytes(context, p, phase);
  switch (phase) {
    case Phase::kOutputBackward:
      return std::max(linear, residual_backward_workspace_bytes(context, p));
    case Phase::kAttentionBackward:
      return attention_backward_workspace_bytes(context, p);
    case Phase::kInputBackward:
      return std::max(linear, layer_norm_backward_workspace_bytes(context, p));
    default:
      return linear;
  }
}

}  // namespace cuda
}  // namespace pfa
