// Which probabilities of a tile dropout keeps, as bits: the random numbers of core/philox.h, a vector of calls at a
// time.

namespace pfa::cpu::PFA_ISA {

// Bit i of kept[j]: whether the element of query first_query + i and key first_key + j is kept. first_query is a
// multiple of 32 and first_key of 16.
inline void keep_tile(const AttentionParams& p, const HeadIndex& head, const ScoreTile& tile, uint64_t* kept) {
  static_assert(kQueryTile == 64, "a row of the tile is a word of bits");
  constexpr int lanes = kLanes<uint32_t>;
  const PhiloxState state = philox_state(p.random_state[0], p.random_state[1], DropoutStage::kAttention);
  // A number is at least the threshold when the word that begins with it is greater than this.
  const Vec<uint32_t> below = broadcast((p.dropout.threshold << 16) - 1);
  const int64_t row_groups = round_up(tile.queries, 16) / 2;
  std::fill(kept, kept + round_up(tile.keys, 16), 0);
  for (int64_t j = 0; j < tile.keys; j += 16) {
    for (int t = 0; t < 4; ++t) {
      const uint32_t c0 = static_cast<uint32_t>((tile.first_key + j) / 16 * 4 + t);
      for (int64_t group = 0; group < row_groups; group += lanes) {
        const Vec<uint32_t> c1 = lane_numbers() + static_cast<uint32_t>(tile.first_query / 2 + group);
        const PhiloxVectors words = philox_vector(state, c0, c1, head.dropout_head);
        for (int word = 0; word < 4; ++word) {
          for (int half = 0; half < 2; ++half) {
            const uint64_t bits = greater_bits(half ? words.w[word] : words.w[word] << 16, below);
            const int64_t key = j + 8 * (word % 2) + 2 * t + half;
            if constexpr (lanes >= 8) {
              // Of x86, where the first byte is the lowest.
              auto* const bytes = reinterpret_cast<unsigned char*>(kept + key) + group / 8 * 2 + word / 2;
              for (int first = 0; first < lanes; first += 8) bytes[first / 8 * 2] = bits >> first & 0xFF;
            } else {
              kept[key] |= bits << (group / 8 * 16 + group % 8 + 8 * (word / 2));
            }
          }
        }
      }
    }
  }
}

}  // namespace pfa::cpu::PFA_ISA
