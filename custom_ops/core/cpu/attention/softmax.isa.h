// Softmax over the keys of every query, a tile of keys at a time (online softmax: Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018). Probabilities are relative to the highest score so far; when that rises,
// what was summed before has to be rescaled.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct OnlineSoftmax {
  using A = Accumulator<T>;
  using P = Operand<T>;

  A* maximum;  // [kQueryTile] the highest score so far
  A* sum;      // [kQueryTile] of exp(score - maximum)
  A* rescale;  // [kQueryTile] exp(old maximum - new maximum) of the last tile

  explicit OnlineSoftmax(Arena& arena)
      : maximum(take<A>(arena, kQueryTile)), sum(take<A>(arena, kQueryTile)), rescale(take<A>(arena, kQueryTile)) {}

  // `width`: the queries in whole vectors.
  void start(int64_t width) const {
    std::fill(maximum, maximum + width, -std::numeric_limits<A>::infinity());
    std::fill(sum, sum + width, A(0));
  }

  // Turns scores [keys][kQueryTile] into probabilities [operands(keys)][kQueryTile], of which those that are not `kept`
  // are 0; these may lie where the scores are.
  void add_tile(int64_t keys, int64_t width, const A* scores, const uint64_t* kept, P* probabilities) const {
    constexpr int numbers = kNumbers<T>;
    for (int64_t i = 0; i < width; i += kLanes<A>) {
      const Vec<A> old_maximum = load(maximum + i);
      Vec<A> new_maximum = old_maximum;
      for (int64_t j = 0; j < keys; ++j) new_maximum = vmax<A>(load(scores + j * kQueryTile + i), new_maximum);
      const Vec<A> finite = new_maximum == -std::numeric_limits<A>::infinity() ? Vec<A>{} : new_maximum;
      Vec<A> tile_sum{};
      for (int64_t j = 0; j < keys; j += numbers) {
        Vec<A> probability[numbers] = {};
        for (int n = 0; n < numbers && j + n < keys; ++n) {
          probability[n] = vexp(load(scores + (j + n) * kQueryTile + i) - finite);
          tile_sum += probability[n];
          if (kept) probability[n] = keep_lanes<A>(kept + j + n, i, probability[n]);
        }
        P* target = probabilities + j / numbers * kQueryTile + i;
        if constexpr (kPaired<T>) {
          store(target, narrow_pair(probability[0], probability[1]));
        } else {
          store(target, probability[0]);
        }
      }
      const Vec<A> factor = vexp(old_maximum - finite);
      store(maximum + i, new_maximum);
      store(sum + i, load(sum + i) * factor + tile_sum);
      store(rescale + i, factor);
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
