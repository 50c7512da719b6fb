// Attention, backward: d_q, d_k, d_v from d_out, with the probabilities computed anew from q, k and the saved
// log-sum-exp.
//
// With P the probabilities and R what dropout does to them (0 or drop_scale): d_v = (P R)^T d_out, dP = d_out v^T R,
// dS = P (dP - delta) with delta = sum over head dims of d_out * out, d_q = D^-0.5 dS k, d_k = D^-0.5 dS^T q. The sums
// of these over the tokens are the gradient of the QKV bias.
#include <algorithm>

#include "core/arena.h"
#include "core/cuda/attention/hopper/hopper.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/mma.cuh"
#include "core/cuda/attention/plain.cuh"
#include "core/cuda/rows/column_sums.h"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

constexpr int kRowMultiple = 128;  // per-row statistics are padded to whole tiles of any kernel

constexpr int kRowThreads = 256;

// `lanes` neighbouring threads per row of [B, H, rows_padded]: delta, lse2 and shift2; past seq_len 0, +inf and 0,
// which make probabilities 0. Clears the sums of d_q and of the bias and the counts of progress as well.
template <class T, class Acc>
__global__ void __launch_bounds__(kRowThreads) attention_backward_rows(const AttentionArgs args, const int lanes) {
  const int rows = kRowThreads / lanes;
  const int lane = threadIdx.x % lanes;
  const uint32_t blocks = args.rows_padded / rows;
  const HeadIndex h = head_index(args, blockIdx.x / blocks);
  const int row = blockIdx.x % blocks * rows + threadIdx.x / lanes;
  const int64_t index = h.flat * static_cast<int64_t>(args.rows_padded) + row;
  if (args.bias_sums) {
    static_assert(kBiasCopies * 3 / 4 <= 16, "a thread for each vector: there are at least 16 H D threads");
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    float4* sums = reinterpret_cast<float4*>(args.bias_sums);
    if (thread < kBiasCopies * args.token_stride() / 4) sums[thread] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  Acc delta = 0;
  Acc lse2 = infinity<Acc>();
  Acc shift2 = 0;
  if (row < args.seq_len) {
    const T* out = out_head<T>(args, args.out, h) + row * args.heads_dim();
    const T* d_out = out_head<T>(args, const_cast<void*>(args.d_out), h) + row * args.heads_dim();
    if (args.vectors) {
      constexpr int kVec = kVectorSize<T>;
      for (int d = lane * kVec; d < args.head_dim; d += lanes * kVec) {
        const Vector<T, kVec> a = load_vector<kVec>(out + d);
        const Vector<T, kVec> b = load_vector<kVec>(d_out + d);
#pragma unroll
        for (int e = 0; e < kVec; ++e) delta += widen(a.value[e]) * widen(b.value[e]);
      }
    } else {
      for (int d = lane; d < args.head_dim; d += lanes) delta += widen(out[d]) * widen(d_out[d]);
    }
    const int64_t statistic = h.flat * static_cast<int64_t>(args.seq_len) + row;
    lse2 = static_cast<const Acc*>(args.log_sum_exp)[statistic] * static_cast<Acc>(kLog2e);
    shift2 = static_cast<const Acc*>(args.score_shift)[statistic];
    if (!(fabs(shift2) > static_cast<Acc>(kLargeScore))) {
      lse2 += shift2;
      shift2 = 0;
    }
  }
  for (int other = lanes / 2; other > 0; other /= 2) delta += __shfl_xor_sync(0xFFFFFFFFu, delta, other);
  if (h.flat < static_cast<uint32_t>(args.dq_slots)) {
    float4* sums = reinterpret_cast<float4*>(dq_sums(args, h.flat) + row * args.dq_columns);
    for (int i = lane; i < args.dq_columns / 4; i += lanes) sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row == 0 && lane == 0) {
      if (h.flat == 0) args.progress[0] = 0;
      args.progress[1 + h.flat] = 0;
      args.progress[1 + args.dq_slots + h.flat] = 0;
    }
  }
  if (lane == 0) {
    static_cast<Acc*>(args.delta)[index] = delta;
    static_cast<Acc*>(args.lse2)[index] = lse2;
    static_cast<Acc*>(args.shift2)[index] = shift2;
  }
}

template <class T, class Acc>
void backward_rows(const Context& context, const AttentionArgs& args) {
  int lanes = 2;
  while (lanes < 32 && lanes * 16 < args.head_dim * static_cast<int>(sizeof(T))) lanes *= 2;
  launch(context, "attention_backward_rows", attention_backward_rows<T, Acc>,
         args.batch * args.num_heads * (args.rows_padded / (kRowThreads / lanes)), kRowThreads, 0, args, lanes);
}

template <class T, class Acc>
void backward_plain(const Context& context, const AttentionArgs& args) {
  backward_rows<T, Acc>(context, args);
  with_head_dim<64, 128, 256>(args.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    const int64_t blocks = ceil_div(args.seq_len, plain::Tile<Acc>::kRows) * args.batch * args.num_heads;
    launch(context, "attention_backward_kv_plain", plain::attention_backward_kv_plain<T, Acc, kHeadDim>, blocks,
           plain::kThreads, 0, args);
    launch(context, "attention_backward_q_plain", plain::attention_backward_q_plain<T, Acc, kHeadDim>, blocks,
           plain::kThreads, 0, args);
  });
}

template <class T, int... kHeadDims>
void backward_mma(const Context& context, const AttentionArgs& args) {
  with_head_dim<kHeadDims...>(args.head_dim, [&](auto head_dim) {
    with_bool(args.mask.data || args.drops, [&](auto general) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      constexpr bool kGeneral = decltype(general)::value;
      using Shape = tensor::BackwardShape<T, kHeadDim>;
      const int64_t blocks = ceil_div(args.seq_len, Shape::kOuter) * args.batch * args.num_heads;
      const auto run = [&](const char* name, void (*kernel)(AttentionArgs)) {
        launch(context, name, kernel, blocks, tensor::kThreads, Shape::kSharedBytes, args);
      };
      if constexpr (Shape::kSplit) {
        run("attention_backward_kv_mma", tensor::attention_backward_kv_mma<T, kHeadDim, kGeneral, true, false>);
        run("attention_backward_kv_mma", tensor::attention_backward_kv_mma<T, kHeadDim, kGeneral, false, true>);
      } else {
        run("attention_backward_kv_mma", tensor::attention_backward_kv_mma<T, kHeadDim, kGeneral, true, true>);
      }
      run("attention_backward_q_mma", tensor::attention_backward_q_mma<T, kHeadDim, kGeneral>);
    });
  });
}

template <class T>
void backward_16bit(const Context& context, const AttentionArgs& args, DType dtype) {
  if (!tensor_cores_serve(context)) return backward_plain<T, float>(context, args);
  backward_rows<T, float>(context, args);
  if (args.dq_slots) {
    attention_backward_hopper(context, args, dtype);
  } else {
    backward_mma<T, 64, 96, 128, 192, 256>(context, args);
  }
}

// Places the stage's memory from `memory` on, null to learn its size, which it returns.
size_t place_workspace(const Context& context, const Params& p, char* memory, AttentionArgs& args) {
  args.rows_padded = static_cast<int>(ceil_div(args.seq_len, kRowMultiple) * kRowMultiple);
  const bool hopper = hopper_serves(context, args, p.dtype) && !context.deterministic;
  if (hopper) attention_backward_hopper_plan(context, args);
  Arena arena(memory);
  const size_t statistics = args.batch * args.num_heads * args.rows_padded * size_of(accumulator_of(p.dtype));
  args.delta = arena.take(statistics);
  args.lse2 = arena.take(statistics);
  args.shift2 = arena.take(statistics);
  if (hopper) {
    // The first sums lie in d_qkv_weight, which is written after this stage only.
    const size_t slot = sizeof(float) * args.rows_padded * args.dq_columns;
    if (p.d_qkv_weight && reinterpret_cast<uintptr_t>(p.d_qkv_weight) % 16 == 0) {
      const size_t lent = 3 * p.heads_dim() * p.embed_dim * size_of(p.dtype);
      args.dq_lent_sum = static_cast<float*>(p.d_qkv_weight);
      args.dq_lent_slots = static_cast<int>(std::min<size_t>(args.dq_slots, lent / slot));
    }
    args.dq_sum = static_cast<float*>(arena.take((args.dq_slots - args.dq_lent_slots) * slot));
    args.progress = static_cast<uint32_t*>(arena.take(sizeof(uint32_t) * (1 + 2 * args.dq_slots)));
    if (p.d_qkv_bias)
      args.bias_sums = static_cast<float*>(arena.take(sizeof(float) * kBiasCopies * args.token_stride()));
  }
  return arena.used();
}

void run_backward(const Context& context, const AttentionArgs& args, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return backward_16bit<__half>(context, args, dtype);
    case DType::kBFloat16:
      return backward_16bit<__nv_bfloat16>(context, args, dtype);
    case DType::kFloat64:
      return backward_plain<double, double>(context, args);
    default:
      if (!tensor::tf32_serves(context, args)) return backward_plain<float, float>(context, args);
      backward_rows<float, float>(context, args);
      return backward_mma<float, 64, 128>(context, args);
  }
}

}  // namespace

size_t attention_backward_workspace_bytes(const Context& context, const Params& p) {
  if (p.rows() == 0) return 0;
  AttentionArgs args = attention_args(p);
  const size_t bytes = place_workspace(context, p, nullptr, args);
  // Addresses that are not known yet may rule out the kernels that sum the bias.
  return !p.d_qkv_bias ? bytes
                       : std::max(bytes, column_sums_workspace_bytes(context, p.dtype, p.rows(), 3 * p.heads_dim()));
}

void attention_backward(Context& context, const Params& p) {
  AttentionArgs args = attention_args(p);
  if (p.rows() > 0) {
    place_workspace(context, p, static_cast<char*>(p.stage_workspace), args);
    run_backward(context, args, p.dtype);
  }
  if (!p.d_qkv_bias) return;
  if (args.bias_sums) {
    add_row_blocks(context, DType::kFloat32, args.bias_sums, kBiasCopies, 3 * p.heads_dim(),
                   {{p.d_qkv_bias, p.dtype}, {}, {}});
  } else {
    column_sums(context, p.dtype, p.d_qkv, p.rows(), 3 * p.heads_dim(), p.d_qkv_bias, p.stage_workspace);
  }
}

}  // namespace cuda
}  // namespace pfa
