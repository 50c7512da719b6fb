// Hopper's own instructions (sm_90a): bulk tensor copies that signal barriers in shared memory, and warpgroup matrix
// products.
//
// Tiles lie in shared memory as the copy engine writes them with the 128-byte swizzle: blocks of 64 columns (128 bytes
// a row), rows one after the other, the 16-byte vector v of row r at place v ^ (r % 8). Blocks start at multiples of
// 1024 bytes.
#pragma once

#include <cuda.h>

#include "core/cuda/attention/fragments.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PFA_HOPPER_CODE 1
#else
#define PFA_HOPPER_CODE 0
#endif

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kBlockColumns = 64;
constexpr int kRowBytes = 128;
constexpr int kCopyRows = 64;  // rows of one bulk copy: 8 KiB
constexpr int kCopyBytes = kCopyRows * kRowBytes;

#if PFA_HOPPER_CODE

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Makes freshly initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes ordinary writes to shared memory known to the copy engine and the tensor cores.
__device__ __forceinline__ void shared_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kId, int kCount>
__device__ __forceinline__ void named_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kCount) : "memory");
}
__device__ __forceinline__ void named_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Starts copying kCopyRows rows x 64 columns of tensor [B, S, 3 or 1, H, D] to shared memory.
__device__ __forceinline__ void copy_block(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int head,
                                           int which, int row, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(which), "r"(row), "r"(batch)
      : "memory");
}

// Copies kRows rows x kColumns columns as blocks of 64 columns.
template <int kRows, int kColumns>
__device__ __forceinline__ void copy_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int head, int which,
                                          int row, int batch) {
#pragma unroll
  for (int column = 0; column < kColumns; column += kBlockColumns) {
#pragma unroll
    for (int r = 0; r < kRows; r += kCopyRows) {
      copy_block(static_cast<char*>(to) + (column / kBlockColumns * kRows + r) * kRowBytes, map, barrier, column, head,
                 which, row + r, batch);
    }
  }
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts copying bytes (a multiple of 16) as they lie.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Writes a warp's 16 x 16 piece, packed as lanes hold it, to where the swizzle puts rows row0.. and columns column0..
// of a block.
__device__ __forceinline__ void store_piece(void* block, int row0, int column0, const uint32_t (&piece)[4]) {
  const int lane = threadIdx.x % 32;
  const int row = row0 + lane % 16;
  const int vector = column0 / 8 + lane / 16;
  const uint32_t address = shared_address(block) + row * kRowBytes + ((vector ^ (row % 8)) * 16);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(piece[0]),
               "r"(piece[1]), "r"(piece[2]), "r"(piece[3])
               : "memory");
}

// Stores a warp's 16 rows of sums, times a factor per lane's row, by way of rows row0.. of `block`, which are the
// warp's own. They are rows first_row.. of a matrix with `rows` rows and `columns` columns.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_strip(const float (&sums)[kHeadDim / 2], float factor0, float factor1,
                                            char* block, int row0, T* to, int64_t stride, int first_row, int rows,
                                            int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < kHeadDim; column += kBlockColumns) {
#pragma unroll
    for (int n = 0; n < kBlockColumns / 16; ++n) {
      uint32_t piece[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* pair = &sums[column / 2 + 8 * n + 2 * e];
        const float factor = e % 2 ? factor1 : factor0;
        piece[e] = pack<T>(pair[0] * factor, pair[1] * factor);
      }
      store_piece(block, row0, 16 * n, piece);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + lane / 8;
      const int vector = lane % 8;
      const int d = column + vector * 8;
      if (first_row + row < rows && d < columns) {
        *reinterpret_cast<uint4*>(to + (first_row + row) * stride + d) =
            *reinterpret_cast<const uint4*>(block + (row0 + row) * kRowBytes + (vector ^ row % 8) * 16);
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

// Of 2 kCount sums each thread hands one half to the lane 2 kCount away, and adds the other lane's to its own other
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

// Adds the sums over a warp's 16 rows, which `values` holds as store_strip takes them, times a factor, to
// sums[0..columns - 1].
template <int kHeadDim>
__device__ __forceinline__ void add_column_sums(const float (&values)[kHeadDim / 2], float factor, float* sums,
                                                int columns) {
#pragma unroll
  for (int column = 0; column < kHeadDim; column += kBlockColumns) {
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

// Operand descriptors. Rows along the product's M or N and columns along its K:
__device__ __forceinline__ uint64_t rows_operand(const void* p) {
  return (uint64_t{1} << 62) | (uint64_t{8 * kRowBytes / 16} << 32) | (uint64_t{1} << 16) |
         (shared_address(p) >> 4 & 0x3FFF);
}
// Columns along the product's M or N and rows along its K ("transposed"); blocks of 64 columns are block_bytes apart.
__device__ __forceinline__ uint64_t columns_operand(const void* p, int block_bytes) {
  return (uint64_t{1} << 62) | (uint64_t{8 * kRowBytes / 16} << 32) | (static_cast<uint64_t>(block_bytes / 16) << 16) |
         (shared_address(p) >> 4 & 0x3FFF);
}
constexpr int kRowsStep = 32 / 16;                 // 16 along K in a rows_operand
constexpr int kColumnsStep = 16 * kRowBytes / 16;  // 16 along K in a columns_operand

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of sums across the asynchronous products that write them.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define PFA_WGMMA_REGISTERS_64                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PFA_WGMMA_SUMS_64                                                                                     \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PFA_WGMMA_REGISTERS_128                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PFA_WGMMA_SUMS_128                                                                                    \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), \
      "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), \
      "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
      "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

#define PFA_WGMMA_SHARED(N, TYPE, REGISTERS, A, B, P, TA, TB, ...)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                                         \
               ", 0;\n"                                                                                       \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, %" A ", %" B \
               ", p, 1, 1, %" TA ", %" TB ";\n}\n"                                                            \
               : __VA_ARGS__                                                                                  \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))

#define PFA_WGMMA_REGISTER(N, TYPE, REGISTERS, A0, A1, A2, A3, B, P, TB, ...)                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                                            \
               ", 0;\n"                                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {%" A0 ", %" A1 \
               ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, %" TB ";\n}\n"                                             \
               : __VA_ARGS__                                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB))

// d (+)= A B for 64 rows and as many columns as d has sums for; operands in shared memory, or A in registers.
// Asynchronous.
template <class T, int kTransposeA, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same<T, __half>::value) {
    PFA_WGMMA_SHARED("64", "f16", PFA_WGMMA_REGISTERS_64, "32", "33", "34", "35", "36", PFA_WGMMA_SUMS_64);
  } else {
    PFA_WGMMA_SHARED("64", "bf16", PFA_WGMMA_REGISTERS_64, "32", "33", "34", "35", "36", PFA_WGMMA_SUMS_64);
  }
}

template <class T, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  if constexpr (std::is_same<T, __half>::value) {
    PFA_WGMMA_REGISTER("64", "f16", PFA_WGMMA_REGISTERS_64, "32", "33", "34", "35", "36", "37", "38",
                       PFA_WGMMA_SUMS_64);
  } else {
    PFA_WGMMA_REGISTER("64", "bf16", PFA_WGMMA_REGISTERS_64, "32", "33", "34", "35", "36", "37", "38",
                       PFA_WGMMA_SUMS_64);
  }
}

template <class T, int kTransposeA, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same<T, __half>::value) {
    PFA_WGMMA_SHARED("128", "f16", PFA_WGMMA_REGISTERS_128, "64", "65", "66", "67", "68", PFA_WGMMA_SUMS_128);
  } else {
    PFA_WGMMA_SHARED("128", "bf16", PFA_WGMMA_REGISTERS_128, "64", "65", "66", "67", "68", PFA_WGMMA_SUMS_128);
  }
}

template <class T, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  if constexpr (std::is_same<T, __half>::value) {
    PFA_WGMMA_REGISTER("128", "f16", PFA_WGMMA_REGISTERS_128, "64", "65", "66", "67", "68", "69", "70",
                       PFA_WGMMA_SUMS_128);
  } else {
    PFA_WGMMA_REGISTER("128", "bf16", PFA_WGMMA_REGISTERS_128, "64", "65", "66", "67", "68", "69", "70",
                       PFA_WGMMA_SUMS_128);
  }
}

#undef PFA_WGMMA_SHARED
#undef PFA_WGMMA_REGISTER
#undef PFA_WGMMA_REGISTERS_64
#undef PFA_WGMMA_SUMS_64
#undef PFA_WGMMA_REGISTERS_128
#undef PFA_WGMMA_SUMS_128

template <int kRegisters>
__device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
