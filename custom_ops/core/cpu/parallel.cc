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

PFA_UNSANITIZED void run_parallel(int64_t count, int threads, bool ahead, LoopBody body, void* closure) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(closure, i, i + 1, 0);
    return;
  }
  // Not OpenMP's own dynamic loop: for that GCC calls functions of libgomp that the runtime inside Paddle, LLVM's, does
  // not have, and a second runtime that is loaded by chance would then run every index on every thread.
  std::atomic<int64_t> next{0};
  const auto take = [&next] { return next.fetch_add(1, std::memory_order_relaxed); };
  PFA_IS_BEFORE(&next);
#pragma omp parallel num_threads(threads)
  {
    PFA_IS_AFTER(&next);
    const int thread = omp_get_thread_num();
    for (int64_t i = take(); i < count;) {
      // While others still find some, the next index may be held in reserve.
      const bool reserves = ahead && i + 2 * threads < count;
      const int64_t after = reserves ? take() : i + threads;
      body(closure, i, after, thread);
      i = reserves ? after : take();
    }
    PFA_IS_BEFORE(closure);
  }
  PFA_IS_AFTER(closure);
}

}  // namespace pfa::cpu
