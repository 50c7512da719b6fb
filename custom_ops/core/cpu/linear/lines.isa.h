// Lines of memory that a product reads next, and asks for some at a time while it multiplies.

namespace pfa::cpu::PFA_ISA {

// Pieces of memory, `bytes` each, which begin `stride` bytes after each other.
struct Lines {
  const char* data = nullptr;
  int64_t pieces = 0;
  int64_t stride = 0;
  int64_t bytes = 0;
  int64_t byte = 0;  // of the first piece, from which on nothing has been asked for

  static constexpr int64_t kLine = 64;

  int64_t lines() const { return pieces * ceil_div(bytes, kLine); }

  // The next `lines`: from `line` on `in_piece` follow each other, then come `piece` at a time, `gap` bytes after each
  // other.
  struct Walk {
    const char* line = nullptr;
    int64_t lines = 0;
    int64_t in_piece = 1;
    int64_t piece = 1;
    int64_t gap = 0;
  };

  // At most `count` of them, for somebody else to ask for.
  Walk take(int64_t count) {
    const int64_t piece = ceil_div(bytes, kLine);
    if (pieces == 0 || piece == 0) return {};
    const int64_t passed = byte / kLine;
    const Walk walk{data + byte, std::min(count, pieces * piece - passed), piece - passed, piece,
                    stride - piece * kLine};
    const int64_t next = passed + walk.lines;
    data += next / piece * stride;
    pieces -= next / piece;
    byte = next % piece * kLine;
    return walk;
  }

  // The next line comes near, if there is one.
  void prefetch() {
    if (pieces == 0) return;
    __builtin_prefetch(data + byte, 0, 2);
    byte += kLine;
    if (byte < bytes) return;
    byte = 0;
    data += stride;
    --pieces;
  }
};

// Lets `count` lines come near before every `step` steps.
struct Prefetch {
  static constexpr bool fetches_result = true;
  Lines& lines;
  int64_t count;
  int64_t step;
  void operator()() const {
    for (int64_t i = 0; i < count; ++i) lines.prefetch();
  }
};

// The lines come near in the course of `tiles` tiles of `depth` steps: a few at a time, since more would make the
// product wait. Steps of narrow vectors are short, so there these are asked for as seldom as that allows.
inline Prefetch spread(Lines& lines, int64_t tiles, int64_t depth) {
  int64_t step = 4;
  if (PFA_VECTOR_BYTES == 32) {
    constexpr int64_t few = 8;
    step = std::clamp<int64_t>(few * tiles * depth / std::max<int64_t>(lines.lines(), 1) / 16 * 16, 16, 128);
  }
  return {lines, ceil_div(lines.lines(), tiles * ceil_div(depth, step)), step};
}

// The lines of `count` numbers along k, from k on, of rows first..first + rows - 1.
template <class T>
inline Lines lines_of(const MatrixView<T>& view, int64_t first, int64_t rows, int64_t k, int64_t count) {
  constexpr int64_t size = sizeof(T);
  const auto* data = reinterpret_cast<const char*>(view.data + first * view.stride + k * view.depth_stride);
  if (view.depth_stride == 1) return {data, rows, view.stride * size, count * size};
  return {data, rows > 0 ? count : 0, view.depth_stride * size, rows * size};
}

}  // namespace pfa::cpu::PFA_ISA
