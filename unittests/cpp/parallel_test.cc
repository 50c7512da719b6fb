// Parallel loops: every index once, whatever the number of threads and however uneven the work.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "core/cpu/parallel.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t count, int threads) {
  if (holds) return;
  ++failures;
  std::printf("%s: fails for %lld indices, %d threads\n", what, static_cast<long long>(count), threads);
}

// Takes long for the first indices, so that others take what is left of the first thread's share.
double work(int64_t index) {
  volatile double sum = 0;
  for (int64_t i = 0; i < (index < 5 ? 20000 : 10); ++i) sum = sum + 1.0;
  return sum;
}

void check(int64_t count, int threads, bool ahead) {
  std::vector<std::atomic<int>> calls(count), busy(threads);
  std::atomic<bool> threads_are_valid{true}, next_is_valid{true};
  auto enter = [&](int64_t index, int thread) {
    if (thread < 0 || thread >= threads || busy[thread].exchange(1)) threads_are_valid = false;
    ++calls[index];
    work(index);
    busy[thread] = 0;
  };
  if (ahead) {
    pfa::cpu::parallel_for_with_next(count, threads, [&](int64_t index, int64_t next, int thread) {
      if (next <= index) next_is_valid = false;
      enter(index, thread);
    });
  } else {
    pfa::cpu::parallel_for(count, threads, enter);
  }
  bool once = true;
  for (const auto& number : calls) once = once && number == 1;
  expect(once, "every index is worked on once", count, threads);
  expect(threads_are_valid, "a thread has a number of its own", count, threads);
  expect(next_is_valid, "the next index lies behind", count, threads);
}

}  // namespace

int main() {
  for (int64_t count : {0, 1, 2, 3, 5, 63, 64, 65, 200, 1001}) {
    for (int threads : {1, 2, 3, 7, 64, 65, 100}) {
      check(count, threads, false);
      check(count, threads, true);
    }
  }
  std::printf("%d failures\n", failures);
  return failures > 0;
}
