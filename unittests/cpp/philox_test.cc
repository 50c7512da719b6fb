// Philox4x32-7 against the known answers that its authors publish with their Random123 library.
#include "core/philox.h"

#include <cstdio>

int main() {
  struct Case {
    uint32_t counter[4], key[2], expected[4];
  };
  const Case cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}},
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
