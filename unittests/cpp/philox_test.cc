// Philox4x32-10 against the known answers that its authors publish with their Random123 library.
#include "core/philox.h"

#include <cstdio>

int main() {
  struct Case {
    uint32_t counter[4], key[2], expected[4];
  };
  const Case cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  int failures = 0;
  for (const Case& c : cases) {
    const pfa::PhiloxWords words =
        pfa::philox({c.key[0], c.key[1], c.counter[3]}, c.counter[0], c.counter[1], c.counter[2]);
    for (int i = 0; i < 4; ++i) {
      if (words.w[i] != c.expected[i]) {
        std::printf("word %d: expected %08x, got %08x\n", i, c.expected[i], words.w[i]);
        ++failures;
      }
    }
  }
  return failures ? 1 : 0;
}
