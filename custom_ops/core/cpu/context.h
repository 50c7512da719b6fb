// The CPU as a device of the block: its stages, and what they need from outside.
#pragma once

#include <stdexcept>

#include "core/cpu/kernels.h"
#include "core/params.h"

namespace pfa::cpu {

// c [m, n] = op(a) @ op(b) + beta * c, row-major, op the transposition where asked for. When beta is 0, c may hold anything.
template <class T>
using Gemm = void (*)(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                      int64_t ldb, T beta, T* c, int64_t ldc);
// The same with a and b the bits of bfloat16 numbers, and sums in float32.
using BFloat16Gemm = void (*)(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda,
                              const uint16_t* b, int64_t ldb, float beta, float* c, int64_t ldc);

struct Context {
  Gemm<float> sgemm = nullptr;
  Gemm<double> dgemm = nullptr;
  BFloat16Gemm bgemm = nullptr;  // null: operands are widened for sgemm
  int threads = 1;
  const Kernels* kernels = &best_kernels();
};

inline void layer_norm_forward(Context& context, const Params& p) { context.kernels->layer_norm_forward(context, p); }
inline void layer_norm_backward(Context& context, const Params& p) { context.kernels->layer_norm_backward(context, p); }
inline void narrow_x(Context&, const Params&) {
  throw std::logic_error("x and weights of different types are not implemented");
}
inline void qkv_linear_forward(Context& context, const Params& p) { context.kernels->qkv_linear_forward(context, p); }
inline void qkv_linear_backward(Context& context, const Params& p) { context.kernels->qkv_linear_backward(context, p); }
inline void attention_forward(Context& context, const Params& p) { context.kernels->attention_forward(context, p); }
inline void attention_backward(Context& context, const Params& p) { context.kernels->attention_backward(context, p); }
inline void output_linear_forward(Context& context, const Params& p) { context.kernels->output_linear_forward(context, p); }
inline void output_linear_backward(Context& context, const Params& p) { context.kernels->output_linear_backward(context, p); }
inline void residual_forward(Context& context, const Params& p) { context.kernels->residual_forward(context, p); }
inline void residual_backward(Context& context, const Params& p) { context.kernels->residual_backward(context, p); }
inline size_t stage_workspace_bytes(const Context& context, const Params& p, Phase phase) {
  return context.kernels->stage_workspace_bytes(context, p, phase);
}

}  // namespace pfa::cpu
