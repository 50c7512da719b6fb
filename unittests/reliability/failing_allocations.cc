// Put before the C library (LD_PRELOAD), it lets one allocation fail: of those of whole pages, which are Paddle's for
// tensors, and of operator new called from a library's own code.
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

extern "C" void* __libc_memalign(size_t alignment, size_t size);

namespace {

constexpr size_t kPage = 4096;

volatile bool counts = false;
int64_t seen, last;  // of allocations; the one that fails
uintptr_t code_begin, code_end;

bool fails() { return counts && __atomic_fetch_add(&seen, 1, __ATOMIC_RELAXED) == last; }

bool is_from_library(const void* caller) {
  const auto address = reinterpret_cast<uintptr_t>(caller);
  return code_begin <= address && address < code_end;
}

}  // namespace

extern "C" {

// Of the allocations from now on the one of this number fails, from 0.
void fail_allocation(int64_t number, uintptr_t begin, uintptr_t end) {
  seen = 0;
  last = number;
  code_begin = begin;
  code_end = end;
  counts = true;
}

// How many there were since then.
int64_t count_allocations() {
  counts = false;
  return seen;
}

int posix_memalign(void** memory, size_t alignment, size_t size) {
  if (alignment >= kPage && fails()) return ENOMEM;
  *memory = __libc_memalign(alignment, size);
  return *memory ? 0 : ENOMEM;
}

}  // extern "C"

void* operator new(size_t size) {
  void* const memory = is_from_library(__builtin_return_address(0)) && fails() ? nullptr : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}
