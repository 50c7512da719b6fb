// The rows that a thread reads or writes next, of several tensors: while products run they come near, a few lines at a
// time. A head's rows are so far apart that nothing else fetches them.

namespace pfa::cpu::PFA_ISA {

class ComingRows {
 public:
  // What a product does before each of its register tiles.
  struct Fetch {
    ComingRows& rows;
    static constexpr bool fetches_result = false;
    static constexpr int64_t step = std::numeric_limits<int64_t>::max();
    void operator()() const {
      if (rows.next_ != rows.end_) rows.fetch();
    }
  };
  Fetch fetching() { return {*this}; }

  // Instead of what was to come before.
  void clear() { next_ = end_ = 0; }

  // Rows first..first + count - 1, of head_dim numbers.
  template <class T>
  void add(const HeadRows<T>& rows, int64_t first, int64_t count, int64_t head_dim) {
    if (count <= 0 || end_ == kMost) return;
    constexpr int64_t size = sizeof(T);
    coming_[end_++] = {reinterpret_cast<const char*>(rows.row(first)), rows.stride * size, head_dim * size, count};
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kLinesAtOnce = kHasWideTiles ? 6 : 4;  // of such tiles there are fewer
  static constexpr int kMost = 12;

  struct Rows {
    const char* data;
    int64_t stride;
    int64_t bytes;
    int64_t count;
  };

  void fetch() {
    Rows& rows = coming_[next_];
    int64_t lines = kLinesAtOnce;
    do {
      for (int64_t byte = 0; byte < rows.bytes; byte += kLine) __builtin_prefetch(rows.data + byte, 0, 2);
      rows.data += rows.stride;
      if (--rows.count == 0) {
        ++next_;
        return;
      }
      lines -= ceil_div(rows.bytes, kLine);
    } while (lines > 0);
  }

  Rows coming_[kMost];
  int next_ = 0;
  int end_ = 0;
};

}  // namespace pfa::cpu::PFA_ISA
