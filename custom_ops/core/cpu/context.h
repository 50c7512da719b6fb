// The CPU as a device of the block: its stages.
#pragma once

#include "core/cpu/implementations.h"
#include "core/params.h"

namespace pfa::cpu {

struct Context {
  int threads = 1;
  const Implementation* implementation = &best_implementation();
};

inline void layer_norm_forward(Context& context, const AttentionParams& p) {
  context.implementation->layer_norm_forward(context, p);
}
inline void layer_norm_backward(Context& context, const AttentionParams& p) {
  context.implementation->layer_norm_backward(context, p);
}
inline void narrow_x(Context& context, const AttentionParams& p) { context.implementation->narrow_x(context, p); }
inline void qkv_linear_forward(Context& context, const AttentionParams& p) {
  context.implementation->qkv_linear_forward(context, p);
}
inline void qkv_linear_backward(Context& context, const AttentionParams& p) {
  context.implementation->qkv_linear_backward(context, p);
}
inline void attention_forward(Context& context, const AttentionParams& p) {
  context.implementation->attention_forward(context, p);
}
inline void attention_backward(Context& context, const AttentionParams& p) {
  context.implementation->attention_backward(context, p);
}
inline void output_linear_forward(Context& context, const AttentionParams& p) {
  context.implementation->output_linear_forward(context, p);
}
inline void output_linear_backward(Context& context, const AttentionParams& p) {
  context.implementation->output_linear_backward(context, p);
}
inline void residual_forward(Context& context, const AttentionParams& p) {
  context.implementation->residual_forward(context, p);
}
inline void residual_backward(Context& context, const AttentionParams& p) {
  context.implementation->residual_backward(context, p);
}
inline size_t stage_workspace_bytes(const Context& context, const AttentionParams& p, Phase phase) {
  return context.implementation->stage_workspace_bytes(context, p, phase);
}

}  // namespace pfa::cpu
