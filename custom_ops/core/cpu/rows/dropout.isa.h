// Dropout of the elements of a matrix that are numbered row by row (output_random of core/philox.h).

namespace pfa::cpu::PFA_ISA {

// keep[i] = scale where element first + i is kept, else 0.
template <class A>
void keep_row(PhiloxState random, int64_t first, int64_t count, uint32_t threshold, A scale, A* keep) {
  constexpr int lanes = kLanes<uint32_t>;
  const int64_t last_call = (first + count + 7) / 8;
  for (int64_t call = first / 8; call < last_call; call += lanes) {
    const Vec<uint32_t> low = lane_numbers() + static_cast<uint32_t>(call);
    const Vec<uint32_t> carry = low < static_cast<uint32_t>(call) ? broadcast(1u) : Vec<uint32_t>{};
    const PhiloxVectors words =
        philox_vector(random, low, carry + static_cast<uint32_t>(static_cast<uint64_t>(call) >> 32), 0);
    // In memory the words of a call, and the halves of a word, follow each other in the order of the elements.
    uint32_t sequence[4 * lanes];
    for (int i = 0; i < 4; ++i) {
      uint32_t column[lanes];
      store(column, words.w[i]);
      for (int l = 0; l < lanes; ++l) sequence[4 * l + i] = column[l];
    }
    uint16_t numbers[8 * lanes];
    std::memcpy(numbers, sequence, sizeof numbers);
    const int64_t begin = std::max(call * 8, first);
    const int64_t end = std::min((call + lanes) * 8, first + count);
    for (int64_t e = begin; e < end; ++e) keep[e - first] = numbers[e - call * 8] >= threshold ? scale : A(0);
  }
}

// The dropout of one stage of a block.
struct ElementDropout {
  uint32_t threshold;
  double scale;
  PhiloxState random;

  ElementDropout(const Dropout& dropout, const uint64_t* random_state, DropoutStage stage)
      : threshold(dropout.threshold), scale(dropout.scale), random{} {
    if (threshold) random = philox_state(random_state[0], random_state[1], stage);
  }
};

// Multiplies elements first..first + count - 1 by their factors; keep [count] is written over.
template <class A>
void drop_row(const ElementDropout& dropout, int64_t first, int64_t count, A* __restrict row, A* __restrict keep) {
  const A scale = static_cast<A>(dropout.scale);
  if (dropout.threshold) {
    keep_row(dropout.random, first, count, dropout.threshold, scale, keep);
    for (int64_t i = 0; i < count; ++i) row[i] *= keep[i];
  } else if (scale != A(1)) {
    for (int64_t i = 0; i < count; ++i) row[i] *= scale;
  }
}

}  // namespace pfa::cpu::PFA_ISA
