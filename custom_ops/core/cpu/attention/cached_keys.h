// The stage of cached_attention_block.h that is its own.
#pragma once

#include "core/cached_attention_block.h"
#include "core/cpu/context.h"

namespace pfa::cpu {

void append_keys(Context& context, const CachedAttentionParams& p);

}  // namespace pfa::cpu
