// The ways to compute attention on a GPU, and which one a call takes: the first of the list that serves it.
#pragma once

#include <algorithm>
#include <cstddef>

#include "core/cuda/context.h"
#include "core/params.h"

namespace pfa {
namespace cuda {

enum class Pass { kForward, kBackward };

struct AttentionImplementation {
  const char* name;
  // Why it does not serve a call; null if it does. A pointer that is not placed yet is null, and will be aligned.
  const char* (*why_not)(const Context& context, const AttentionParams& p, Pass pass);
  // The sizes of the workspaces. They may be asked before pointers are placed (stages.md).
  size_t (*forward_workspace_bytes)(const Context& context, const AttentionParams& p);
  void (*forward)(Context& context, const AttentionParams& p);
  size_t (*backward_workspace_bytes)(const Context& context, const AttentionParams& p);
  // d_query, d_key, d_value and d_qkv_bias, where they are wanted.
  void (*backward)(Context& context, const AttentionParams& p);
};

// One query, forward, on compute capability 8.0 and later (one_query.cu).
extern const AttentionImplementation kOneQueryAttention;
// Tensor maps, the copy engine and warpgroup products of compute capability 9.0 (hopper/).
extern const AttentionImplementation kHopperAttention;
// mma.sync of compute capability 8.0 and later (mma.cuh).
extern const AttentionImplementation kMmaAttention;
// Any device and float dtype (plain.cuh).
extern const AttentionImplementation kPlainAttention;

// Fastest first; the last serves whatever the block accepts.
constexpr const AttentionImplementation* kAttentionImplementations[] = {&kOneQueryAttention, &kHopperAttention,
                                                                        &kMmaAttention, &kPlainAttention};

inline const AttentionImplementation& attention_implementation(const Context& context, const AttentionParams& p,
                                                               Pass pass) {
  for (const AttentionImplementation* implementation : kAttentionImplementations) {
    if (!implementation->why_not(context, p, pass)) return *implementation;
  }
  return kPlainAttention;
}

// What the pass may need. Addresses that are not known yet may rule out the first that serves: each that comes after it
// must find room too.
inline size_t most_workspace(const Context& context, const AttentionParams& p, Pass pass) {
  size_t bytes = 0;
  for (const AttentionImplementation* implementation : kAttentionImplementations) {
    if (implementation->why_not(context, p, pass)) continue;
    const auto of =
        pass == Pass::kForward ? implementation->forward_workspace_bytes : implementation->backward_workspace_bytes;
    bytes = std::max(bytes, of(context, p));
  }
  return bytes;
}

}  // namespace cuda
}  // namespace pfa
