// What the operator accepts. Shapes may have unknown dimensions (-1, in static graphs), which agree with anything.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "attributes.h"

namespace pfa::op {

using Shape = std::vector<int64_t>;

// Throw std::invalid_argument whose message begins "[custom_fused_attention] ValueError: " or "... TypeError: ", for Python to raise
// as that, then names the argument, what was expected and what came.
void check_shapes(const std::array<const Shape*, kInputs>& shapes, const Attributes& attributes);
void check_dtypes(const std::array<std::string, kInputs>& dtypes, const Attributes& attributes);

}  // namespace pfa::op
