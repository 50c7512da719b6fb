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
  void compute(int64_t keys, int64_t width, const A* scores, const uint64_t* kept_bits) const {
    constexpr int numbers = kNumbers<T>;
    constexpr int64_t score_stride = kQueryTile / numbers;
    for (int64_t i = 0; i < width; i += kLanes<A>) {
      const Vec<A> shift_of = load(score_shift + i);
      const Vec<A> log_sum_exp_of = load(log_sum_exp + i);
      const Vec<A> delta_of = load(delta + i);
      for (int64_t j = 0; j < keys; j += numbers) {
        Vec<A> gradient[numbers] = {};
        for (int n = 0; n < numbers && j + n < keys; ++n) {
          const int64_t at = (j + n) * kQueryTile + i;
          const Vec<A> p = vexp(load(scores + at) - shift_of - log_sum_exp_of);
          Vec<A> kept = p;
          Vec<A> d_kept = load(d_probability + at);
          if (kept_bits) {
            kept = keep_lanes<A>(kept_bits + j + n, i, kept);
            d_kept = keep_lanes<A>(kept_bits + j + n, i, d_kept);
          }
          gradient[n] = p * (d_kept - delta_of);
          store_operands(probability + (j + n) * score_stride + i / numbers, kept);
          store_operands(d_score + (j + n) * score_stride + i / numbers, gradient[n]);
          if constexpr (kKeepsExact && kPaired<T>) store(d_probability + at, gradient[n]);
        }
        if constexpr (kPaired<T>) store(d_score_rows + j / 2 * kQueryTile + i, narrow_pair(gradient[0], gradient[1]));
      }
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA
