// The gradient of a float mask: that of the scores (score_gradient.cuh), summed over what the mask broadcasts over.
//
// A unit is a tile of the mask's own queries and keys, of which there is one where the mask broadcasts, of one of its
// sequences and heads. Thread blocks of 16 x 16 go through all scores that the unit is added to, as those of plain.cuh
// do, and compute them again; the sums are float64. Where there are few units, several thread blocks share one, and a
// second kernel adds up what they found. The order of all sums is always the same.
#pragma once

#include "core/cuda/attention/plain.cuh"

namespace pfa {
namespace cuda {
namespace mask_units {

constexpr int kThreads = plain::kThreads;

// How the work is shared out.
struct Plan {
  // Of the mask itself: 1 where it broadcasts.
  int64_t batches;
  int64_t heads;
  int64_t query_tiles;
  int64_t key_tiles;
  int rows;  // of a unit
  int columns;
  // Of all scores' sequences, heads and tiles of queries, those that are added to a unit.
  int64_t walk_batches;
  int64_t walk_heads;
  int64_t walk_tiles;
  int64_t parts;  // thread blocks that share a unit
  void* d_mask;
  double* partial_sums;  // [parts][units][rows][columns], if there are several parts

  __host__ __device__ int64_t units() const { return batches * heads * query_tiles * key_tiles; }
  __host__ __device__ int64_t walk() const { return walk_batches * walk_heads * walk_tiles; }
  __host__ __device__ int64_t elements() const { return int64_t{rows} * columns; }
};

struct Unit {
  int64_t number;
  int64_t batch;
  int64_t head;
  int first_query;
  int first_key;
};

__device__ __forceinline__ Unit unit_of(const Plan& plan, int64_t number) {
  int64_t rest = number;
  const int64_t key_tile = rest % plan.key_tiles;
  rest /= plan.key_tiles;
  const int64_t query_tile = rest % plan.query_tiles;
  rest /= plan.query_tiles;
  return {number, rest / plan.heads, rest % plan.heads, static_cast<int>(query_tile * plan.rows),
          static_cast<int>(key_tile * plan.columns)};
}

// Writes the gradient of an element of the unit; nothing past the mask's last query and key.
__device__ __forceinline__ void write(const AttentionArgs& args, const Plan& plan, const Unit& unit, int row,
                                      int column, double sum) {
  const int64_t* strides = args.mask.strides;
  const int64_t i = unit.first_query + row;
  const int64_t j = unit.first_key + column;
  if ((strides[2] && i >= args.visibility.queries) || (strides[3] && j >= args.visibility.keys)) return;
  const int64_t index = unit.batch * strides[0] + unit.head * strides[1] + i * strides[2] + j * strides[3];
  switch (args.mask.dtype) {
    case DType::kFloat32:
      static_cast<float*>(plan.d_mask)[index] = static_cast<float>(sum);
      return;
    case DType::kFloat64:
      static_cast<double*>(plan.d_mask)[index] = sum;
      return;
    case DType::kFloat16:
      static_cast<__half*>(plan.d_mask)[index] = __double2half(sum);
      return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(plan.d_mask)[index] = __double2bfloat16(sum);
      return;
    default:
      return;  // no others have a gradient
  }
}

// What a thread sums: rows ty + 16 r and columns tx + 16 c of the tile.
template <class Acc>
using Sums = double[plain::Tile<Acc>::kPerThread][plain::Tile<Acc>::kPerThread];

// sums += the gradients of the scores of a head's tile of queries with the unit's keys.
template <class T, class Acc>
__device__ void add_scores(const BackwardArgs& args, const Unit& unit, uint32_t flat, int row0, plain::Tile<Acc>& tile,
                           Sums<Acc>& sums) {
  using Shape = plain::Tile<Acc>;
  constexpr int kN = Shape::kPerThread;
  const BackwardHead<T, Acc> head = backward_head<T, Acc, true>(args, flat, args.drops);
  const int queries = head.visibility.queries;
  const int keys = head.visibility.keys;
  if (row0 >= queries) return;
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
  RowStatistics<Acc> rows[kN];
#pragma unroll
  for (int r = 0; r < kN; ++r) rows[r] = head.statistics(row0 + ty + 16 * r);

  Range<int> walk = head.visibility.keys_of(row0, row0 + Shape::kRows);
  walk.first = walk.first / Shape::kRows * Shape::kRows;
  if (args.mask.strides[3]) walk = {max(walk.first, unit.first_key), min(walk.end, unit.first_key + Shape::kRows)};
  for (int col0 = walk.first; col0 < walk.end; col0 += Shape::kRows) {
    const Hidden hidden = plain::hidden_of<Acc, true>(head, row0, col0);
    if (hidden == Hidden::kAll) continue;
    plain::Square<Acc> s, dp;
    plain::dot_rows<T, Acc>(tile, s, {head.q, row0, queries}, {head.k, col0, keys}, args.head_dim());
    if (args.of_weights) {
      plain::load_weight_gradient<T, Acc, false>(args, head, dp, row0, col0);
    } else {
      plain::dot_rows<T, Acc>(tile, dp, {head.d_out, row0, queries}, {head.v, col0, keys}, args.head_dim());
    }
#pragma unroll
    for (int r = 0; r < kN; ++r) {
#pragma unroll
      for (int c = 0; c < kN; ++c) {
        sums[r][c] += plain::element_gradient<true>(args, head, hidden, row0 + ty + 16 * r, col0 + tx + 16 * c, rows[r],
                                                    s[r][c], dp[r][c])
                          .d_score;
      }
    }
  }
}

// Adds up what the unit's broadcast makes one, and gives each element that is left to `result`(row, column, sum) once.
template <class Acc, class Result>
__device__ void reduce(const AttentionArgs& args, Sums<Acc>& sums, Result&& result) {
  constexpr int kN = plain::Tile<Acc>::kPerThread;
  constexpr int kWarps = kThreads / 32;
  __shared__ double sums_of_warps[kWarps][16 * kN];
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
  const bool one_row = args.mask.strides[2] == 0;
  const bool one_column = args.mask.strides[3] == 0;
  if (one_column) {
#pragma unroll
    for (int r = 0; r < kN; ++r) {
#pragma unroll
      for (int c = 1; c < kN; ++c) sums[r][0] += sums[r][c];
#pragma unroll
      for (int lane = 8; lane > 0; lane /= 2) sums[r][0] += __shfl_xor_sync(0xFFFFFFFFu, sums[r][0], lane);
    }
  }
  if (one_row) {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
#pragma unroll
      for (int r = 1; r < kN; ++r) sums[0][c] += sums[r][c];
      sums[0][c] += __shfl_xor_sync(0xFFFFFFFFu, sums[0][c], 16);
      if (ty % 2 == 0) sums_of_warps[threadIdx.x / 32][tx + 16 * c] = sums[0][c];
    }
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x);
    if (column < (one_column ? 1 : 16 * kN)) {
      double sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += sums_of_warps[warp][column];
      result(0, column, sum);
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < kN; ++r) {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      if (!one_column || (c == 0 && tx == 0)) result(ty + 16 * r, tx + 16 * c, sums[r][c]);
    }
  }
}

// A part of a unit.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads, 2) attention_mask_gradient(BackwardArgs args, Plan plan) {
  using Shape = plain::Tile<Acc>;
  __shared__ Shape tile;
  const int64_t part = blockIdx.x % plan.parts;
  const Unit unit = unit_of(plan, blockIdx.x / plan.parts);
  Sums<Acc> sums = {};
  const int64_t end = plan.walk() * (part + 1) / plan.parts;
  for (int64_t step = plan.walk() * part / plan.parts; step < end; ++step) {
    const int64_t query_tile = step % plan.walk_tiles;
    const int64_t head = unit.head + step / plan.walk_tiles % plan.walk_heads;
    const int64_t batch = unit.batch + step / plan.walk_tiles / plan.walk_heads;
    add_scores<T, Acc>(args, unit, static_cast<uint32_t>(batch * args.layout.num_heads + head),
                       unit.first_query + static_cast<int>(query_tile) * Shape::kRows, tile, sums);
  }
  reduce<Acc>(args, sums, [&](int row, int column, double sum) {
    if (plan.parts == 1) return write(args, plan, unit, row, column, sum);
    plan.partial_sums[(part * plan.units() + unit.number) * plan.elements() + row * plan.columns + column] = sum;
  });
}

// Adds up the parts of all units.
__global__ void __launch_bounds__(kThreads) attention_mask_gradient_sum(AttentionArgs args, Plan plan) {
  const int64_t size = plan.units() * plan.elements();
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= size) return;
  double sum = 0;
  for (int64_t part = 0; part < plan.parts; ++part) sum += plan.partial_sums[part * size + index];
  const int element = static_cast<int>(index % plan.elements());
  write(args, plan, unit_of(plan, index / plan.elements()), element / plan.columns, element % plan.columns, sum);
}

}  // namespace mask_units
}  // namespace cuda
}  // namespace pfa
