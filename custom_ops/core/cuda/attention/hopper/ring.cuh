// A ring of stages in shared memory between a producer, whose copies fill them, and consumers that read them. Each
// stage has two barriers: `full` completes when the bytes that were announced have come, `empty` when all consumers
// have released the stage.
#pragma once

#include "core/cuda/attention/hopper/instructions.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kStages = 2;  // of the rings of either pass

// Whether this is a build for compute-sanitizer: it follows arrivals of all threads at a barrier, not those of a thread
// for its warp.
#ifdef PFA_SANITIZED
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

#if PFA_HOPPER_CODE

// Where the n-th filling of a ring lies: its stage, and how often that was filled before.
struct RingStep {
  int stage;
  int round;
};

template <int kStages>
__device__ __forceinline__ RingStep ring_step(int n) {
  return {n % kStages, n / kStages};
}

// kArrivals: how often consumers release a stage before it is empty, by release; `others` of init: and how often by
// release_alone.
template <int kStages, int kArrivals>
struct Ring {
  uint64_t full[kStages];
  uint64_t empty[kStages];

  // One thread calls this, before the others use the ring.
  __device__ __forceinline__ void init(int others = 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], kArrivals + others);
    }
  }

  // The producer waits until the stage is empty.
  __device__ __forceinline__ void wait_empty(RingStep step) {
    if (step.round > 0) barrier_wait(&empty[step.stage], (step.round - 1) & 1);
  }

  // The producer announces the bytes of its copies, which are to signal the barrier that is returned.
  __device__ __forceinline__ uint64_t* expect(RingStep step, int bytes) {
    barrier_expect(&full[step.stage], bytes);
    return &full[step.stage];
  }

  // Both.
  __device__ __forceinline__ uint64_t* fill(RingStep step, int bytes) {
    wait_empty(step);
    return expect(step, bytes);
  }

  // A consumer waits until the stage is full.
  __device__ __forceinline__ void wait_full(RingStep step) { barrier_wait(&full[step.stage], step.round & 1); }

  // A warp has read the stage.
  __device__ __forceinline__ void release(RingStep step) { release_by_warp<kArrivals>(&empty[step.stage]); }
  // A thread that is none of those has.
  __device__ __forceinline__ void release_alone(RingStep step) { barrier_arrive(&empty[step.stage]); }
};

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
