// The workspace that the stages share.
#include "core/cuda/stages.h"

#include <algorithm>

namespace pfa {
namespace cuda {

size_t stage_workspace_bytes(const Context& context, const Params& p, bool backward) {
  return std::max({layer_norm_workspace_bytes(context, p, backward), linear_workspace_bytes(context, p, backward),
                   attention_workspace_bytes(context, p, backward), residual_workspace_bytes(context, p, backward)});
}

}  // namespace cuda
}  // namespace pfa
