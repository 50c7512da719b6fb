// Results on their way from a warp's registers (fragments.cuh) to memory: pieces into the swizzled tiles of
// instructions.cuh, strips to their rows, sums into sums of others.
#pragma once

#include "core/cuda/attention/hopper/instructions.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

#if PFA_HOPPER_CODE

// Writes a piece, packed as lanes hold it, to where the swizzle puts rows row0.. and columns column0.. of a panel.
__device__ __forceinline__ void store_piece(void* panel, int row0, int column0, const uint32_t (&piece)[4]) {
  const int lane = threadIdx.x % 32;
  const int row = row0 + lane % 16;
  const int vector = column0 / 8 + lane / 16;
  const uint32_t address = shared_address(panel) + row * kRowBytes + ((vector ^ (row % 8)) * 16);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(piece[0]),
               "r"(piece[1]), "r"(piece[2]), "r"(piece[3])
               : "memory");
}

// Writes a strip's 16 rows of sums, times a factor for each of a lane's rows, to rows row0.. below `rows` and head dims
// below `columns`: by way of rows panel_row0.. of `panel`, which are the warp's own.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_strip(const float (&sums)[kHeadDim / 2], float factor0, float factor1,
                                            char* panel, int panel_row0, const HeadRows<T>& to, int row0, int rows,
                                            int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < kHeadDim; column += kPanelColumns) {
#pragma unroll
    for (int n = 0; n < kPanelColumns / 16; ++n) {
      uint32_t piece[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* pair = &sums[column / 2 + 8 * n + 2 * e];
        const float factor = e % 2 ? factor1 : factor0;
        piece[e] = pack<T>(pair[0] * factor, pair[1] * factor);
      }
      store_piece(panel, panel_row0, 16 * n, piece);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + lane / 8;
      const int vector = lane % 8;
      const int d = column + vector * 8;
      if (row0 + row < rows && d < columns) {
        *reinterpret_cast<uint4*>(to.row(row0 + row) + d) =
            *reinterpret_cast<const uint4*>(panel + (panel_row0 + row) * kRowBytes + (vector ^ row % 8) * 16);
      }
    }
    __syncwarp();
  }
}

__device__ __forceinline__ void add_to(float* to, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

__device__ __forceinline__ void add_to(float* to, float a, float b) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b) : "memory");
}

// Each thread has 2 kCount sums. It hands one half to the lane 2 kCount away, and adds that lane's to its own other
// half.
template <int kCount>
__device__ __forceinline__ void exchange_halves(const float (&sums)[2 * kCount], float (&kept)[kCount]) {
  const bool upper = threadIdx.x & 2 * kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float low = sums[i];
    const float high = sums[kCount + i];
    kept[i] = (upper ? high : low) + __shfl_xor_sync(0xFFFFFFFFu, upper ? low : high, 2 * kCount);
  }
}

// Adds the sums over a strip's 16 rows of `values`, times a factor, to sums[0..columns - 1].
template <int kHeadDim>
__device__ __forceinline__ void add_column_sums(const float (&values)[kHeadDim / 2], float factor, float* sums,
                                                int columns) {
#pragma unroll
  for (int column = 0; column < kHeadDim; column += kPanelColumns) {
    // A thread has two rows of columns 8 n + 2 (lane % 4) and the next, n = 0..7. In the end n = lane / 4.
    float of_8[16], of_4[8], of_2[4], of_1[2];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      of_8[i] = values[column / 2 + i / 2 * 4 + i % 2] + values[column / 2 + i / 2 * 4 + 2 + i % 2];
    exchange_halves<8>(of_8, of_4);
    exchange_halves<4>(of_4, of_2);
    exchange_halves<2>(of_2, of_1);
    const int d = column + threadIdx.x % 32 * 2;
    if (d < columns) add_to(sums + d, of_1[0] * factor, of_1[1] * factor);
  }
}

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
