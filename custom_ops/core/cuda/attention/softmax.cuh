// The online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) on scores in units of
// log2, a tile of keys at a time: each row keeps its highest score and its sum of exponentials so far, and what was
// summed before is multiplied by a correction when a higher score comes.
#pragma once

#include "core/cuda/attention/fragments.cuh"

namespace pfa {
namespace cuda {

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

// A product of queries and keys in units of log2, rounded as such: no subtraction is fused to it.
__device__ __forceinline__ float scaled(float product, float scale_log2) { return __fmul_rn(product, scale_log2); }
__device__ __forceinline__ double scaled(double product, double scale_log2) { return __dmul_rn(product, scale_log2); }

// What a thread knows of one row of scores.
template <class Acc>
struct RowSoftmax {
  Acc maximum = -infinity<Acc>();
  Acc total = 0;  // over the thread's own columns until finish

  // Takes the highest score of the next tile. Returns what to subtract from the tile's scores, and what the sums so far
  // are to be multiplied with.
  __device__ __forceinline__ Acc raise(Acc highest, Acc& correction) {
    const Acc top = max(maximum, highest);
    const Acc base = top == -infinity<Acc>() ? Acc(0) : top;
    correction = exp2_of(maximum - base);
    maximum = top;
    return base;
  }

  // Returns the factor of the row's sums: drop_scale over the sum of exponentials, or 0 for a row that sees no key.
  // kLanes neighbouring threads hold the row together; one of them stores its statistics.
  template <int kLanes>
  __device__ __forceinline__ Acc finish(const ForwardArgs& args, const HeadState& head, int row) {
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, lane);
    if (threadIdx.x % kLanes == 0) store(args, head, row);
    return total > 0 ? static_cast<Acc>(args.drop_scale) / total : Acc(0);
  }

 private:
  // The highest score may be 1e9 or -1e9, where a rounding error outweighs everything else: it is kept as it is, and
  // the sum of exponentials beside it.
  __device__ __forceinline__ void store(const ForwardArgs& args, const HeadState& head, int row) const {
    if (!args.log_sum_exp || row >= head.visibility.queries) return;
    const int64_t index = args.layout.statistics(head.index) + row;
    static_cast<Acc*>(args.log_sum_exp)[index] = total > 0 ? log(total) : infinity<Acc>();
    static_cast<Acc*>(args.score_shift)[index] = total > 0 ? maximum : Acc(0);
  }
};

// The two rows of a strip that a lane holds columns of, with scores in the order of fragments.cuh.
struct StripSoftmax {
  RowSoftmax<float> rows[2];

  // Scores of 16 rows and 2 * kCount keys, times `scale` in units of log2, to probabilities. kVotes: the scale may be 1
  // in some tiles and not in others, so that large scores are rounded before they are subtracted from.
  template <bool kVotes, int kCount>
  __device__ __forceinline__ void add_tile(float scale, float (&correction)[2], float (&s)[kCount]) {
    float highest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < kCount / 4; ++n) top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
      highest[half] = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
    }
    if (kVotes && __any_sync(0xFFFFFFFFu, fmaxf(fabsf(highest[0]), fabsf(highest[1])) * scale > kLargeScore)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) s[i] = scaled(s[i], scale);
#pragma unroll
      for (int half = 0; half < 2; ++half) highest[half] = scaled(highest[half], scale);
      scale = 1.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = rows[half].raise(highest[half] * scale, correction[half]);
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kCount / 4; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[4 * n + e] = exp2_of(fmaf(s[4 * n + e], scale, -base));
          sum += s[4 * n + e];
        }
      }
      rows[half].total = rows[half].total * correction[half] + sum;
    }
  }

  __device__ __forceinline__ void finish(const ForwardArgs& args, const HeadState& head, int row0, float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) factor[half] = rows[half].finish<4>(args, head, row0 + lane_row(2 * half));
  }
};

// Makes -inf of the scores that a query does not see; of rows row0.. and keys column0...
template <int kCount>
__device__ __forceinline__ void hide_scores(const Visibility<int>& visibility, int row0, int column0,
                                            float (&s)[kCount]) {
  if (!visibility.hides_any(row0, row0 + 16, column0, column0 + 2 * kCount)) return;
  static_assert(kCount <= 64, "a bit for each column of a lane");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Range<int> keys = visibility.keys_of(row0 + lane_row(2 * half));
    const uint32_t seen = lane_columns_in(keys.first - column0, keys.end - column0);
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!(seen & 1u << (2 * n + j))) s[4 * n + 2 * half + j] = -INFINITY;
      }
    }
  }
}

}  // namespace cuda
}  // namespace pfa
