// The weights that attention gave to its values, for those who ask for them: computed again from the queries, the keys
// and what the forward pass of attention saved.
#pragma once

#include "core/bare_attention.h"

namespace pfa {

// As the attention was, but for the values, `out` and its gradient: these are the weights, [batch, H, queries, keys].
// Neither packed sequences nor tensors that query and key share.
struct AttentionWeightsParams : BareAttentionParams {
  const void* statistics = nullptr;  // what run_forward of the attention saved
};

// The attention of the struct's tensors.
inline AttentionParams with_tensors(const AttentionWeightsParams& p) {
  BareAttentionParams bare = p;
  bare.out = nullptr;
  bare.d_out = nullptr;
  AttentionParams a = with_tensors(bare);
  place_saved(a, const_cast<void*>(p.statistics));
  a.weights = p.out;
  a.d_weights = p.d_out;
  a.of_weights = true;
  return a;
}

inline size_t saved_bytes(const AttentionWeightsParams&) { return 0; }

template <class Context>
size_t forward_workspace_bytes(const Context& context, const AttentionWeightsParams& p, bool) {
  return stage_workspace_bytes(context, with_tensors(p), Phase::kForward);
}

// Writes p.out.
template <class Context>
void run_forward(Context& context, const AttentionWeightsParams& p, void*, void* workspace) {
  AttentionParams a = with_tensors(p);
  a.stage_workspace = workspace;
  attention_weights(context, a);
}

template <class Context>
size_t backward_workspace_bytes(const Context& context, const AttentionWeightsParams& p) {
  return stage_workspace_bytes(context, with_tensors(p), Phase::kAttentionBackward);
}

// Writes the gradients that are asked for; reads p.out.
template <class Context>
void run_backward(Context& context, const AttentionWeightsParams& p, const void*, void* workspace) {
  AttentionParams a = with_tensors(p);
  a.stage_workspace = workspace;
  attention_backward(context, a);
}

}  // namespace pfa
