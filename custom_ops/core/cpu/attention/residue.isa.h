// What rounding to 16 bits took from rows of attention's result (rounding_residue.h), written and read a row at a time.

namespace pfa::cpu::PFA_ISA {

constexpr int64_t kResiduePiece = 64;  // numbers; their residues are spread out between numbers and words
static_assert(kResiduePiece % kResiduesInWord == 0 && kResiduePiece % kLanes<uint32_t> == 0);

// words [ceil(count / kResiduesInWord)] of values [count] that were rounded to `rounded`. Not inline, as store_row.
template <class T>
[[gnu::noinline]] void encode_residues(RoundingResidue rounding, int64_t count, const float* __restrict values,
                                       const T* __restrict rounded, uint32_t* __restrict words) {
  constexpr int64_t lanes = kLanes<uint32_t>;
  constexpr auto indices = std::make_integer_sequence<int, lanes>{};
  constexpr int64_t step = std::max(lanes, kResiduesInWord);
  for (int64_t first = 0; first < count; first += kResiduePiece) {
    const int64_t numbers = std::min(kResiduePiece, count - first);
    float widened[kResiduePiece];
    load_row(rounded + first, numbers, widened);
    uint32_t residues[kResiduePiece];
    for (int64_t i = 0; i < numbers; ++i) residues[i] = rounding.encode(values[first + i], widened[i]);
    std::fill(residues + numbers, residues + round_up(numbers, step), 0u);
    for (int64_t i = 0; i < numbers; i += step) {
      Vec<uint32_t> word{};  // each lane with its share of the word
      for (int64_t j = 0; j < step; j += lanes) {
        word |= load(residues + i + j) << ((lane_numbers() + static_cast<uint32_t>(j)) % kResiduesInWord * 4);
      }
      word |= swap_lanes<1, uint32_t>(word, indices);
      word |= swap_lanes<2, uint32_t>(word, indices);
      if constexpr (lanes >= kResiduesInWord) word |= swap_lanes<4, uint32_t>(word, indices);
      for (int64_t j = 0; j < std::min(step, numbers - i); j += kResiduesInWord) {
        words[(first + i + j) / kResiduesInWord] = word[j];
      }
    }
  }
}

// Adds to values [count], rounded ones, what words of residues say.
[[gnu::noinline]] inline void add_residues(RoundingResidue rounding, int64_t count, const uint32_t* __restrict words,
                                           float* __restrict values) {
  for (int64_t first = 0; first < count; first += kResiduePiece) {
    const int64_t numbers = std::min(kResiduePiece, count - first);
    uint32_t residues[kResiduePiece];
    for (int64_t i = 0; i < numbers; i += kResiduesInWord) {
      const uint32_t word = words[(first + i) / kResiduesInWord];
      for (int64_t j = 0; j < kResiduesInWord; ++j) residues[i + j] = word >> 4 * j & 15u;
    }
    for (int64_t i = 0; i < numbers; ++i) values[first + i] += rounding.decode(residues[i], values[first + i]);
  }
}

}  // namespace pfa::cpu::PFA_ISA
