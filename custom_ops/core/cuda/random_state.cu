// Seed and offset on their way to the stages that drop something.
#include "core/cuda/stages.h"

namespace pfa {
namespace cuda {
namespace {

__global__ void store_random_state_kernel(uint64_t* random_state, uint64_t seed, uint64_t offset) {
  random_state[0] = seed;
  random_state[1] = offset;
}

}  // namespace

void store_random_state(Context& context, const BlockParams& p) {
  store_random_state_kernel<<<1, 1, 0, context.stream>>>(p.random_state, p.seed, p.offset);
  check_launch("store_random_state_kernel");
}

}  // namespace cuda
}  // namespace pfa
