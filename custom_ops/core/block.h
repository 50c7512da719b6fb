// The attention block, forward and backward, as a sequence of stages (DESIGN.md, section 2):
//
//   [layer norm] -> QKV projection -> attention -> output projection -> bias + dropout + residual [+ layer norm]
//
// A device is a Context type; its stages are functions found in the Context's namespace, each taking (Context&, const
// Params&): layer_norm_*, qkv_linear_*, attention_*, output_linear_*, residual_* with * = forward, backward, narrow_x, and
// stage_workspace_bytes(const Context&, const Params&, Phase), the most that any one stage of the phase needs.
//
// Where residual_dtype is wider than dtype (has_wide_residual), stages read and write two types, never both in one place:
//
//   layer_norm_forward      x (residual_dtype) -> hidden (dtype)
//   narrow_x                x (residual_dtype) -> hidden (dtype), x rounded; only here, in place of layer_norm_forward
//   output_linear_forward   attn_out, linear_weight (dtype) -> residual (residual_dtype), not rounded in between
//   residual_forward        residual, x (residual_dtype), linear_bias (dtype) -> residual, out (residual_dtype)
//   residual_backward       d_out, residual (residual_dtype) -> d_residual (residual_dtype, null where not needed), d_linear (dtype; also
//                           without dropout and without layer norm), d_linear_bias (dtype)
//   qkv_linear_backward     d_qkv, qkv_weight, hidden (dtype) -> d_qkv_weight, d_qkv_bias, d_hidden (dtype); without pre_layer_norm
//                           d_x (residual_dtype), with d_residual (residual_dtype) added, not rounded in between
//   layer_norm_backward     d_hidden (dtype), x, d_residual (residual_dtype) -> d_x (residual_dtype)
//
// Memory is planned by walking an Arena twice: once from null to learn the size, once over the memory to place pointers.
#pragma once

#include <algorithm>

#include "core/params.h"

namespace pfa {

class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  void* take(size_t bytes) {
    void* result = base_ ? base_ + used_ : nullptr;
    used_ += aligned(bytes);
    return result;
  }

  size_t used() const { return used_; }

  // What a piece of `bytes` uses.
  static size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  static constexpr size_t kAlignment = 256;
  char* base_;
  size_t used_ = 0;
};

// Places what backward reads again: O(B*S*E + B*H*S) numbers. The layer-normalised x is not among them: it is computed anew.
inline void plan_saved(Params& p, Arena& arena) {
  const size_t rows = p.rows();
  const size_t element = size_of(p.dtype);
  const size_t residual_element = size_of(p.residual_dtype);
  const size_t statistic = size_of(accumulator_of(p.dtype));
  p.random_state = static_cast<uint64_t*>(arena.take(2 * sizeof(uint64_t)));
  p.pre_ln_mean = p.pre_layer_norm ? arena.take(rows * statistic) : nullptr;
  p.pre_ln_rstd = p.pre_layer_norm ? arena.take(rows * statistic) : nullptr;
  p.qkv = arena.take(rows * 3 * p.heads_dim() * element);
  p.log_sum_exp = arena.take(rows * p.num_heads * statistic);
  p.score_shift = arena.take(rows * p.num_heads * statistic);
  p.attn_out = arena.take(rows * p.heads_dim() * element);
  p.residual = p.final_layer_norm ? arena.take(rows * p.embed_dim * residual_element) : nullptr;
  p.ln_mean = p.final_layer_norm && !has_output_dropout(p) ? arena.take(rows * statistic) : nullptr;
  p.ln_rstd = p.final_layer_norm ? arena.take(rows * statistic) : nullptr;
}

inline size_t saved_bytes(Params p) {
  Arena arena;
  plan_saved(p, arena);
  return arena.used();
}

// Places what the forward pass needs and forgets. Without `saves` that includes what plan_saved places: the output projection
// then goes to `out` itself and the final layer norm runs there, and its statistics are not kept.
template <class Context>
void plan_forward(const Context& context, Params& p, Arena& arena, bool saves) {
  const size_t rows = p.rows();
  const size_t element = size_of(p.dtype);
  p.hidden = has_own_hidden(p) ? arena.take(rows * p.embed_dim * element) : const_cast<void*>(p.x);
  if (!saves) {
    p.random_state = static_cast<uint64_t*>(arena.take(2 * sizeof(uint64_t)));
    p.qkv = arena.take(rows * 3 * p.heads_dim() * element);
    p.attn_out = arena.take(rows * p.heads_dim() * element);
    p.pre_ln_mean = p.pre_ln_rstd = p.log_sum_exp = p.score_shift = p.ln_mean = p.ln_rstd = p.residual = nullptr;
  }
  if (!p.residual) p.residual = p.out;
  p.stage_workspace = arena.take(stage_workspace_bytes(context, p, Phase::kForward));
}

template <class Context>
size_t forward_workspace_bytes(const Context& context, Params p, bool saves) {
  Arena arena;
  plan_forward(context, p, arena, saves);
  return arena.used();
}

template <class Context>
void make_hidden(Context& context, const Params& p) {
  if (p.pre_layer_norm) {
    layer_norm_forward(context, p);
  } else if (has_wide_residual(p)) {
    narrow_x(context, p);
  }
}

template <class Context>
void block_forward(Context& context, const Params& p) {
  make_hidden(context, p);
  qkv_linear_forward(context, p);
  attention_forward(context, p);
  output_linear_forward(context, p);
  residual_forward(context, p);
}

// Places what the backward pass needs and forgets; p holds the plan of plan_saved and the gradients that are asked for.
//
// Memory is shared by what lives at different times. d_linear, and the workspace of the stages that make and read it, end before d_qkv
// begins. d_attn_out, hidden and d_hidden follow each other in one place; that is d_x itself, where the last of them becomes d_x, unless
// d_residual waits there, or the last of them is d_hidden and narrower than d_x. So layer_norm_backward and qkv_linear_backward find what
// they read where they write, in numbers of one type. Where only d_attn_out has been there, the workspace of qkv_linear_backward follows it.
template <class Context>
void plan_backward(const Context& context, Params& p, Arena& arena) {
  const size_t row_bytes = p.rows() * size_of(p.dtype);
  const size_t activation = row_bytes * p.embed_dim;
  const size_t residual = p.rows() * p.embed_dim * size_of(p.residual_dtype);
  const bool needs_d_residual = p.d_x || (needs_d_linear(p) && !has_own_d_linear(p));
  p.d_residual = !p.final_layer_norm ? const_cast<void*>(p.d_out)
                 : !needs_d_residual ? nullptr
                 : p.d_x             ? p.d_x
                                     : arena.take(residual);

  const size_t d_qkv_bytes = needs_d_qkv(p) ? row_bytes * 3 * p.heads_dim() : 0;
  const size_t d_linear_bytes = needs_d_linear(p) && has_own_d_linear(p) ? activation : 0;
  const size_t output_workspace = stage_workspace_bytes(context, p, Phase::kOutputBackward);
  p.d_qkv = arena.take(std::max(d_qkv_bytes, Arena::aligned(d_linear_bytes) + output_workspace));
  Arena before_d_qkv(p.d_qkv);
  void* d_linear = before_d_qkv.take(d_linear_bytes);
  p.d_linear = !needs_d_linear(p) ? nullptr : has_own_d_linear(p) ? d_linear : p.d_residual;
  p.output_workspace = before_d_qkv.take(output_workspace);
  if (!needs_d_qkv(p)) {
    p.d_qkv = p.d_attn_out = p.hidden = p.d_hidden = p.stage_workspace = p.input_workspace = nullptr;
    return;
  }

  const size_t attention_workspace = stage_workspace_bytes(context, p, Phase::kAttentionBackward);
  const size_t input_workspace = stage_workspace_bytes(context, p, Phase::kInputBackward);
  const bool in_d_x =
      p.d_x && !p.final_layer_norm && row_bytes * p.heads_dim() <= residual && !(p.pre_layer_norm && has_wide_residual(p));
  const bool is_free_again = !in_d_x && !has_own_hidden(p);
  const size_t later = has_own_hidden(p) ? activation : is_free_again ? input_workspace : 0;
  void* shared = in_d_x ? p.d_x : arena.take(std::max(row_bytes * p.heads_dim(), later));
  p.d_attn_out = shared;
  p.hidden = !has_own_hidden(p) ? const_cast<void*>(p.x) : p.d_qkv_weight ? shared : nullptr;
  p.d_hidden = p.pre_layer_norm && needs_d_hidden(p) ? shared : nullptr;
  p.stage_workspace = arena.take(std::max(attention_workspace, is_free_again ? 0 : input_workspace));
  p.input_workspace = is_free_again ? shared : p.stage_workspace;
}

template <class Context>
size_t backward_workspace_bytes(const Context& context, Params p) {
  Arena arena;
  plan_backward(context, p, arena);
  return arena.used();
}

inline Params with_workspace(Params p, void* workspace) {
  p.stage_workspace = workspace;
  return p;
}

template <class Context>
void block_backward(Context& context, const Params& p) {
  const Params output = with_workspace(p, p.output_workspace);
  if (p.final_layer_norm || needs_d_linear(p)) residual_backward(context, output);
  if (needs_d_linear(p)) output_linear_backward(context, output);
  if (needs_d_qkv(p)) {
    attention_backward(context, p);
    const Params input = with_workspace(p, p.input_workspace);
    if (p.d_qkv_weight) make_hidden(context, input);
    qkv_linear_backward(context, input);
    if (p.d_hidden) layer_norm_backward(context, input);
  }
}

}  // namespace pfa
