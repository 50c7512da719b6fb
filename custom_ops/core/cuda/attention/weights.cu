// The weights of the values, w = dropout(softmax(scale * q k^T + mask)), from the scores computed again and what
// forward saved; and d_q and d_k from their gradient. A thread block of 16 x 16 has a square tile of weights, as in
// plain.cuh, whose kernels also make the gradients. Tensor cores would help less than elsewhere, as all weights are
// written to memory.
#include "core/arena.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/passes.h"
#include "core/cuda/attention/plain.cuh"
#include "core/cuda/attention/row_statistics.cuh"
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

// weights [B, H, queries, keys]: a tile of queries and keys of a head.
template <class T, class Acc>
__global__ void __launch_bounds__(plain::kThreads) attention_weights_plain(const BackwardArgs args, T* weights) {
  using Shape = plain::Tile<Acc>;
  constexpr int kN = Shape::kPerThread;
  __shared__ Shape tile;
  const int queries = args.visibility.queries;
  const int keys = args.visibility.keys;
  const int key_tiles = (keys + Shape::kRows - 1) / Shape::kRows;
  const int query_tiles = (queries + Shape::kRows - 1) / Shape::kRows;
  const int col0 = static_cast<int>(blockIdx.x % key_tiles) * Shape::kRows;
  const int row0 = static_cast<int>(blockIdx.x / key_tiles % query_tiles) * Shape::kRows;
  const Head<T> head = head_of<T, true>(args, blockIdx.x / key_tiles / query_tiles, args.drops);
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
  weights += head.index.flat * queries * int64_t{keys};

  const Range<int> seen = head.visibility.keys_of(row0, row0 + Shape::kRows);
  const Hidden hidden = plain::hidden_of<Acc, true>(head, row0, col0);
  const bool sees_any = hidden != Hidden::kAll && col0 < seen.end && col0 + Shape::kRows > seen.first;
  plain::Square<Acc> s = {};
  if (sees_any) {
    plain::dot_rows<T, Acc>(tile, s, {head.q, row0, queries}, {head.k, col0, keys}, args.head_dim());
  }
#pragma unroll
  for (int r = 0; r < kN; ++r) {
    const int i = row0 + ty + 16 * r;
    if (i >= queries) break;
    const auto normaliser = row_normaliser<Acc>(args, args.layout.statistics(head.index) + i);
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      const int j = col0 + tx + 16 * c;
      if (j >= keys) break;
      Acc weight = 0;
      if (sees_any && plain::keeps(args, head, i, j)) {
        const Acc score = plain::score_log2<Acc, true>(args, head, hidden, s[r][c], i, j);
        weight = exp2_of(min(score - normaliser.shift2 - normaliser.lse2, Acc(0))) * static_cast<Acc>(args.drop_scale);
      }
      weights[i * int64_t{keys} + j] = narrow<T>(weight);
    }
  }
}

template <class T, class Acc, int kHeadDim>
void backward(const Context& context, const BackwardArgs& args) {
  const auto run = [&](const char* name, void (*kernel)(BackwardArgs), int rows, int64_t heads) {
    launch(context, name, kernel, ceil_div(rows, plain::Tile<Acc>::kRows) * heads, plain::kThreads, 0, args);
  };
  if (args.d_key.data) {
    run("attention_backward_kv_plain", plain::attention_backward_kv_plain<T, Acc, kHeadDim, true, true>,
        args.visibility.keys, args.kv_heads());
  }
  if (args.d_query.data) {
    run("attention_backward_q_plain", plain::attention_backward_q_plain<T, Acc, kHeadDim, true, true>,
        args.visibility.queries, args.heads());
  }
}

}  // namespace

void attention_weights(Context& context, const AttentionParams& p) {
  const BackwardArgs args = backward_args(p);
  dispatch_float(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Acc = Accumulator<T>;
    constexpr int kRows = plain::Tile<Acc>::kRows;
    launch(context, "attention_weights_plain", attention_weights_plain<T, Acc>,
           args.heads() * ceil_div(p.queries, kRows) * ceil_div(p.keys, kRows), plain::kThreads, 0, args,
           static_cast<T*>(p.weights));
  });
}

void weights_attention_backward(Context& context, const AttentionParams& p) {
  BackwardArgs args = backward_args(p);
  Arena arena(p.stage_workspace);
  place_row_statistics(arena, p, args);
  dispatch_float(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Acc = Accumulator<T>;
    make_row_statistics<T, Acc>(context, args);
    with_head_dim<64, 128, 256>(args.head_dim(),
                                [&](auto head_dim) { backward<T, Acc, decltype(head_dim)::value>(context, args); });
  });
}

}  // namespace cuda
}  // namespace pfa
