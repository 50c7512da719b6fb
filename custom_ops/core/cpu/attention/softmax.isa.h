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

  // Turns scores [keys][kQueryTile], times a scale above 0, into probabilities [operands(keys)][kQueryTile], of which
  // those that are not `kept` are 0; these may lie where the scores are.
  void add_tile(int64_t keys, int64_t width, A scale, const A* scores, const uint64_t* kept, P* probabilities) const {
    int64_t i = 0;
    for (; i + kTogether * kLanes<A> <= width; i += kTogether * kLanes<A>) {
      add_columns<kTogether>(keys, i, scale, scores, kept, probabilities);
    }
    for (; i < width; i += kLanes<A>) add_columns<1>(keys, i, scale, scores, kept, probabilities);
  }

 private:
  // The same of kCount vectors of queries, from i on.
  template <int kCount>
  void add_columns(int64_t keys, int64_t i, A scale, const A* scores, const uint64_t* kept, P* probabilities) const {
    constexpr int numbers = kNumbers<T>;
    const auto old_maximum = load_vectors<kCount>(maximum + i);
    auto highest = old_maximum - std::numeric_limits<A>::infinity();
    for (int64_t j = 0; j < keys; ++j) {
      const auto score = load_vectors<kCount>(scores + j * kQueryTile + i);
      highest = each<kCount>([&](int n) { return vmax<A>(score.v[n], highest.v[n]); });
    }
    highest = highest * scale;
    const auto new_maximum = each<kCount>([&](int n) { return vmax<A>(highest.v[n], old_maximum.v[n]); });
    const auto finite = each<kCount>(
        [&](int n) { return new_maximum.v[n] == -std::numeric_limits<A>::infinity() ? Vec<A>{} : new_maximum.v[n]; });
    Vectors<A, kCount> tile_sum{};
    for (int64_t j = 0; j < keys; j += numbers) {
      Vectors<A, kCount> probability[numbers] = {};
      for (int n = 0; n < numbers && j + n < keys; ++n) {
        probability[n] = exp_of_score<T>(load_vectors<kCount>(scores + (j + n) * kQueryTile + i) * scale - finite);
        tile_sum = tile_sum + probability[n];
        if (kept) probability[n] = keep_lanes(kept + j + n, i, probability[n]);
      }
      P* target = probabilities + j / numbers * kQueryTile + i;
      if constexpr (kPaired<T>) {
        for (int v = 0; v < kCount; ++v) {
          store(target + v * kLanes<A>, narrow_pair(probability[0].v[v], probability[1].v[v]));
        }
      } else {
        store(target, probability[0]);
      }
    }
    const auto factor = exp_of_score<T>(old_maximum - finite);
    store(maximum + i, new_maximum);
    store(sum + i, load_vectors<kCount>(sum + i) * factor + tile_sum);
    store(rescale + i, factor);
  }
};

}  // namespace pfa::cpu::PFA_ISA
