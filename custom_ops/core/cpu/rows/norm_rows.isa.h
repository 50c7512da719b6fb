// Row-wise pieces that layer norm and residual share: statistics, normalisation and its gradient, and sums over rows
// that come out the same for any number of threads: rows are cut into chunks by their number alone, each chunk has sums
// of its own, and these are added in order.

namespace pfa::cpu::PFA_ISA {

constexpr int64_t kMaxRowChunks = 64;
constexpr int64_t kMinChunkRows = 8;

inline int64_t chunk_rows(int64_t rows) { return std::max(kMinChunkRows, (rows + kMaxRowChunks - 1) / kMaxRowChunks); }

inline int64_t row_chunks(int64_t rows) { return (rows + chunk_rows(rows) - 1) / chunk_rows(rows); }

// Calls f(chunk, first row, end row, thread) for every chunk of rows.
template <class F>
void for_row_chunks(const Context& context, int64_t rows, F&& f) {
  const int64_t size = chunk_rows(rows);
  parallel_for(row_chunks(rows), context.threads,
               [&](int64_t chunk, int thread) { f(chunk, chunk * size, std::min((chunk + 1) * size, rows), thread); });
}

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

// row = (row - mean) * rstd * scale + bias, with mean and variance over the row; scale and bias may be null.
template <class A>
void normalize_row(A* __restrict row, int64_t count, double epsilon, const A* __restrict scale,
                   const A* __restrict bias, A& mean, A& rstd) {
  mean = row_sum(row, count) / count;
  const A variance = row_squared_distance(row, mean, count) / count;
  rstd = A(1) / std::sqrt(variance + static_cast<A>(epsilon));
  const A shift = mean;
  const A factor = rstd;
  for (int64_t i = 0; i < count; ++i) {
    const A normal = (row[i] - shift) * factor;
    row[i] = normal * (scale ? scale[i] : A(1)) + (bias ? bias[i] : A(0));
  }
}

// row = row * scale + bias; either may be null.
template <class A>
void scale_row(A* __restrict row, int64_t count, const A* __restrict scale, const A* __restrict bias) {
  for (int64_t i = 0; i < count; ++i) row[i] = row[i] * (scale ? scale[i] : A(1)) + (bias ? bias[i] : A(0));
}

// row = (row - mean) * rstd
template <class A>
void standardize_row(A* __restrict row, int64_t count, A mean, A rstd) {
  for (int64_t i = 0; i < count; ++i) row[i] = (row[i] - mean) * rstd;
}

// Turns `gradient` (of the layer norm's output) into the gradient of its input, and adds to the sums for scale and bias
// unless they are null. `normal` is the normalised row before scale and bias.
template <class A>
void normalize_row_backward(const A* __restrict normal, A* __restrict gradient, int64_t count, A rstd,
                            const A* __restrict scale, A* __restrict d_scale, A* __restrict d_bias) {
  if (d_scale) {
    for (int64_t i = 0; i < count; ++i) d_scale[i] += gradient[i] * normal[i];
  }
  if (d_bias) {
    for (int64_t i = 0; i < count; ++i) d_bias[i] += gradient[i];
  }
  if (scale) {
    for (int64_t i = 0; i < count; ++i) gradient[i] *= scale[i];
  }
  const A gradient_mean = row_sum(gradient, count) / count;
  const A projection = row_dot(gradient, normal, count) / count;
  for (int64_t i = 0; i < count; ++i) gradient[i] = (gradient[i] - gradient_mean - normal[i] * projection) * rstd;
}

// Sums over rows, one row of [count] for each chunk, kept in the stage's workspace; null where the result is not
// wanted.
template <class A>
struct ChunkSums {
  A* data = nullptr;
  int64_t count = 0;

  ChunkSums() = default;
  ChunkSums(Arena& arena, int64_t rows, int64_t count, bool wanted)
      : data(wanted ? static_cast<A*>(arena.take(row_chunks(rows) * count * sizeof(A))) : nullptr), count(count) {}

  A* start(int64_t chunk) const {
    if (!data) return nullptr;
    A* sums = data + chunk * count;
    std::fill(sums, sums + count, A(0));
    return sums;
  }

  template <class T>
  void finish(const Context& context, int64_t chunks, T* result) const {
    if (!result) return;
    constexpr int64_t width = 256;
    parallel_for((count + width - 1) / width, context.threads, [&](int64_t index, int) {
      const int64_t first = index * width;
      const int64_t size = std::min(width, count - first);
      A sums[width] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const A* row = data + chunk * count + first;
        for (int64_t i = 0; i < size; ++i) sums[i] += row[i];
      }
      store_row(sums, size, result + first);
    });
  }
};

// `source` [count] of type T as accumulators in the workspace; null stays null.
template <class T, class A = Accumulator<T>>
const A* widen(Arena& arena, const void* source, int64_t count) {
  if (!source) return nullptr;
  if constexpr (std::is_same_v<T, A>) {
    return static_cast<const A*>(source);
  } else {
    A* target = static_cast<A*>(arena.take(count * sizeof(A)));
    if (target) load_row(static_cast<const T*>(source), count, target);
    return target;
  }
}

}  // namespace pfa::cpu::PFA_ISA
