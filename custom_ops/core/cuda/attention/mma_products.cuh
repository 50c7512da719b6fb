// Matrix products of one warp by mma.sync on tiles in shared memory, and the copies that bring tiles there and results
// back: float16, bfloat16, and float32 rounded to TF32, compute capability 8.0 and later.
//
// Tiles lie in shared memory as rows of head dims, with 16 bytes between rows, which spreads the eight rows of an
// ldmatrix over all banks.
#pragma once

#include "core/cuda/attention/fragments.cuh"
#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {
namespace mma {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes
template <class T>
constexpr int kDepth = 2 * kVector<T>;  // what one instruction sums over: 16, or 8 in TF32
template <class T, int kHeadDim>
constexpr int kStride = kHeadDim + kVector<T>;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

template <class T>
__device__ __forceinline__ void load_operand(uint32_t (&r)[4], const T* p) {
  load_matrices(r, p);
  if constexpr (std::is_same<T, float>::value) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = round_to_tf32(__uint_as_float(r[i]));
  }
}

template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same<T, float>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (std::is_same<T, __half>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Starts copying rows row0..row0 + kRows - 1 of `rows` to shared memory; zeros stand for what lies past the last row
// and past head_dim.
template <class T, int kRows, int kHeadDim>
__device__ __forceinline__ void copy_rows(T* to, const HeadRows<const T>& from, int row0, int rows,
                                          const AttentionArgs& args) {
  if (args.vectors) {
    constexpr int kVectors = kHeadDim / kVector<T>;
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
      const int row = i / kVectors;
      const int d = i % kVectors * kVector<T>;
      const bool inside = row0 + row < rows && d < args.head_dim();
      const T* source = inside ? from.row(row0 + row) + d : from.data;
      asm volatile(
          "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to + row * kStride<T, kHeadDim> + d)),
          "l"(source), "r"(inside ? 16 : 0)
          : "memory");
    }
  } else {
    for (int i = threadIdx.x; i < kRows * kHeadDim; i += kThreads) {
      const int row = i / kHeadDim;
      const int d = i % kHeadDim;
      const bool inside = row0 + row < rows && d < args.head_dim();
      to[row * kStride<T, kHeadDim> + d] = inside ? from.row(row0 + row)[d] : narrow<T>(0.0f);
    }
  }
}

// c[m][n] += a[16 m ..][d] * b[8 n ..][d]: both operands in shared memory, rows of head dims.
template <class T, int kStrips, int kColumns, int kHeadDim>
__device__ __forceinline__ void dot_rows(float (&c)[kStrips][kColumns / 8][4], const T* a, const T* b) {
  constexpr int kRow = kStride<T, kHeadDim>;
  const int lane = threadIdx.x % 32;
  const T* a_lane = a + lane % 16 * kRow + lane / 16 * kVector<T>;
  const T* b_lane = b + (lane / 16 * 8 + lane % 8) * kRow + lane / 8 % 2 * kVector<T>;
#pragma unroll
  for (int d = 0; d < kHeadDim; d += kDepth<T>) {
    uint32_t af[kStrips][4];
#pragma unroll
    for (int m = 0; m < kStrips; ++m) load_operand<T>(af[m], a_lane + m * 16 * kRow + d);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t bf[4];
      load_operand<T>(bf, b_lane + n * 16 * kRow + d);
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        multiply_add<T>(c[m][2 * n], af[m], bf[0], bf[1]);
        multiply_add<T>(c[m][2 * n + 1], af[m], bf[2], bf[3]);
      }
    }
  }
}

// Eight numbers of a 16 x 16 piece of accumulators as left operands of one instruction (16 bits) or two (TF32; there
// the lane's neighbouring columns 2 t and 2 t + 1 take the places t and t + 4 of the sum, and sum_rows reads its rows
// in that order).
template <class T>
__device__ __forceinline__ void pack_piece(uint32_t (*to)[4], const float (&from)[8]) {
  if constexpr (std::is_same<T, float>::value) {
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e / 4][e % 2 * 2 + e / 2 % 2] = round_to_tf32(from[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[0][e] = pack<T>(from[2 * e], from[2 * e + 1]);
  }
}

// c[m][n] += a[m][k] * b[kDepth k ..][8 n ..]: a in registers, b in shared memory with head dims as columns.
template <class T, int kStrips, int kSteps, int kHeadDim>
__device__ __forceinline__ void sum_rows(float (&c)[kStrips][kHeadDim / 8][4], const uint32_t (&a)[kStrips][kSteps][4],
                                         const T* b) {
  constexpr int kRow = kStride<T, kHeadDim>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if constexpr (std::is_same<T, float>::value) {
      const T* b_lane = b + (8 * k + lane % 4 * 2) * kRow + lane / 4;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const uint32_t b0 = round_to_tf32(b_lane[8 * n]);
        const uint32_t b1 = round_to_tf32(b_lane[8 * n + kRow]);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) multiply_add<T>(c[m][n], a[m][k], b0, b1);
      }
    } else {
      const T* b_lane = b + (16 * k + lane % 16) * kRow + lane / 16 * 8;
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t bf[4];
        load_matrices_transposed(bf, b_lane + n * 16);
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          multiply_add<T>(c[m][2 * n], a[m][k], bf[0], bf[1]);
          multiply_add<T>(c[m][2 * n + 1], a[m][k], bf[2], bf[3]);
        }
      }
    }
  }
}

template <int kStrips, int kColumns>
__device__ __forceinline__ void clear(float (&c)[kStrips][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0.0f;
    }
  }
}

// Writes a strip's 16 sums to rows row0.. below `rows`, times a factor for each of a lane's rows, as whole vectors: by
// way of 16 rows of shared memory, kStride<T, kHeadDim> apart, that are the warp's own.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_rows(const float (&sums)[kHeadDim / 8][4], float factor0, float factor1,
                                           T* shared, const HeadRows<T>& to, int row0, int rows,
                                           const AttentionArgs& args) {
  constexpr int kRow = kStride<T, kHeadDim>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    T* place = shared + lane / 4 * kRow + 8 * n + lane % 4 * 2;
    if constexpr (std::is_same<T, float>::value) {
      *reinterpret_cast<float2*>(place) = make_float2(sums[n][0] * factor0, sums[n][1] * factor0);
      *reinterpret_cast<float2*>(place + 8 * kRow) = make_float2(sums[n][2] * factor1, sums[n][3] * factor1);
    } else {
      *reinterpret_cast<uint32_t*>(place) = pack<T>(sums[n][0] * factor0, sums[n][1] * factor0);
      *reinterpret_cast<uint32_t*>(place + 8 * kRow) = pack<T>(sums[n][2] * factor1, sums[n][3] * factor1);
    }
  }
  __syncwarp();
  if (args.vectors) {
    constexpr int kVector = 16 / sizeof(T);
    constexpr int kVectors = kHeadDim / kVector;
#pragma unroll
    for (int i = lane; i < 16 * kVectors; i += 32) {
      const int row = i / kVectors;
      const int d = i % kVectors * kVector;
      if (row0 + row < rows && d < args.head_dim()) {
        *reinterpret_cast<uint4*>(to.row(row0 + row) + d) = *reinterpret_cast<const uint4*>(shared + row * kRow + d);
      }
    }
  } else {
    for (int i = lane; i < 16 * kHeadDim; i += 32) {
      const int row = i / kHeadDim;
      const int d = i % kHeadDim;
      if (row0 + row < rows && d < args.head_dim()) to.row(row0 + row)[d] = shared[row * kRow + d];
    }
  }
  __syncwarp();
}

#endif

}  // namespace mma
}  // namespace cuda
}  // namespace pfa
