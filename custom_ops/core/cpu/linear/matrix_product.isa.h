// Matrix products of any size by all threads: c = op(a) @ op(b) + bias + addend. 16-bit numbers are widened, or paired,
// on the way in and rounded on the way out.
//
// b is packed into panels (panels.isa.h) once, by all threads; or, where c has few rows, by each thread some panels at
// a time, or is read where it lies (weight_stream.isa.h), or changes places with a; or it comes arranged as panels.
// With few rows b, the weight, comes from memory no faster than it is multiplied, so each thread prefetches what it
// takes next. a's rows are read where they lie, for the inner loop broadcasts their numbers one by one; where they
// can't be, each thread copies or packs those that it works at. c is cut into units, rectangles that one thread takes
// at a time; a unit is made of products of some rows of a with one panel of b, or two, whose sums are held in registers
// (register_tile.isa.h, wide_tile.isa.h) or on the tiles of AMX (tile_products.isa.h). The sum over k runs in its order
// for every element of c, whatever the units: the bits do not depend on the number of threads.

namespace pfa::cpu::PFA_ISA {

// c [m, n], row-major, = a [m, k] @ b [n, k]^T + bias [n] + addend [m, n]. bias and addend may be null; addend may be
// c. `step`, if there is one and R is T, makes of that what goes to c.
template <class T, class R>
struct Product {
  int64_t m, n, k;
  MatrixView<T> a;
  MatrixView<T> b;
  const T* bias;
  const R* addend;
  R* c;
  const ActivationStep<T>* step = nullptr;
  bool transposes_c = false;   // c [n, m] and bias [m]; without addend and step
  bool is_b_arranged = false;  // b.data is an ArrangedMatrix; nothing else of b counts
};

template <class T, class R>
class MatrixProduct {
 public:
  using P = Operand<T>;

  // For the product with an addend or a step, and without: its orientation depends on them.
  static size_t workspace_bytes(const Context& context, Product<T, R> product) {
    product.addend = nullptr;
    product.step = nullptr;
    const Product<T, R> turned = oriented(context, product);
    const size_t bytes = bytes_as_it_is(context, product);
    return turned.transposes_c ? std::max(bytes, bytes_as_it_is(context, turned)) : bytes;
  }

  static void run(const Context& context, const Product<T, R>& product, void* workspace) {
    MatrixProduct work(context, oriented(context, product));
    Arena arena(workspace);
    work.place(arena);
    work.multiply();
  }

 private:
  using A = Accumulator<T>;
  static constexpr int kVectors = 2;
  static constexpr int64_t kPanelColumns = kVectors * kLanes<A>;
  static constexpr int64_t kPanelRows = kRegisterTileRows[kVectors];
  // Two panels with half as many rows are a wide tile.
  static constexpr int64_t kWideRows = kPanelRows / 2;
  static constexpr int64_t kWideColumns = 2 * kPanelColumns;
  static_assert(!kHasWideTiles || (kWideRows == kMostWideRows && 2 * kVectors == kWideVectors));
  static constexpr int64_t kMaxPanelRows = kHasTileProducts<T> ? std::max(kPanelRows, kTileProductRows) : kPanelRows;
  static constexpr bool kNarrows = !std::is_same_v<R, A>;
  // A run of k such that a unit's panels of a and two of b stay in the L2 cache: the inner loop takes few enough bytes
  // for a multiply-add to have them from there. The longer the run, the less often sums are read and written.
  static constexpr int64_t kMaxRun = 384 * kNumbers<T>;
  // On tiles a panel of a and one of b stay in the L1 cache.
  static constexpr int64_t kMaxTileRun = 256;
  static constexpr int64_t kMaxRows = 144;
  // Of a unit, so that its sums are still in the L2 cache when it is finished (only where a is packed for every unit
  // and the sums go to c, wider units are better); and where a thread reads b by itself.
  static constexpr int64_t kMaxColumns = 384;
  static constexpr int64_t kMaxUnsharedColumns = 128;
  // Of b that a thread packs at a time where columns lie beside each other: so much of each row that memory and the
  // tables of pages keep up, and so little that it stays in the L2 cache.
  static constexpr int64_t kStripColumns = std::max<int64_t>(kPanelColumns, 64);
  // With so few rows b is read in its order. By wide tiles panels are faster from fewer rows on, unless b is widened.
  static constexpr int64_t kMostStreamedRows = !kHasWideTiles ? kMaxStreamedRows : std::is_same_v<T, P> ? 8 : 12;
  // With so few rows a product reads b in place, if it lies as panels do and a panel's rows are some lines each: pages
  // apart, single lines come slowly and are all in the same few lines of the caches.
  static constexpr int64_t kFewRows = kPanelColumns * sizeof(P) >= 128 ? 64 : 0;
  // So few rows read an arranged b by its own panels, if the sums fit the registers: its lines come without being asked
  // for when they are read one after another.
  static constexpr int64_t kFewestRows = 2;
  static constexpr int kArrangedVectors = kArrangedColumns / kLanes<A>;
  static constexpr bool kHasWidePanels = ArrangedMatrix<T>::kReadInPlace && kPanelColumns < kArrangedColumns &&
                                         kFewestRows * kArrangedVectors <= kPanelRows * kVectors;
  // Rows that are so many bytes apart, or a multiple of it, would all be in the same few lines of the L1 cache.
  static constexpr int64_t kAliasingStride = 4096;
  // b is packed for at most so many k at a time, or for as many as c has rows: so what is packed is moderate, or not
  // larger than c.
  static constexpr int64_t kMaxSpan = 4096;

  static size_t bytes_as_it_is(const Context& context, const Product<T, R>& product) {
    Arena arena;
    MatrixProduct(context, product).place(arena);
    return arena.used();
  }

  // The product of which that is made: for few rows and a weight that would be packed against its order, c^T = b @ a^T.
  // The bits are the same. With one number to an operand packing takes too small a part of the time.
  static Product<T, R> oriented(const Context& context, const Product<T, R>& product) {
    const bool has_tiles = has_tile_products<T>(context);
    if (!kPaired<T> || has_tiles || product.is_b_arranged || product.m > kMaxRows || product.n < product.m ||
        product.k == 0 || product.addend || product.step || !can_be_read_in_place(product.b) ||
        aliases(product.b.stride)) {
      return product;
    }
    return {product.n, product.m, product.k, product.b, product.a, product.bias, nullptr, product.c, nullptr, true};
  }

  // Decides how the work is cut. Of that only run_ reaches the bits of the result, and it depends on k alone.
  MatrixProduct(const Context& context, const Product<T, R>& product)
      : product_(product),
        threads_(context.threads),
        tiles_(has_tile_products<T>(context)),
        panel_rows_(tiles_ ? kTileProductRows : kPanelRows),
        depth_step_(tiles_ ? kTileProductDepth : 1) {
    const int64_t k = product_.k;
    const int64_t runs = std::max<int64_t>(1, ceil_div(k, tiles_ ? kMaxTileRun : kMaxRun));
    run_ = round_up(std::max<int64_t>(1, ceil_div(k, runs)), 2 * kNumbers<T> * depth_step_);
    reads_a_ = can_be_read_in_place(product_.a) && !aliases(product_.a.stride) && (!tiles_ || has_whole_tiles_of_a());
    copies_a_ = !tiles_ && !reads_a_ && !kPaired<T> && product_.a.depth_stride == 1;
    has_few_rows_ = product_.m <= kMaxRows;
    streams_b_ = can_stream_b();
    if (streams_b_) {
      reads_b_ = true;
    } else if (product_.is_b_arranged) {
      reads_b_ = ArrangedMatrix<T>::kReadInPlace && (has_few_rows_ || kPanelColumns == kArrangedColumns);
    } else {
      reads_b_ = !tiles_ && std::is_same_v<T, P> && product_.b.stride == 1 && product_.m <= kFewRows &&
                 !aliases(product_.b.depth_stride);
    }
    shares_b_ = !has_few_rows_ && !reads_b_;
    span_ = !shares_b_ || k <= std::max(product_.m, kMaxSpan) ? k : kMaxSpan / run_ * run_;

    rows_ = std::min(kMaxRows / panel_rows_ * panel_rows_, round_up(std::max<int64_t>(product_.m, 1), panel_rows_));
    // Of an arranged b whole panels are taken, so that its lines come in their order.
    const bool takes_arranged_panels = product_.is_b_arranged && reads_b_;
    const int64_t step = takes_arranged_panels ? std::max(kPanelColumns, kArrangedColumns) : kPanelColumns;
    strip_columns_ = step;
    int64_t columns = round_up(std::max<int64_t>(product_.n, 1), step);  // of a unit
    if (streams_b_ && product_.b.stride == 1) {
      // As many units for each thread, and long pieces of b's rows.
      const int64_t units = round_up(ceil_div(columns, streamed_columns(product_.m)), threads_);
      cut_ = ColumnCut::evenly(product_.n, round_up(ceil_div(columns, units), step));
      return;
    }
    if (has_own_sums() || reads_a_) columns = std::min(columns, kMaxColumns);
    if (has_few_rows_) columns = std::min(columns, kMaxUnsharedColumns);
    // Where there are few rows, these are cut last: each cut reads all of b once more. Columns may then be cut
    // finely, and threads end together; on tiles a panel by itself is too little work for that.
    const int64_t least_columns = std::max((!has_few_rows_ || !reads_a_ || tiles_ ? 4 : 1) * kPanelColumns, step);
    const bool packs_strips = !shares_b_ && !reads_b_ && (product_.is_b_arranged || product_.b.stride == 1);
    const auto has_fewer_units = [&](int64_t count) { return row_units() * ceil_div(product_.n, columns) < count; };
    while (has_fewer_units((has_few_rows_ ? 16 : 4) * threads_) &&
           columns > (packs_strips ? kStripColumns : least_columns)) {
      columns = round_up(columns / 2, step);
    }
    while (has_fewer_units(2 * threads_) && columns > least_columns) columns = round_up(columns / 2, step);
    if (kHasWideTiles && !tiles_ && has_few_rows_ && !streams_b_ && !transposes_c()) {
      strip_columns_ = kWideColumns;
      columns = reads_a_ ? kWideColumns : 2 * kWideColumns;  // rows that are copied are copied for each unit
      cut_ = ColumnCut::by_thread(product_.n, columns, step, threads_);
    } else {
      if (packs_strips) strip_columns_ = std::min(columns, kStripColumns);
      cut_ = ColumnCut::evenly(product_.n, columns);
    }
    while (units() < 4 * threads_ && rows_ > 2 * panel_rows_) rows_ = round_up(rows_ / 2, panel_rows_);
  }

  // Rows of a have a stride, in place or copied; else panels of them are packed.
  bool has_rows_of_a() const { return reads_a_ || copies_a_; }

  // Whether b, a weight as a user keeps it, is read in its order.
  bool can_stream_b() const {
    const int64_t most_rows = product_.b.stride == 1 ? kMostStreamedRows : kMaxTransposedRows;
    return !kPaired<T> && !product_.is_b_arranged && has_rows_of_a() && product_.m <= most_rows;
  }

  bool transposes_c() const { return kPaired<T> && product_.transposes_c; }
  bool has_own_sums() const { return kNarrows || transposes_c(); }  // else they go to c itself

  int64_t row_units() const { return ceil_div(product_.m, rows_); }
  int64_t units() const { return row_units() * cut_.units(); }

  // The operands along k of a panel for `count` numbers, with the zeros behind them.
  int64_t depth_of(int64_t count) const { return round_up(operands<T>(count), depth_step_); }

  // Whether the inner loop can take its factors from the matrix itself.
  static bool can_be_read_in_place(const MatrixView<T>& view) {
    if (view.depth_stride != 1 || !(kPaired<T> || std::is_same_v<T, P>)) return false;
    return view.stride % kNumbers<T> == 0;
  }

  // Tiles are read whole.
  bool has_whole_tiles_of_a() const {
    return product_.m % kTileProductRows == 0 && product_.k % (kTileProductDepth * kNumbers<T>) == 0;
  }

  static bool aliases(int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % kAliasingStride == 0; }

  void place(Arena& arena) {
    const int64_t depth = depth_of(run_);
    if (!reads_a_) {
      thread_a_ = depth * rows_ + kLanes<P>;  // PanelPacker writes a little more
      packed_a_ = take<P>(arena, threads_ * thread_a_);
    }
    if (shares_b_) {
      packed_b_ =
          take<P>(arena, depth_of(round_up(std::min(span_, product_.k), run_)) * round_up(product_.n, kPanelColumns));
    } else {
      thread_b_ = depth * strip_columns_;
      packed_b_ = take<P>(arena, threads_ * thread_b_);
    }
    if (!has_own_sums()) return;
    if (span_ < product_.k) {
      sums_stride_ = round_up(product_.n, kPanelColumns);
      sums_ = take<A>(arena, product_.m * sums_stride_);
    } else {
      sums_stride_ = cut_.width;
      thread_sums_ = rows_ * cut_.width;
      sums_ = take<A>(arena, threads_ * thread_sums_);
    }
  }

  void multiply() const {
    for (int64_t k = 0; k < product_.k; k += span_) {
      const int64_t k_end = std::min(k + span_, product_.k);
      if (shares_b_) pack_shared_b(k, k_end);
      auto do_unit = [&](int64_t index, int64_t next, int thread) {
        const Unit unit = unit_of(index, thread);
        if (unit.columns == 0) return;
        const TileScope scope(tiles_);
        multiply_unit(unit, unit_of(next, thread), k, k_end);
        if (k_end == product_.k) finish_unit(unit);
      };
      if (has_few_rows_) {
        parallel_for_with_next(units(), threads_, do_unit);
      } else {
        parallel_for(units(), threads_, [&](int64_t index, int thread) { do_unit(index, units(), thread); });
      }
    }
    if (product_.k > 0) return;
    parallel_for(product_.m, threads_, [&](int64_t row, int) {
      R* c = product_.c + row * product_.n;
      for (int64_t i = 0; i < product_.n; ++i) c[i] = narrow<R>(added_at(row, i));
    });
  }

  struct Unit {
    int thread;
    int64_t row, column;
    int64_t rows, columns;
  };

  // One beyond the last has neither rows nor columns.
  Unit unit_of(int64_t index, int thread) const {
    const int64_t row = std::min(index / cut_.units() * rows_, product_.m);
    const ColumnCut::Piece columns = cut_.unit(index % cut_.units());
    return {thread, row, columns.first, std::min(rows_, product_.m - row), row < product_.m ? columns.count : 0};
  }

  // Where the shared panels of a run begin; the run begins k_in_span, a multiple of run_, after its span.
  P* shared_run(int64_t k_in_span) const {
    return packed_b_ + k_in_span / kNumbers<T> * round_up(product_.n, kPanelColumns);
  }

  void pack_shared_b(int64_t k_begin, int64_t k_end) const {
    constexpr int64_t width = 4 * kPanelColumns;
    const int64_t groups = ceil_div(product_.n, width);
    const int64_t runs = ceil_div(k_end - k_begin, run_);
    parallel_for(groups * runs, threads_, [&](int64_t index, int) {
      const int64_t k = k_begin + index / groups * run_;
      const int64_t count = std::min(run_, k_end - k);
      const int64_t column = index % groups * width;
      P* panels = shared_run(k - k_begin) + column * depth_of(count);
      pack_b(column, std::min(width, product_.n - column), k, count, panels);
    });
  }

  void pack_b(int64_t column, int64_t columns, int64_t k, int64_t count, P* panels) const {
    if (!product_.is_b_arranged) {
      return PanelPacker<kPanelColumns, T>::pack(product_.b, column, columns, k, count, depth_of(count), panels);
    }
    if constexpr (!kPaired<T>) {
      for (int64_t i = 0; i < columns; i += kPanelColumns) {
        arranged_b().template pack<kPanelColumns>(column + i, k, count, panels + i * depth_of(count));
      }
    }
  }

  ArrangedMatrix<T> arranged_b() const { return {product_.b.data, product_.k}; }

  // Packs the unit's rows of a: [panels][depth][panel_rows_], or copies them, widened.
  void pack_a(const Unit& unit, int64_t k, int64_t count, P* out) const {
    const MatrixView<T>& a = product_.a;
    if constexpr (kHasTileProducts<T>) {
      if (tiles_) return pack_tile_rows(a, unit.row, unit.rows, k, count, depth_of(count), out);
    }
    if (!copies_a_) return PanelPacker<kPanelRows, T>::pack(a, unit.row, unit.rows, k, count, depth_of(count), out);
    if constexpr (!kPaired<T>) {
      for (int64_t i = 0; i < unit.rows; ++i)
        load_row(a.data + (unit.row + i) * a.stride + k, count, out + i * depth_of(count));
    }
  }

  A* sums_of(const Unit& unit) const {
    if constexpr (!kNarrows) {
      if (!has_own_sums()) return product_.c + unit.row * product_.n + unit.column;
    }
    if (thread_sums_) return sums_ + unit.thread * thread_sums_;
    return sums_ + unit.row * sums_stride_ + unit.column;
  }

  // Adds what the span k_begin..k_end - 1 of k gives to the unit's sums [rows, columns]. What the thread reads from
  // memory next, a panel of b, comes near meanwhile.
  void multiply_unit(const Unit& unit, const Unit& next, int64_t k_begin, int64_t k_end) const {
    A* sums = sums_of(unit);
    const int64_t stride = has_own_sums() ? sums_stride_ : product_.n;
    const int64_t writable_columns = has_own_sums() ? round_up(unit.columns, kPanelColumns) : unit.columns;
    for (int64_t k = k_begin; k < k_end; k += run_) {
      const int64_t count = std::min(run_, k_end - k);
      const int64_t depth = depth_of(count);
      const bool continues = k > 0 || starts_from_addend();
      const bool is_last_run = k + run_ >= k_end;
      const int64_t k_after = is_last_run ? k_begin : k + run_;
      const Unit& unit_after = is_last_run ? next : unit;
      const auto* a = reinterpret_cast<const P*>(product_.a.data + unit.row * product_.a.stride + k);
      const int64_t a_stride = reads_a_ ? product_.a.stride / kNumbers<T> : depth;
      if (!reads_a_) {
        P* packed = packed_a_ + unit.thread * thread_a_;
        pack_a(unit, k, count, packed);
        a = packed;
      }
      if (transposes_c()) {
        multiply_weight_rows(unit, k, k_begin, count, a, a_stride, {sums, stride, A(1), continues});
        continue;
      }
      if constexpr (!kPaired<T>) {
        if (streams_b_) {
          multiply_by_stream(unit, k, count, operand_at(a, a_stride, 0), {sums, stride, A(1), continues}, unit_after,
                             k_after);
          continue;
        }
      }
      if constexpr (kHasWidePanels) {
        if (product_.is_b_arranged && product_.m <= kFewestRows) {
          multiply_by_wide_panels(unit, k, depth, operand_at(a, a_stride, 0), {sums, stride, A(1), continues});
          continue;
        }
      }
      // What comes near while `panels` panels from column j on are multiplied.
      const auto coming_lines = [&](int64_t j, int64_t panels) {
        if (has_few_rows_) return part_of_next_strip(unit, j, panels, k, count, unit_after, k_after, k_end);
        return lines_of_shared_panels(unit, j + panels * kPanelColumns, panels, k, k_begin, count);
      };
      int64_t j = 0;
      for (; takes_two_panels(j, writable_columns); j += kWideColumns) {
        const Panel panels[2] = {panel_of(unit, j, k, k_begin, count),
                                 panel_of(unit, j + kPanelColumns, k, k_begin, count)};
        Lines after = coming_lines(j, 2);
        const int64_t tiles = ceil_div(unit.rows, kWideRows);
        const Prefetch prefetch = spread(after, tiles, depth);
        for (int64_t i = 0, tile = 1; tile <= tiles; ++tile) {
          const int64_t i_end = end_of_rows(unit, tile, tiles, kWideRows);
          // [kWideRows, 2 kPanelColumns] of the sums (+)= [kWideRows, depth] @ [depth, 2 kPanelColumns]
          const TileResult<A> c{sums + i * stride + j, stride, A(1), continues};
          multiply_wide_rows(i_end - i, depth, operand_at(a, a_stride, i), panels[0].data, panels[0].stride,
                             panels[1].data - panels[0].data, c, prefetch);
          i = i_end;
        }
      }
      for (; j < unit.columns; j += kPanelColumns) {
        const Panel panel = panel_of(unit, j, k, k_begin, count);
        Lines after = coming_lines(j, 1);
        const int64_t tiles = ceil_div(unit.rows, panel_rows_);
        const Prefetch prefetch = spread(after, tiles, depth);
        for (int64_t i = 0, tile = 1; tile <= tiles; ++tile) {
          const int64_t i_end = end_of_rows(unit, tile, tiles, panel_rows_);
          // [panel_rows_, kPanelColumns] of the sums (+)= [panel_rows_, depth] @ [depth, kPanelColumns]
          multiply_panels(depth, operand_at(a, a_stride, i), panel, i_end - i,
                          std::min(kPanelColumns, writable_columns - j),
                          {sums + i * stride + j, stride, A(1), continues}, prefetch);
          i = i_end;
        }
      }
    }
  }

  // Where the rows of a unit that are multiplied at a time, at most `most`, end. They are cut evenly where panels don't
  // cut them: a tile of one or two would wait for its sums.
  int64_t end_of_rows(const Unit& unit, int64_t tile, int64_t tiles, int64_t most) const {
    return has_rows_of_a() ? unit.rows * tile / tiles : std::min(tile * most, unit.rows);
  }

  // The same of one run of k for at most kFewestRows.
  void multiply_by_wide_panels(const Unit& unit, int64_t k, int64_t depth, TileOperand<P> a, TileResult<A> sums) const {
    for (int64_t j = 0; j < unit.columns; j += kArrangedColumns) {
      TileResult<A> c = sums;
      c.data += j;
      const auto* panel = reinterpret_cast<const P*>(arranged_b().at(unit.column + j, k));
      multiply_last_rows<kFewestRows, kArrangedVectors>(unit.rows, depth, a, panel, kArrangedColumns, c);
    }
  }

  // The same of one run of k where b is read in its order.
  void multiply_by_stream(const Unit& unit, int64_t k, int64_t count, TileOperand<P> a, TileResult<A> sums,
                          const Unit& unit_after, int64_t k_after) const {
    const MatrixView<T>& b = product_.b;
    const auto from = [&](int64_t column, int64_t depth) {
      return b.data + column * b.stride + depth * b.depth_stride;
    };
    if (b.stride == 1) {
      const T* next = unit_after.columns < unit.columns ? nullptr : from(unit_after.column, k_after);
      return WeightStream<T>::multiply_rows(unit.rows, unit.columns, count, a, from(unit.column, k), b.depth_stride,
                                            next, sums);
    }
    WeightStream<T>::multiply_columns(unit.rows, unit.columns, count, a, from(unit.column, k), b.stride,
                                      product_.n - unit.column - unit.columns, sums);
  }

  // The same of one run of k where a is the weight: its rows are read from memory, in their order, by panels. While all
  // panels of b are multiplied with one, the next comes near.
  void multiply_weight_rows(const Unit& unit, int64_t k, int64_t k_begin, int64_t count, const P* a, int64_t a_stride,
                            TileResult<A> sums) const {
    const int64_t depth = depth_of(count);
    for (int64_t i = 0; i < unit.rows; i += panel_rows_) {
      const int64_t rows = std::min(panel_rows_, unit.rows - i);
      const int64_t next = unit.row + i + rows;
      Lines after = lines_of(product_.a, next, std::min(panel_rows_, product_.m - next), k, count);
      const int64_t column_panels = ceil_div(unit.columns, kPanelColumns);
      const Prefetch prefetch = spread(after, column_panels, depth);
      for (int64_t j = 0; j < unit.columns; j += kPanelColumns) {
        multiply_panels(depth, operand_at(a, a_stride, i), panel_of(unit, j, k, k_begin, count), rows, kPanelColumns,
                        {sums.data + i * sums.row_stride + j, sums.row_stride, A(1), sums.accumulate}, prefetch);
      }
    }
  }

  // A panel of b [depth, kPanelColumns], whose rows begin `stride` after each other.
  struct Panel {
    const P* data;
    int64_t stride;
  };

  // The panel from column j of the unit on: shared, as it lies in b, or of a strip that this thread packs. The panels
  // of a strip are asked for one after another.
  Panel panel_of(const Unit& unit, int64_t j, int64_t k, int64_t k_begin, int64_t count) const {
    if (shares_b_) return {shared_run(k - k_begin) + (unit.column + j) * depth_of(count), kPanelColumns};
    if (product_.is_b_arranged && reads_b_) {
      return {reinterpret_cast<const P*>(arranged_b().at(unit.column + j, k)), kArrangedColumns};
    }
    if (reads_b_ && j + kPanelColumns <= unit.columns) {
      const T* data = product_.b.data + k * product_.b.depth_stride + unit.column + j;
      return {reinterpret_cast<const P*>(data), product_.b.depth_stride};
    }
    P* const strip = packed_b_ + unit.thread * thread_b_;
    const int64_t column = reads_b_ ? 0 : j % strip_columns_;
    if (column == 0) pack_b(unit.column + j, std::min(strip_columns_, unit.columns - j), k, count, strip);
    return {strip + column * depth_of(count), kPanelColumns};
  }

  // Whether the panel at column j of a unit is multiplied together with the next.
  bool takes_two_panels(int64_t j, int64_t writable_columns) const {
    return kHasWideTiles && !tiles_ && j + kWideColumns <= writable_columns;
  }

  // The packed panels from column j of the unit on, at most so many; they lie behind each other.
  Lines lines_of_shared_panels(const Unit& unit, int64_t j, int64_t panels, int64_t k, int64_t k_begin,
                               int64_t count) const {
    if (j >= unit.columns) return {};
    constexpr int64_t size = sizeof(P);
    const Panel panel = panel_of(unit, j, k, k_begin, count);
    panels = std::min(panels, ceil_div(unit.columns - j, kPanelColumns));
    return {reinterpret_cast<const char*>(panel.data), panels * depth_of(count), panel.stride * size,
            kPanelColumns * size};
  }

  // Of the strip after that which has `panels` panels from column j of the unit on, as large a part as these are of
  // their own; it may be the first of `unit_after` at k_after.
  Lines part_of_next_strip(const Unit& unit, int64_t j, int64_t panels, int64_t k, int64_t count,
                           const Unit& unit_after, int64_t k_after, int64_t k_end) const {
    const int64_t strip = j / strip_columns_ * strip_columns_;
    const int64_t of = ceil_div(std::min(strip_columns_, unit.columns - strip), kPanelColumns);
    const int64_t first = (j - strip) / kPanelColumns;
    const int64_t last = first + panels;
    const int64_t next = strip + strip_columns_;
    if (next < unit.columns) return lines_of_strip(unit, next, k, count, first, last, of);
    return lines_of_strip(unit_after, 0, k_after, std::min(run_, k_end - k_after), first, last, of);
  }

  // Parts first_part to last_part - 1 of `parts`, along k, of the strip of b from column j of the unit on.
  Lines lines_of_strip(const Unit& unit, int64_t j, int64_t k, int64_t count, int64_t first_part, int64_t last_part,
                       int64_t parts) const {
    const int64_t first = count * first_part / parts;
    const int64_t last = count * last_part / parts;
    const int64_t columns = std::min(strip_columns_, unit.columns - j);
    if (product_.is_b_arranged) {
      if (columns <= 0) return {};
      constexpr int64_t size = sizeof(T) * kArrangedNumbers<T>;
      const T* data = arranged_b().at(unit.column + j, k + first);
      return {reinterpret_cast<const char*>(data), (last - first) / kArrangedNumbers<T>, kArrangedColumns * size,
              std::min(columns, kArrangedColumns) * size};
    }
    return lines_of(product_.b, unit.column + j, columns, k + first, last - first);
  }

  // c [rows, columns] (+)= a panel of a, or so many of its rows in place, @ a panel of b [depth, kPanelColumns].
  void multiply_panels(int64_t depth, TileOperand<P> a, Panel b, int64_t rows, int64_t columns, TileResult<A> c,
                       const Prefetch& prefetch) const {
    if (columns == kPanelColumns && (rows == panel_rows_ || !tiles_)) {
      return multiply_rows(depth, a, b, rows, c, prefetch);
    }
    A whole[kMaxPanelRows * kPanelColumns];
    multiply_rows(depth, a, b, rows, {whole, kPanelColumns, A(1), false}, prefetch);
    for (int64_t r = 0; r < rows; ++r) {
      A* target = c.data + r * c.row_stride;
      for (int64_t i = 0; i < columns; ++i)
        target[i] = (c.accumulate ? target[i] : A(0)) + whole[r * kPanelColumns + i];
    }
  }

  // The same as multiply_panels, for all columns of the panel; on tiles for all panel_rows_ too.
  void multiply_rows(int64_t depth, TileOperand<P> a, Panel b, int64_t rows, TileResult<A> c,
                     const Prefetch& prefetch) const {
    if constexpr (kHasTileProducts<T>) {
      if (tiles_) {
        const auto meanwhile = [&] {
          for (int64_t step = 0; step < kTileProductDepth; step += prefetch.step) prefetch();
        };
        return multiply_tiles(depth, a.data, a.row_stride, b.data, c, meanwhile);
      }
    }
    if (rows == kPanelRows) {
      return multiply_register_tile<kPanelRows, kVectors>(depth, a, b.data, b.stride, c, prefetch);
    }
    multiply_last_rows<kPanelRows - 1, kVectors>(rows, depth, a, b.data, b.stride, c, prefetch);
  }

  // a from row i of the unit on: its rows in place or copied, or its packed panels, of one of which no more is taken.
  TileOperand<P> operand_at(const P* a, int64_t stride, int64_t i) const {
    if (has_rows_of_a() || tiles_) return {a + i * stride, stride, 1};
    const int64_t row = i % kPanelRows;
    return {a + (i - row) * stride + row, 1, kPanelRows};
  }

  // An addend that is c itself is there already where the sums go to c.
  bool starts_from_addend() const { return !has_own_sums() && static_cast<const void*>(product_.addend) == product_.c; }

  // What is added to element (row, column) of the product.
  A added_at(int64_t row, int64_t column) const {
    const A bias = product_.bias ? A(widen(product_.bias[column])) : A(0);
    return product_.addend ? bias + widen(product_.addend[row * product_.n + column]) : bias;
  }

  // Makes c of the unit's sums, in their place.
  void finish_unit(const Unit& unit) const {
    if (transposes_c()) return transpose_unit(unit);
    const R* addend = starts_from_addend() ? nullptr : product_.addend;
    if (!has_own_sums() && !addend && !product_.bias && !product_.step) return;
    const int64_t stride = has_own_sums() ? sums_stride_ : product_.n;
    const T* bias = product_.bias ? product_.bias + unit.column : nullptr;
    for (int64_t r = 0; r < unit.rows; ++r) {
      const int64_t row = unit.row + r;
      R* c = product_.c + row * product_.n + unit.column;
      const R* added = addend ? addend + row * product_.n + unit.column : nullptr;
      for (int64_t first = 0; first < unit.columns; first += kPiece) {
        const int64_t count = std::min(kPiece, unit.columns - first);
        A* values = sums_of(unit) + r * stride + first;
        if (bias) {
          for (int64_t i = 0; i < count; ++i) values[i] += widen(bias[first + i]);
        }
        if (added) {
          for (int64_t i = 0; i < count; ++i) values[i] += widen(added[first + i]);
        }
        if constexpr (std::is_same_v<T, R>) {
          if (product_.step) product_.step->run(row, unit.column + first, count, values);
        }
        if (has_own_sums()) store_row(values, count, c + first);
      }
    }
  }

  // The same for c^T.
  void transpose_unit(const Unit& unit) const {
    constexpr int lanes = kLanes<A>;
    static_assert(kMaxRows % lanes == 0, "a unit's rows are stored in whole vectors");
    const A* sums = sums_of(unit);
    A bias[kMaxRows] = {};
    if (product_.bias) load_row(product_.bias + unit.row, unit.rows, bias);
    for (int64_t i = 0; i < unit.columns; i += lanes) {
      A rows[lanes][kMaxRows];
      for (int64_t r = 0; r < unit.rows; r += lanes) {
        Vec<A> square[lanes];
        for (int64_t l = 0; l < lanes; ++l) {
          square[l] = r + l < unit.rows ? load(sums + (r + l) * sums_stride_ + i) : Vec<A>{};
        }
        transpose_lanes<A>(square);
        for (int64_t l = 0; l < lanes; ++l) store(rows[l] + r, square[l]);
      }
      for (int64_t l = 0; l < std::min<int64_t>(lanes, unit.columns - i); ++l) {
        for (int64_t r = 0; r < unit.rows; ++r) rows[l][r] += bias[r];
        store_row(rows[l], unit.rows, product_.c + (unit.column + i + l) * product_.m + unit.row);
      }
    }
  }

  Product<T, R> product_;
  int threads_;
  bool tiles_;
  int64_t panel_rows_;
  int64_t depth_step_;  // what the depth of a panel is a multiple of
  bool reads_a_;        // a is read in place
  bool copies_a_;       // each thread copies a unit's rows; else, if they aren't read in place, it packs them
  bool has_few_rows_;   // c
  bool reads_b_;        // b, stored as [k, n] or arranged, is read in place
  bool streams_b_;      // of that, a plain b in its order
  bool shares_b_;       // one packed b for all threads; else each thread packs a strip at a time
  int64_t run_, span_;
  int64_t rows_;  // of a unit
  ColumnCut cut_;
  int64_t strip_columns_;  // kPanelColumns where plain b is read in place
  int64_t thread_a_ = 0, thread_b_ = 0, thread_sums_ = 0, sums_stride_ = 0;
  P* packed_a_ =
      nullptr;  // [threads][rows_ / panel_rows_][depth][panel_rows_]; copied or for tiles [threads][rows_][depth]
  P* packed_b_ = nullptr;  // [runs of the span][panels][depth][kPanelColumns]; or [threads] of a strip's panels
  A* sums_ = nullptr;      // [threads][rows_, cut_.width]; where k has several spans [m, sums_stride_]
};

}  // namespace pfa::cpu::PFA_ISA
