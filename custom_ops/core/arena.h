// Pieces of one block of memory, one after another. Memory is planned by walking an Arena twice: once from null to
// learn the size, once over the memory to place pointers.
#pragma once

#include <cstddef>

namespace pfa {

class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  void* take(size_t bytes) {
    void* result = base_ ? base_ + used_ : nullptr;
    used_ += aligned(bytes);
    return result;
  }

  size_t used() const { return used_; }

  // What a piece of `bytes` uses.
  static size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  static constexpr size_t kAlignment = 256;
  char* base_;
  size_t used_ = 0;
};

}  // namespace pfa
