#include "core/cpu/parallel.h"

#include <omp.h>

#include <algorithm>

namespace pfa::cpu {

int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

void run_parallel(int64_t count, int threads, LoopBody body, void* closure) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(closure, i, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) body(closure, i, thread);
  }
}

}  // namespace pfa::cpu
