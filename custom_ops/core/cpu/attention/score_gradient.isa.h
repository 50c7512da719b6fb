// The gradient of the scores of a tile, with the probabilities computed again: p = exp(s - score_shift - log_sum_exp)
// and ds = p (r dp - delta), where r are the dropout factors.

namespace pfa::cpu::PFA_ISA {

template <class T>
struct ScoreGradient {
  using A = Accumulator<T>;
  using P = Operand<T>;

  A* score_shift;    // [kQueryTile]
  A* log_sum_exp;    // [kQueryTile]
  A* delta;          // [kQueryTile]
  A* d_probability;  // [kKeyTile][kQueryTile]
  P* probability;    // [kKeyTile][operands(kQueryTile)]: along the queries
  P* d_score;        // [kKeyTile][operands(kQueryTile)]: along the queries
  P* d_score_rows;   // [operands(kKeyTile)][kQueryTile]: along the keys

  // With one number to an operand, results take the place of `scores` and of d_probability.
  ScoreGradient(Arena& arena, A* scores)
      : score_shift(take<A>(arena, kQueryTile)),
        log_sum_exp(take<A>(arena, kQueryTile)),
        delta(take<A>(arena, kQueryTile)),
        d_probability(take<A>(arena, kKeyTile * kQueryTile)) {
    if constexpr (kPaired<T>) {
      probability = take<P>(arena, kKeyTile * kQueryTile / 2);
      d_score = take<P>(arena, kKeyTile * kQueryTile / 2);
      d_score_rows = take<P>(arena, kKeyTile / 2 * kQueryTile);
    } else {
      probability = scores;
      d_score = d_score_rows = d_probability;
    }
  }

  // With memory for the statistics of other queries.
  ScoreGradient with_queries(Arena& arena) const {
    ScoreGradient result = *this;
    for (A** statistic : {&result.score_shift, &result.log_sum_exp, &result.delta}) {
      *statistic = take<A>(arena, kQueryTile);
    }
    return result;
  }

  // From scores and d_probability, the gradient of what is kept of p times the scale of dropout: `probability`, which
  // is r p without that scale, and d_score; with kKeepsExact that takes the place of d_probability, too, unrounded.
  // `width`: the queries in whole vectors.
  template <bool kKeepsExact>
  void compute(int64_t keys, int64_t width, A scale, const A* scores, const uint64_t* kept_bits) const {
    int64_t i = 0;
    for (; i + kTogether * kLanes<A> <= width; i += kTogether * kLanes<A>) {
      compute_columns<kKeepsExact, kTogether>(keys, i, scale, scores, kept_bits);
    }
    for (; i < width; i += kLanes<A>) compute_columns<kKeepsExact, 1>(keys, i, scale, scores, kept_bits);
  }

 private:
  // The same of kCount vectors of queries, from i on.
  template <bool kKeepsExact, int kCount>
  void compute_columns(int64_t keys, int64_t i, A scale, const A* scores, const uint64_t* kept_bits) const {
    constexpr int numbers = kNumbers<T>;
    constexpr int64_t score_stride = kQueryTile / numbers;
    const auto shift_of = load_vectors<kCount>(score_shift + i);
    const auto log_sum_exp_of = load_vectors<kCount>(log_sum_exp + i);
    const auto delta_of = load_vectors<kCount>(delta + i);
    for (int64_t j = 0; j < keys; j += numbers) {
      Vectors<A, kCount> gradient[numbers] = {};
      for (int n = 0; n < numbers && j + n < keys; ++n) {
        const int64_t at = (j + n) * kQueryTile + i;
        const auto p = exp_of_score<T>(load_vectors<kCount>(scores + at) * scale - shift_of - log_sum_exp_of);
        auto kept = p;
        auto d_kept = load_vectors<kCount>(d_probability + at);
        if (kept_bits) {
          kept = keep_lanes(kept_bits + j + n, i, kept);
          d_kept = keep_lanes(kept_bits + j + n, i, d_kept);
        }
        gradient[n] = p * (d_kept - delta_of);
        store_operands(probability + (j + n) * score_stride + i / numbers, kept);
        store_operands(d_score + (j + n) * score_stride + i / numbers, gradient[n]);
        if constexpr (kKeepsExact && kPaired<T>) store(d_probability + at, gradient[n]);
      }
      if constexpr (kPaired<T>) {
        for (int v = 0; v < kCount; ++v) {
          store(d_score_rows + j / 2 * kQueryTile + i + v * kLanes<A>, narrow_pair(gradient[0].v[v], gradient[1].v[v]));
        }
      }
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
