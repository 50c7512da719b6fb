// Dropout masks: Philox4x32-7 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as a
// function of (seed, offset, stage, element), the same on every device and for every tiling. Seven rounds are the
// fewest with which its authors found it to pass TestU01's BigCrush.
//
// One call gives four 32-bit words, that is eight 16-bit numbers; an element is kept when its number is >= the
// threshold. With n = 2 * offset + stage (64 bits; stage 0: attention, or the hidden activations of a feed-forward
// block; 1: output dropout), the key is (low(seed), high(seed) + high(n)) and the counter is (c0, c1, c2, low(n)).
//
// Attention, element (b, h, i, j), with H the heads of the whole layer and h counted among them: c0 = (j / 16) * 4 + (j
// % 8) / 2, c1 = (i / 16) * 8 + i % 8, c2 = b * H + h, and the number is half j % 2 (0: low 16 bits) of word ((i % 16)
// / 8) * 2 + (j % 16) / 8. So the eight numbers of a call are those that one thread of a tensor-core instruction holds
// of a 16 x 16 tile of scores, and row-major CPU code reads whole vectors. Output, and hidden activations, element
// (row, column) of [M, E] with index e = row * E + column, where E is the width of the whole layer: c0, c1 = low,
// high(e / 8), c2 = 0, and the number is half e % 2 of word (e % 8) / 2.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace pfa {

enum class DropoutStage : uint32_t { kAttention = 0, kHidden = 0, kOutput = 1 };

struct PhiloxState {
  uint32_t key0;
  uint32_t key1;
  uint32_t counter3;
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

PFA_HOST_DEVICE PhiloxState philox_state(uint64_t seed, uint64_t offset, DropoutStage stage) {
  const uint64_t n = 2 * offset + static_cast<uint32_t>(stage);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(n >> 32),
          static_cast<uint32_t>(n)};
}

struct PhiloxWords {
  uint32_t w[4];
};

PFA_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  // nvcc makes a 64-bit product of the plain one, with an addition of 0 after it.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

PFA_HOST_DEVICE PhiloxWords philox(PhiloxState state, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t c3 = state.counter3;
  uint32_t k0 = state.key0;
  uint32_t k1 = state.key1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = wide_product(kPhiloxM0, c0);
    const uint64_t product1 = wide_product(kPhiloxM1, c2);
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The 16-bit number of attention element (bh = b * H + h, i, j).
PFA_HOST_DEVICE uint32_t attention_random(PhiloxState state, uint32_t bh, int64_t i, int64_t j) {
  const uint32_t c0 = static_cast<uint32_t>((j / 16) * 4 + (j % 8) / 2);
  const uint32_t c1 = static_cast<uint32_t>((i / 16) * 8 + i % 8);
  const int word = static_cast<int>((i % 16) / 8 * 2 + (j % 16) / 8);
  return (philox(state, c0, c1, bh).w[word] >> (16 * (j % 2))) & 0xFFFFu;
}

// The 16-bit number of output or hidden element `index` = row * E + column.
PFA_HOST_DEVICE uint32_t output_random(PhiloxState state, int64_t index) {
  const uint64_t call = static_cast<uint64_t>(index) / 8;
  const PhiloxWords words = philox(state, static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), 0);
  return (words.w[(index % 8) / 2] >> (16 * (index % 2))) & 0xFFFFu;
}

}  // namespace pfa
