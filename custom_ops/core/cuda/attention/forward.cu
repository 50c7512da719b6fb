// Attention, forward: softmax(q k^T * scale + mask) v of every head, in tiles, with an online softmax. The stage, and
// the launches of the plain kernels.
#include "core/cuda/attention/implementations.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/mma_passes.h"
#include "core/cuda/attention/passes.h"
#include "core/cuda/attention/plain.cuh"
#include "core/cuda/stages.h"
#include "core/rounding_residue.h"

namespace pfa {
namespace cuda {

bool mma_is_built(const Context& context) { return mma::is_built<__half>(context); }

void mma_attention_forward(Context& context, const AttentionParams& p) {
  const ForwardArgs args = forward_args(p);
  if (p.dtype == DType::kFloat32) return mma::forward<float, 64, 128>(context, args);
  dispatch_16bit(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    mma::forward<T, 64, 96, 128, 192, 256>(context, args);
  });
}

// Kernels that do not keep what rounding took say nothing of it.
void clear_out_residue(Context& context, const AttentionParams& p) {
  if (!p.out_residue) return;
  const size_t bytes = p.queries_in_all() * p.num_heads * residue_words(p.head_dim) * sizeof(uint32_t);
  check(cudaMemsetAsync(p.out_residue, kNeutralResidues, bytes, context.stream), "clear_out_residue: cudaMemsetAsync");
}

void plain_attention_forward(Context& context, const AttentionParams& p) {
  const ForwardArgs args = forward_args(p);
  clear_out_residue(context, p);
  dispatch_float(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Acc = Accumulator<T>;
    with_head_dim<64, 128, 256>(args.head_dim(), [&](auto head_dim) {
      with_bool(args.is_packed_or_grouped() || args.hidden_ranges.data, [&](auto general) {
        launch(context, "attention_forward_plain",
               plain::attention_forward_plain<T, Acc, decltype(head_dim)::value, decltype(general)::value>,
               ceil_div(args.visibility.queries, plain::Tile<Acc>::kRows) * args.heads(), plain::kThreads, 0, args);
      });
    });
  });
}

size_t attention_forward_workspace_bytes(const Context& context, const AttentionParams& p) {
  return most_workspace(context, p, Pass::kForward);
}

void attention_forward(Context& context, const AttentionParams& p) {
  if (p.batch * p.num_heads * p.queries > 0) attention_implementation(context, p, Pass::kForward).forward(context, p);
}

}  // namespace cuda
}  // namespace pfa
