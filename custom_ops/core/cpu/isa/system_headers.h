// What the stages include from outside. It comes before the instruction set is raised, so that no function shared with
// other files is compiled for a processor that may not be there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/arena.h"
#include "core/arranged_weights.h"
#include "core/attention_block.h"
#include "core/cpu/context.h"
#include "core/cpu/parallel.h"
#include "core/params.h"
#include "core/philox.h"
#include "core/qkv_layout.h"
#include "core/rounding_residue.h"
#include "core/visibility.h"

#define PFA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PFA_BEGIN_TARGET(features) \
  PFA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PFA_BEGIN_WIDE_TARGET(features) PFA_BEGIN_TARGET(features)
#define PFA_END_TARGET PFA_PRAGMA(clang attribute pop)
#else
#define PFA_BEGIN_TARGET(features) PFA_PRAGMA(GCC push_options) PFA_PRAGMA(GCC target(features))
// GCC takes half of AVX-512's vectors unless told otherwise.
#define PFA_BEGIN_WIDE_TARGET(features) PFA_BEGIN_TARGET(features) PFA_PRAGMA(GCC target("prefer-vector-width=512"))
#define PFA_END_TARGET
#endif
