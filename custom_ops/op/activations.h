// The attribute `activation`: a number of the core's Activation.
#pragma once

#include <cstdint>
#include <string>

#include "core/params.h"
#include "op/checks.h"

namespace pfa::op {

// 0: none, 1: relu, 2: gelu, 3: gelu_tanh, 4: silu.
static_assert(static_cast<int>(Activation::kNone) == 0 && static_cast<int>(Activation::kRelu) == 1 &&
              static_cast<int>(Activation::kGelu) == 2 && static_cast<int>(Activation::kGeluTanh) == 3 &&
              static_cast<int>(Activation::kSilu) == 4);

inline void check_activation(const char* op, int64_t activation, Activation first) {
  const int64_t begin = static_cast<int64_t>(first);
  const int64_t end = static_cast<int64_t>(Activation::kSilu);
  if (activation >= begin && activation <= end) return;
  refuse(op, "ValueError", "activation", "a number from " + std::to_string(begin) + " to " + std::to_string(end),
         std::to_string(activation));
}

}  // namespace pfa::op
