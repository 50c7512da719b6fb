// The CPU as a device of the blocks: its stages.
#pragma once

#include <cstring>

#include "core/cpu/implementations.h"
#include "core/params.h"

namespace pfa::cpu {

struct Context {
  int threads = 1;
  const Implementation* implementation = &best_implementation();
};

#define PFA_CALL(name, P) \
  inline void name(Context& context, const P& p) { context.implementation->name(context, p); }
PFA_CPU_STAGES(PFA_CALL)
#undef PFA_CALL

inline void store_random_state(Context&, const BlockParams& p) {
  p.random_state[0] = p.seed;
  p.random_state[1] = p.offset;
}
inline void copy(Context&, const void* from, void* to, size_t bytes) {
  if (bytes) std::memcpy(to, from, bytes);
}

inline int64_t activated_columns(const Context&, const FeedForwardParams& p) { return p.hidden_dim; }

inline size_t stage_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase) {
  return context.implementation->attention_workspace_bytes(context, p, phase);
}
inline size_t stage_workspace_bytes(const Context& context, const AttentionBlockParams& p, Phase phase) {
  return context.implementation->attention_block_workspace_bytes(context, p, phase);
}
inline size_t stage_workspace_bytes(const Context& context, const FeedForwardParams& p, Phase phase) {
  return context.implementation->feed_forward_workspace_bytes(context, p, phase);
}
inline size_t stage_workspace_bytes(const Context& context, const ResidualNormParams& p, Phase phase) {
  return context.implementation->residual_norm_workspace_bytes(context, p, phase);
}
inline size_t stage_workspace_bytes(const Context& context, const LinearParams& p, Phase phase) {
  return context.implementation->linear_workspace_bytes(context, p, phase);
}

}  // namespace pfa::cpu
