// Parallel loops on OpenMP's threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pfa::cpu {

// The number of threads a parallel loop started here may use.
int max_threads();

using LoopBody = void (*)(void* closure, int64_t index, int64_t next, int thread);

void run_parallel(int64_t count, int threads, bool ahead, LoopBody body, void* closure);

// Calls f(index, thread) for every index in [0, count), each on one of `threads` threads, numbered from 0. Which thread
// takes which index is not fixed: results must depend on the index alone.
template <class F>
void parallel_for(int64_t count, int threads, F&& f) {
  using Closure = std::remove_reference_t<F>;
  run_parallel(
      count, threads, false,
      [](void* closure, int64_t index, int64_t, int thread) { (*static_cast<Closure*>(closure))(index, thread); }, &f);
}

// The same with f(index, next, thread): `next` is what the thread will take after that, or is likely to, or at least
// `count`.
template <class F>
void parallel_for_with_next(int64_t count, int threads, F&& f) {
  using Closure = std::remove_reference_t<F>;
  run_parallel(
      count, threads, true,
      [](void* closure, int64_t index, int64_t next, int thread) {
        (*static_cast<Closure*>(closure))(index, next, thread);
      },
      &f);
}

}  // namespace pfa::cpu
