// Numbers of one float type to another.
#pragma once

#include "core/cuda/context.h"

namespace pfa {
namespace cuda {

// to[i] = from[i], rounded to nearest: from float32 to a 16-bit type, or from a 16-bit type to float32.
void convert(Context& context, DType from_dtype, const void* from, DType to_dtype, void* to, int64_t count);

}  // namespace cuda
}  // namespace pfa
