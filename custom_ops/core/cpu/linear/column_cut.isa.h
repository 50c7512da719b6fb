// How the columns of a product are cut into units of work: all of one width, or in slices, one for each thread, of wide
// units and then narrow ones.

namespace pfa::cpu::PFA_ISA {

struct ColumnCut {
  struct Piece {
    int64_t first, count;
  };

  int64_t columns;     // of the product
  int64_t width;       // of a unit
  int64_t slice;       // columns of each slice, but that the last may have fewer
  int64_t wide_units;  // that a slice begins with
  int64_t last_width;  // of each unit after them

  static ColumnCut evenly(int64_t columns, int64_t width) {
    const int64_t slice = round_up(std::max<int64_t>(columns, 1), width);
    return {columns, width, slice, slice / width, width};
  }

  // A thread begins with a slice: where threads wrote neighbouring columns, each core would fetch ahead what the other
  // is about to write. The narrow units let threads end together.
  static ColumnCut by_thread(int64_t columns, int64_t width, int64_t last_width, int threads) {
    const int64_t slice = round_up(ceil_div(std::max<int64_t>(columns, 1), threads), last_width);
    const int64_t wide = threads == 1 ? slice : slice - last_width;
    return {columns, width, slice, wide / width, last_width};
  }

  int64_t units() const { return ceil_div(columns, slice) * units_of_slice(); }

  // The last units of the last slice may have no columns.
  Piece unit(int64_t index) const {
    const int64_t in_slice = index % units_of_slice();
    const int64_t wide = std::min(in_slice, wide_units);
    const int64_t first = index / units_of_slice() * slice + wide * width + (in_slice - wide) * last_width;
    const int64_t most = in_slice < wide_units ? width : last_width;
    return {first, std::max<int64_t>(0, std::min(most, columns - first))};
  }

 private:
  int64_t units_of_slice() const { return wide_units + ceil_div(slice - wide_units * width, last_width); }
};

}  // namespace pfa::cpu::PFA_ISA
