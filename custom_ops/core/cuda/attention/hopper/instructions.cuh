// Hopper's own instructions (sm_90a): bulk tensor copies that signal barriers in shared memory, and warpgroup matrix
// products.
//
// Tiles lie in shared memory as the copy engine writes them with the 128-byte swizzle: panels of 64 columns (128 bytes
// a row), rows one after the other, the 16-byte vector v of row r at place v ^ (r % 8). Panels start at multiples of
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

constexpr int kPanelColumns = 64;
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

// The warp's threads have read what the barrier stands for: each arrives where it counts more than 8 arrivals, else one
// of them.
template <int kArrivals>
__device__ __forceinline__ void release_by_warp(uint64_t* barrier) {
  __syncwarp();
  if (kArrivals > 8 || threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Makes freshly initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes ordinary writes to shared memory known to the copy engine and the tensor cores.
__device__ __forceinline__ void shared_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Named barriers, of `count` threads: some wait, others only arrive.
__device__ __forceinline__ void named_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Starts copying kCopyRows rows x 64 columns of a tensor map with coordinates (column, head, row, sequence, origin).
__device__ __forceinline__ void copy_panel(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int head,
                                           int row, int sequence, int origin) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(row), "r"(sequence), "r"(origin)
      : "memory");
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

// All threads of a cluster wait for each other, and see what the others have written.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Operand descriptors (PTX ISA, "Matrix Descriptor Format" of wgmma): bits 0-13 the address, 16-29 the leading and
// 32-45 the stride byte offset, each over 16, and bits 62-63 the 128-byte swizzle. Rows along the product's M or N and
// columns along its K:
__device__ __forceinline__ uint64_t rows_operand(const void* p) {
  return (uint64_t{1} << 62) | (uint64_t{8 * kRowBytes / 16} << 32) | (uint64_t{1} << 16) |
         (shared_address(p) >> 4 & 0x3FFF);
}
// Columns along the product's M or N and rows along its K ("transposed"); panels of 64 columns are panel_bytes apart.
__device__ __forceinline__ uint64_t columns_operand(const void* p, int panel_bytes) {
  return (uint64_t{1} << 62) | (uint64_t{8 * kRowBytes / 16} << 32) | (static_cast<uint64_t>(panel_bytes / 16) << 16) |
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
