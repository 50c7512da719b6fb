// Backward's first kernel: the row statistics that the kernels after it read (BackwardArgs), and zeros for the sums
// that they add to.
#pragma once

#include "core/cuda/attention/fragments.cuh"
#include "core/cuda/attention/heads.cuh"
#include "core/cuda/attention/hopper/schedule.h"
#include "core/cuda/attention/hopper/tile_order.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/residue.cuh"
#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {

constexpr int kStatisticsThreads = 256;
constexpr int kStatisticsVectors = 2;  // of a row, that a thread has on their way at once

// The rows of a sequence's statistics.
inline int padded_rows(int queries) {
  return static_cast<int>(ceil_div(queries, kStatisticsMultiple) * kStatisticsMultiple);
}

// log_sum_exp and score_shift of a query in units of log2, as BackwardArgs has them.
template <class Acc>
struct RowNormaliser {
  Acc lse2;
  Acc shift2;
};

// Of the query whose numbers lie at `statistic`.
template <class Acc>
__device__ __forceinline__ RowNormaliser<Acc> row_normaliser(const BackwardArgs& args, int64_t statistic) {
  const Acc lse2 = static_cast<const Acc*>(args.log_sum_exp)[statistic] * static_cast<Acc>(kLog2e);
  const Acc shift2 = static_cast<const Acc*>(args.score_shift)[statistic];
  if (fabs(shift2) > static_cast<Acc>(kLargeScore)) return {lse2, shift2};
  return {lse2 + shift2, 0};
}

// `lanes` neighbouring threads make the statistics of one row, and its zeros.
template <class T, class Acc, bool kPacked>
__global__ void __launch_bounds__(kStatisticsThreads)
    attention_row_statistics(const BackwardArgs args, const hopper::BackwardSchedule schedule, const int lanes) {
  const int rows = kStatisticsThreads / lanes;
  const int lane = threadIdx.x % lanes;
  const uint32_t groups = args.rows_padded / rows;  // of rows, in a head
  const uint32_t head = blockIdx.x / groups;
  const int of_head = blockIdx.x % groups * rows + threadIdx.x / lanes;
  const int64_t index = static_cast<int64_t>(head) * args.rows_padded + of_head;
  const hopper::SequenceTile tile =
      hopper::sequence_tile<kPacked>(args, args.layout.query_starts, head, of_head / kStatisticsMultiple);
  const HeadIndex h = args.layout.head(tile.head);
  const int row = tile.first + of_head % kStatisticsMultiple;
  const int queries = visibility_of_sequence<kPacked>(args, h.batch).queries;
  hopper::clear_counts(args, schedule);
  if (kPacked && tile.first >= queries) return;
  hopper::clear_sums(args, schedule, head, of_head, lane, lanes);
  Acc delta = 0;
  RowNormaliser<Acc> normaliser{infinity<Acc>(), 0};
  if (row < queries) {
    const T* out = args.layout.query_rows<const T>(args.out, h).row(row);
    const T* d_out = args.layout.query_rows<const T>(args.d_out, h).row(row);
    const int64_t words = residue_words(args.head_dim());
    const uint32_t* residues =
        args.out_residue ? args.out_residue + (args.layout.statistics(h) + row) * words : nullptr;
    if (args.of_weights) {
      const int64_t first = (h.flat * queries + row) * args.visibility.keys;
      out = static_cast<const T*>(args.weights) + first;
      d_out = static_cast<const T*>(args.d_weights) + first;
      for (int j = lane; j < args.visibility.keys; j += lanes) delta += widen(out[j]) * widen(d_out[j]);
    } else if (args.vectors) {
      constexpr int kVec = kVectorSize<T>;
      for (int first = lane * kVec; first < args.head_dim(); first += kStatisticsVectors * lanes * kVec) {
        Vector<T, kVec> a[kStatisticsVectors] = {}, b[kStatisticsVectors] = {};
#pragma unroll
        for (int i = 0; i < kStatisticsVectors; ++i) {
          const int d = first + i * lanes * kVec;
          if (d >= args.head_dim()) break;
          a[i] = load_vector<kVec>(out + d);
          b[i] = load_vector<kVec>(d_out + d);
        }
#pragma unroll
        for (int i = 0; i < kStatisticsVectors; ++i) {
          Acc exact[kVec];
          widen(a[i], exact);
          if constexpr (sizeof(T) == 2) {
            const int d = first + i * lanes * kVec;
            if (residues && d < args.head_dim()) add_residues<T>(residues, d, exact);
          }
#pragma unroll
          for (int e = 0; e < kVec; ++e) delta += exact[e] * widen(b[i].value[e]);
        }
      }
    } else {
      for (int d = lane; d < args.head_dim(); d += lanes) {
        Acc exact[1] = {widen(out[d])};
        if constexpr (sizeof(T) == 2) {
          if (residues) add_residues<T>(residues, d, exact);
        }
        delta += exact[0] * widen(d_out[d]);
      }
    }
    normaliser = row_normaliser<Acc>(args, args.layout.statistics(h) + row);
  }
  for (int other = lanes / 2; other > 0; other /= 2) delta += __shfl_xor_sync(0xFFFFFFFFu, delta, other);
  if (lane == 0) {
    static_cast<Acc*>(args.delta)[index] = delta;
    static_cast<Acc*>(args.lse2)[index] = normaliser.lse2;
    static_cast<Acc*>(args.shift2)[index] = normaliser.shift2;
  }
}

template <class T, class Acc>
void make_row_statistics(const Context& context, const BackwardArgs& args,
                         const hopper::BackwardSchedule& schedule = {}) {
  int lanes = 2;
  constexpr int kLaneBytes = 16 * kStatisticsVectors;
  while (lanes < 32 && lanes * kLaneBytes < args.head_dim() * static_cast<int>(sizeof(T))) lanes *= 2;
  with_bool(args.is_packed(), [&](auto packed) {
    launch(context, "attention_row_statistics", attention_row_statistics<T, Acc, decltype(packed)::value>,
           hopper::query_heads(args) * (args.rows_padded / (kStatisticsThreads / lanes)), kStatisticsThreads, 0, args,
           schedule, lanes);
  });
}

// Places the statistics in `arena`.
inline void place_row_statistics(Arena& arena, const AttentionParams& p, BackwardArgs& args) {
  const bool packed = p.query_starts;
  args.rows_padded =
      packed ? padded_rows(static_cast<int>(p.packed_queries)) + kStatisticsMultiple * static_cast<int>(p.batch)
             : padded_rows(args.visibility.queries);
  const int64_t heads = packed ? p.num_heads : args.heads();
  const size_t bytes = heads * args.rows_padded * size_of(accumulator_of(p.dtype));
  args.delta = arena.take(bytes);
  args.lse2 = arena.take(bytes);
  args.shift2 = arena.take(bytes);
}

}  // namespace cuda
}  // namespace pfa
