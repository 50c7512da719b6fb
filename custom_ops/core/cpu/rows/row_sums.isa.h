// Sums over one row, as a sum on each lane and then of the lanes.

namespace pfa::cpu::PFA_ISA {

template <class A>
A row_sum(const A* row, int64_t count) {
  Vec<A> sum{};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) sum += load(row + i);
  A total = horizontal_sum<A>(sum);
  for (; i < count; ++i) total += row[i];
  return total;
}

template <class A>
A row_dot(const A* a, const A* b, int64_t count) {
  Vec<A> sum{};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) sum += load(a + i) * load(b + i);
  A total = horizontal_sum<A>(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

template <class A>
A row_squared_distance(const A* row, A mean, int64_t count) {
  Vec<A> sum{};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    const Vec<A> distance = load(row + i) - mean;
    sum += distance * distance;
  }
  A total = horizontal_sum<A>(sum);
  for (; i < count; ++i) total += (row[i] - mean) * (row[i] - mean);
  return total;
}

}  // namespace pfa::cpu::PFA_ISA
