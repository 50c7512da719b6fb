// Exceptions on their way to Paddle, which ends the process on others than its own.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

#include "paddle/common/enforce.h"

namespace pfa::op {

// Throws an exception that Paddle hands on to Python.
[[noreturn]] void raise(const char* op, const common::ErrorSummary& error);

// Runs f. Exceptions of the core and of the checks are made into Paddle's.
template <class F>
auto guarded(const char* op, F&& f) {
  try {
    return f();
  } catch (const std::invalid_argument& error) {
    raise(op, common::errors::InvalidArgument("%s", error.what()));
  } catch (const std::runtime_error& error) {
    raise(op, common::errors::External("%s: %s", op, error.what()));
  } catch (const std::bad_alloc&) {
    raise(op, common::errors::ResourceExhausted("%s: out of memory", op));
  }
}

}  // namespace pfa::op
