#include "core/cpu/parallel.h"

#include <omp.h>

#include <algorithm>
#include <atomic>

namespace pfa::cpu {

int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

void run_parallel(int64_t count, int threads, bool ahead, LoopBody body, void* closure) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(closure, i, i + 1, 0);
    return;
  }
  // Not OpenMP's own dynamic loop: for that GCC calls functions of libgomp that the runtime inside Paddle, LLVM's, does
  // not have, and a second runtime that is loaded by chance would then run every index on every thread.
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    for (int64_t i = next++; i < count;) {
      // While others still find some, the next index may be held in reserve.
      const bool reserves = ahead && i + 2 * threads < count;
      const int64_t after = reserves ? next++ : i + threads;
      body(closure, i, after, thread);
      i = reserves ? after : next++;
    }
  }
}

}  // namespace pfa::cpu
