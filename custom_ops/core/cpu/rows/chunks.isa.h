// Stages over rows: rows in chunks, and sums over rows that have the same bits for any number of threads. Rows are cut
// into chunks by their number alone. Each chunk has sums of its own, and these are added in order.

namespace pfa::cpu::PFA_ISA {

constexpr int64_t kMaxRowChunks = 64;
constexpr int64_t kMinChunkRows = 8;

inline int64_t chunk_rows(int64_t rows) { return std::max(kMinChunkRows, ceil_div(rows, kMaxRowChunks)); }

inline int64_t row_chunks(int64_t rows) { return ceil_div(rows, chunk_rows(rows)); }

// Calls f(chunk, first row, end row, thread) for every chunk of rows.
template <class F>
void for_row_chunks(const Context& context, int64_t rows, F&& f) {
  const int64_t size = chunk_rows(rows);
  parallel_for(row_chunks(rows), context.threads,
               [&](int64_t chunk, int thread) { f(chunk, chunk * size, std::min((chunk + 1) * size, rows), thread); });
}

// Sums over rows, one row of [count] for each chunk, kept in the stage's workspace; null where the result is not
// wanted.
template <class A>
struct ChunkSums {
  A* data = nullptr;
  int64_t count = 0;

  ChunkSums() = default;
  ChunkSums(Arena& arena, int64_t rows, int64_t count, bool wanted)
      : data(wanted ? take<A>(arena, row_chunks(rows) * count) : nullptr), count(count) {}

  A* start(int64_t chunk) const {
    if (!data) return nullptr;
    A* sums = data + chunk * count;
    std::fill(sums, sums + count, A(0));
    return sums;
  }

  template <class T>
  void finish(const Context& context, int64_t chunks, T* result) const {
    if (!result) return;
    constexpr int64_t columns = 256;
    parallel_for(ceil_div(count, columns), context.threads, [&](int64_t index, int) {
      const int64_t first = index * columns;
      const int64_t size = std::min(columns, count - first);
      A sums[columns] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const A* row = data + chunk * count + first;
        for (int64_t i = 0; i < size; ++i) sums[i] += row[i];
      }
      store_row(sums, size, result + first);
    });
  }
};

}  // namespace pfa::cpu::PFA_ISA
