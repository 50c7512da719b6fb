// A copy of a mask that the copy engine cannot read (mask.cuh): of int64 elements, or of rows that begin anywhere. It
// costs a pass over the mask, which would else be read with every head that it broadcasts over, and slowly. What counts
// of int64 elements is whether they are zero: their copy is a byte each, from which backward gains as well.
#pragma once

#include "core/arena.h"
#include "core/cuda/attention/args.h"
#include "core/cuda/context.h"

namespace pfa {
namespace cuda {
namespace hopper {

// Places the copy in `arena`, if one is needed, and is no larger than the pass's result; else its strides are zero.
Mask place_mask_copy(Arena& arena, const AttentionArgs& args, bool backward);

// Queues the kernel that makes it, if there is one, and has `args` read it.
void use_mask_copy(const Context& context, const Mask& copy, AttentionArgs& args);

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
