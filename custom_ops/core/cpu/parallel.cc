#include "core/cpu/parallel.h"

#include <omp.h>

#include <algorithm>
#include <atomic>

// ThreadSanitizer does not see how libgomp starts its threads and waits for them: it is told what comes before what.
#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#define PFA_IS_BEFORE(tag) __tsan_release(tag)
#define PFA_IS_AFTER(tag) __tsan_acquire(tag)
#define PFA_UNSANITIZED __attribute__((no_sanitize("thread")))
#else
#define PFA_IS_BEFORE(tag)
#define PFA_IS_AFTER(tag)
#define PFA_UNSANITIZED
#endif

namespace pfa::cpu {

int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

namespace {

constexpr int kMaxShares = 64;

// What a thread takes first: indices side by side, always the same, so that their operands are in its core's cache from
// the call before. A thread that has done with its own takes what is left of others'.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;

  // `end` if nothing is left.
  int64_t take() {
    if (next.load(std::memory_order_relaxed) >= end) return end;
    return std::min(next.fetch_add(1, std::memory_order_relaxed), end);
  }
};

}  // namespace

PFA_UNSANITIZED void run_parallel(int64_t count, int threads, bool ahead, LoopBody body, void* closure) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(closure, i, i + 1, 0);
    return;
  }
  // Not OpenMP's own dynamic loop: for that GCC calls functions of libgomp that the runtime inside Paddle, LLVM's, does
  // not have, and a second runtime that is loaded by chance would then run every index on every thread.
  Share shares[kMaxShares];
  const int share_count = std::min(threads, kMaxShares);
  for (int i = 0; i < share_count; ++i) {
    shares[i].next = count * i / share_count;
    shares[i].end = count * (i + 1) / share_count;
  }
  PFA_IS_BEFORE(shares);
#pragma omp parallel num_threads(threads)
  {
    PFA_IS_AFTER(shares);
    const int thread = omp_get_thread_num();
    for (int i = 0; i < share_count; ++i) {
      Share& share = shares[(thread + i) % share_count];
      for (int64_t index = share.take(); index < share.end;) {
        // While the share has some left for others, the next index may be held in reserve.
        const bool reserves = ahead && index + 2 < share.end;
        const int64_t after = reserves ? share.take() : index + 1;
        body(closure, index, after, thread);
        index = reserves ? after : share.take();
      }
    }
    PFA_IS_BEFORE(closure);
  }
  PFA_IS_AFTER(closure);
}

}  // namespace pfa::cpu
