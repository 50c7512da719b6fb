// The stages for any processor of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "core/cpu/isa/instruction_sets.h"
#include "core/cpu/isa/system_headers.h"

#define PFA_ISA baseline
#define PFA_VECTOR_BYTES 16
#include "core/cpu/isa/stages.isa.h"

namespace pfa::cpu {
constexpr Implementation kBaseline = baseline::make_implementation("baseline", []() -> const char* { return nullptr; });
}  // namespace pfa::cpu
