// Matrix products of any size by all threads: c = op(a) @ op(b) + bias + addend, with 16-bit numbers widened on the way
// in and rounded on the way out.
//
// Both operands are packed into panels as wide as a register tile, [width] operands of one k after another, zero beyond
// the matrix: b once, by all threads; a by each thread for the patch of c that it works at. The sum over k runs in its
// order for every element of c, however c is cut: the bits of the result do not depend on the number of threads.

namespace pfa::cpu::PFA_ISA {

// A matrix [count, depth] whose element (i, k) lies at data[i * stride + k * depth_stride]; one of the strides is 1.
// The product sums over the depth.
template <class T>
struct MatrixView {
  const T* data;
  int64_t stride;
  int64_t depth_stride;
};

// c [m, n], row-major, = a [m, k] @ b [n, k]^T + bias [n] + addend [m, n]. bias and addend may be null; addend may be
// c.
template <class T, class R>
struct Product {
  int64_t m, n, k;
  MatrixView<T> a;
  MatrixView<T> b;
  const T* bias;
  const R* addend;
  R* c;
};

// The k_count numbers from k0 on of rows [first, first + count) as panels: out [panels][depth][kWidth], where depth is
// operands(k_count) or more. A vector more than that may be written.
template <int kWidth, class T>
struct PanelPacker {
  using P = Operand<T>;
  static constexpr int kLanesOfP = kLanes<P>;

  static void pack(const MatrixView<T>& view, int64_t first, int64_t count, int64_t k0, int64_t k_count, int64_t depth,
                   P* out) {
    const T* source = view.data + first * view.stride + k0 * view.depth_stride;
    const int64_t filled = operands<T>(k_count);
    if (view.depth_stride == 1) {
      for (int64_t i = 0; i < count; i += kWidth) {
        transpose_panel(source + i * view.stride, view.stride, std::min<int64_t>(kWidth, count - i), k_count,
                        out + i * depth);
        std::fill(out + (i * depth + filled * kWidth), out + (i + kWidth) * depth, P(0));
      }
      return;
    }
    for (int64_t i = 0; i < count; i += kWidth) {
      std::fill(out + (i * depth + filled * kWidth), out + (i + kWidth) * depth, P(0));
    }
    // Some panels side by side: what is read lies together.
    for (int64_t k = 0; k < filled; ++k) {
      const T* low = source + k * kNumbers<T> * view.depth_stride;
      const T* high = (k + 1) * kNumbers<T> <= k_count ? low + view.depth_stride : nullptr;
      for (int64_t i = 0; i < count; i += kWidth) {
        copy_row(low + i, high ? high + i : nullptr, std::min<int64_t>(kWidth, count - i),
                 out + (i * depth + k * kWidth));
      }
    }
  }

 private:
  // A row of a panel from the numbers of one k or, for pairs, of two, of which the second may be missing.
  static void copy_row(const T* __restrict low, const T* __restrict high, int64_t rows, P* __restrict out) {
    if constexpr (kPaired<T>) {
      if (rows == kWidth && high) {
        for (int64_t i = 0; i < kWidth; ++i) out[i] = low[i].bits | static_cast<uint32_t>(high[i].bits) << 16;
        return;
      }
      for (int64_t i = 0; i < rows; ++i) out[i] = low[i].bits | (high ? static_cast<uint32_t>(high[i].bits) << 16 : 0u);
    } else {
      if (rows == kWidth) return load_row(low, kWidth, out);
      load_row(low, rows, out);
    }
    for (int64_t i = rows; i < kWidth; ++i) out[i] = P(0);
  }

  // Element (i, k) at source[i * stride + k].
  static void transpose_panel(const T* source, int64_t stride, int64_t rows, int64_t k_count, P* out) {
    constexpr int lanes = kLanesOfP;
    constexpr int64_t numbers = lanes * kNumbers<T>;
    int64_t k = 0;
    for (; k + numbers <= k_count; k += numbers) {
      // From the end: where lanes do not divide the width, a row's last vector runs into the start of the next row.
      for (int64_t i = (kWidth - 1) / lanes * lanes; i >= 0; i -= lanes) {
        Vec<P> square[lanes];
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l)
          square[l] = i + l < rows ? load_operands(source + (i + l) * stride + k) : Vec<P>{};
        transpose_square<P>(square);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) store(out + l * kWidth + i, square[l]);
      }
      out += lanes * kWidth;
    }
    for (; k < k_count; k += kNumbers<T>) {
      for (int64_t i = 0; i < kWidth; ++i) out[i] = i < rows ? operand(source + i * stride + k, k_count - k) : P(0);
      out += kWidth;
    }
  }

  static P operand(const T* source, int64_t count) {
    if constexpr (kPaired<T>) {
      return source[0].bits | (count > 1 ? static_cast<uint32_t>(source[1].bits) << 16 : 0u);
    } else {
      return widen(source[0]);
    }
  }
};

}  // namespace pfa::cpu::PFA_ISA

#include "core/cpu/linear/tile_products.isa.h"

namespace pfa::cpu::PFA_ISA {

template <class T, class R>
class MatrixProduct {
 public:
  using P = Operand<T>;

  static size_t workspace_bytes(const Context& context, const Product<T, R>& product) {
    Arena arena;
    MatrixProduct(context, product).place(arena);
    return arena.used();
  }

  static void run(const Context& context, const Product<T, R>& product, void* workspace) {
    MatrixProduct work(context, product);
    Arena arena(workspace);
    work.place(arena);
    work.multiply();
  }

 private:
  using A = Accumulator<T>;
  static constexpr int kVectors = 2;
  static constexpr int64_t kPanelColumns = kVectors * kLanes<A>;
  static constexpr int64_t kPanelRows = kRegisterRows[kVectors];
  static constexpr int64_t kMaxPanelRows = kHasTileProducts<T> ? std::max(kPanelRows, kTileProductRows) : kPanelRows;
  static constexpr bool kNarrows = !std::is_same_v<R, A>;
  // A run of k such that a panel of b stays in the L1 cache, and a patch's panels of a in the L2 cache.
  static constexpr int64_t kMaxRun = (PFA_VECTOR_BYTES == 64 ? 192 : 256) * kNumbers<T>;
  static constexpr int64_t kMaxRows = 144;
  // Of a patch whose sums lie in memory of its own, and of b that a thread packs by itself.
  static constexpr int64_t kMaxOwnColumns = 384;
  static constexpr int64_t kMaxPackedColumns = 128;
  // With so few rows a product is turned round, if that spares packing b: see `turned_`.
  static constexpr int64_t kFewRows = 64;
  // b is packed for at most so many k at a time, unless c has more rows: what is packed is never larger than c, or is
  // moderate.
  static constexpr int64_t kMaxSpan = 4096;

  // Of how the work is cut only run_ reaches the bits of the result, and it depends on k alone.
  MatrixProduct(const Context& context, const Product<T, R>& product)
      : product_(product),
        threads_(context.threads),
        tiles_(kHasTileProducts<T> && context.implementation->has_tile_products),
        panel_rows_(tiles_ ? kTileProductRows : kPanelRows),
        depth_step_(tiles_ ? kTileProductDepth : 1),
        rows_in_all_(product.m),
        columns_in_all_(product.n),
        a_(product.a),
        b_(product.b) {
    const int64_t k = product.k;
    const int64_t runs = std::max<int64_t>(1, (k + kMaxRun - 1) / kMaxRun);
    run_ = round_up(std::max<int64_t>(1, (k + runs - 1) / runs), 2 * kNumbers<T> * depth_step_);
    turned_ = !tiles_ && product.m <= kFewRows && can_be_read_in_place(product.b);
    if (turned_) {
      std::swap(rows_in_all_, columns_in_all_);
      std::swap(a_, b_);
    }
    packs_a_ = !turned_;
    shares_b_ = turned_ || product.m > kMaxRows;
    span_ = !shares_b_ || k <= std::max(rows_in_all_, kMaxSpan) ? k : kMaxSpan / run_ * run_;
    own_sums_ = kNarrows || turned_;

    rows_ = std::min(kMaxRows / panel_rows_ * panel_rows_, round_up(std::max<int64_t>(rows_in_all_, 1), panel_rows_));
    columns_ = round_up(std::max<int64_t>(columns_in_all_, 1), kPanelColumns);
    if (own_sums_) columns_ = std::min(columns_, kMaxOwnColumns);
    if (!shares_b_) columns_ = std::min(columns_, kMaxPackedColumns);
    while (patches() < 4 * threads_ && columns_ > 4 * kPanelColumns) columns_ = round_up(columns_ / 2, kPanelColumns);
    while (patches() < 4 * threads_ && rows_ > 2 * panel_rows_) rows_ = round_up(rows_ / 2, panel_rows_);
  }

  int64_t row_patches() const { return (rows_in_all_ + rows_ - 1) / rows_; }
  int64_t column_patches() const { return (columns_in_all_ + columns_ - 1) / columns_; }
  int64_t patches() const { return row_patches() * column_patches(); }

  // Operands that `count` numbers of a run fill, with the zeros behind them.
  int64_t depth_of(int64_t count) const { return round_up(operands<T>(count), depth_step_); }

  // Whether the micro kernel can take its factors from the matrix itself.
  static bool can_be_read_in_place(const MatrixView<T>& view) {
    if (view.depth_stride != 1 || !(kPaired<T> || std::is_same_v<T, P>)) return false;
    return view.stride % kNumbers<T> == 0;
  }

  void place(Arena& arena) {
    const auto take = [&](auto*& pointer, int64_t count) {
      using Element = std::remove_reference_t<decltype(*pointer)>;
      pointer = static_cast<Element*>(arena.take(count * sizeof(Element)));
    };
    const int64_t depth = depth_of(run_);
    if (packs_a_) {
      thread_a_ = depth * rows_ + kLanes<P>;  // PanelPacker writes a little more
      take(packed_a_, threads_ * thread_a_);
    }
    if (shares_b_) {
      take(packed_b_, depth_of(round_up(std::min(span_, product_.k), run_)) * round_up(columns_in_all_, kPanelColumns));
    } else {
      thread_b_ = depth * columns_;
      take(packed_b_, threads_ * thread_b_);
    }
    if (!own_sums_) return;
    if (span_ < product_.k) {
      sums_stride_ = round_up(columns_in_all_, kPanelColumns);
      take(sums_, rows_in_all_ * sums_stride_);
    } else {
      sums_stride_ = columns_;
      thread_sums_ = rows_ * columns_;
      take(sums_, threads_ * thread_sums_);
    }
  }

  void multiply() const {
    for (int64_t k = 0; k < product_.k; k += span_) {
      const int64_t k_end = std::min(k + span_, product_.k);
      if (shares_b_) pack_shared_b(k, k_end);
      parallel_for(patches(), threads_, [&](int64_t index, int thread) {
        Patch patch;
        patch.thread = thread;
        patch.row = index / column_patches() * rows_;
        patch.column = index % column_patches() * columns_;
        patch.rows = std::min(rows_, rows_in_all_ - patch.row);
        patch.columns = std::min(columns_, columns_in_all_ - patch.column);
        const TileScope scope(tiles_);
        multiply_patch(patch, k, k_end);
        if (k_end == product_.k) finish_patch(patch);
      });
    }
    if (product_.k > 0) return;
    parallel_for(product_.m, threads_, [&](int64_t row, int) {
      R* c = product_.c + row * product_.n;
      for (int64_t i = 0; i < product_.n; ++i) c[i] = narrow<R>(added_at(row, i));
    });
  }

  struct Patch {
    int thread;
    int64_t row, column;
    int64_t rows, columns;
  };

  // Where the shared panels of the run begin that is k_in_span from the span's start, which is a multiple of run_.
  P* shared_run(int64_t k_in_span) const {
    return packed_b_ + k_in_span / kNumbers<T> * round_up(columns_in_all_, kPanelColumns);
  }

  void pack_shared_b(int64_t k_begin, int64_t k_end) const {
    constexpr int64_t width = 4 * kPanelColumns;
    const int64_t groups = (columns_in_all_ + width - 1) / width;
    const int64_t runs = (k_end - k_begin + run_ - 1) / run_;
    parallel_for(groups * runs, threads_, [&](int64_t index, int) {
      const int64_t k = k_begin + index / groups * run_;
      const int64_t count = std::min(run_, k_end - k);
      const int64_t column = index % groups * width;
      P* panels = shared_run(k - k_begin) + column * depth_of(count);
      pack_b(column, std::min(width, columns_in_all_ - column), k, count, panels);
    });
  }

  void pack_b(int64_t column, int64_t columns, int64_t k, int64_t count, P* panels) const {
    PanelPacker<kPanelColumns, T>::pack(b_, column, columns, k, count, depth_of(count), panels);
  }

  void pack_a(const Patch& patch, int64_t k, int64_t count, P* panels) const {
    if constexpr (kHasTileProducts<T>) {
      if (tiles_) return pack_tile_rows(a_, patch.row, patch.rows, k, count, depth_of(count), panels);
    }
    PanelPacker<kPanelRows, T>::pack(a_, patch.row, patch.rows, k, count, depth_of(count), panels);
  }

  A* sums_of(const Patch& patch) const {
    if constexpr (!kNarrows) {
      if (!own_sums_) return product_.c + patch.row * product_.n + patch.column;
    }
    if (thread_sums_) return sums_ + patch.thread * thread_sums_;
    return sums_ + patch.row * sums_stride_ + patch.column;
  }

  // Adds a span of k to the patch's sums.
  void multiply_patch(const Patch& patch, int64_t k_begin, int64_t k_end) const {
    A* sums = sums_of(patch);
    const int64_t stride = own_sums_ ? sums_stride_ : product_.n;
    const int64_t writable_columns = own_sums_ ? round_up(patch.columns, kPanelColumns) : patch.columns;
    for (int64_t k = k_begin; k < k_end; k += run_) {
      const int64_t count = std::min(run_, k_end - k);
      const int64_t depth = depth_of(count);
      const bool continues = k > 0 || starts_from_addend();
      const P* b;
      if (shares_b_) {
        b = shared_run(k - k_begin) + patch.column * depth;
      } else {
        P* panels = packed_b_ + patch.thread * thread_b_;
        pack_b(patch.column, patch.columns, k, count, panels);
        b = panels;
      }
      if (packs_a_) {
        P* a = packed_a_ + patch.thread * thread_a_;
        pack_a(patch, k, count, a);
        for (int64_t j = 0; j < patch.columns; j += kPanelColumns) {
          const bool is_last = j + kPanelColumns >= patch.columns;
          for (int64_t i = 0; i < patch.rows; i += panel_rows_) {
            if (!is_last) prefetch_part(b + (j + kPanelColumns) * depth, depth * kPanelColumns, i, patch.rows);
            multiply_panels(depth, a + i * depth, b + j * depth, std::min(panel_rows_, patch.rows - i),
                            std::min(kPanelColumns, writable_columns - j),
                            {sums + i * stride + j, stride, A(1), continues});
          }
        }
      } else {
        const auto* a = reinterpret_cast<const P*>(a_.data + patch.row * a_.stride + k);
        for (int64_t j = 0; j < patch.columns; j += kPanelColumns) {
          micro_panel<kVectors>(patch.rows, depth, TileOperand<P>{a, a_.stride / kNumbers<T>, 1}, b + j * depth,
                                kPanelColumns, TileResult<A>{sums + j, stride, A(1), continues});
        }
      }
    }
  }

  // Of `size` operands those from part first / all on that belong to panel_rows_ of all rows: the next panel comes near
  // while this one is multiplied.
  void prefetch_part(const P* panel, int64_t size, int64_t first, int64_t all) const {
    constexpr int64_t line = 64 / sizeof(P);
    const int64_t end = size * std::min(first + panel_rows_, all) / all;
    for (int64_t i = size * first / all / line * line; i < end; i += line) __builtin_prefetch(panel + i, 0, 2);
  }

  // c [rows, columns] (+)= a panel of a @ a panel of b, of which so much is there.
  void multiply_panels(int64_t depth, const P* a, const P* b, int64_t rows, int64_t columns, TileResult<A> c) const {
    if (rows == panel_rows_ && columns == kPanelColumns) return multiply_whole_panels(depth, a, b, c);
    A whole[kMaxPanelRows * kPanelColumns];
    multiply_whole_panels(depth, a, b, {whole, kPanelColumns, A(1), false});
    for (int64_t r = 0; r < rows; ++r) {
      A* target = c.data + r * c.row_stride;
      for (int64_t i = 0; i < columns; ++i)
        target[i] = (c.accumulate ? target[i] : A(0)) + whole[r * kPanelColumns + i];
    }
  }

  void multiply_whole_panels(int64_t depth, const P* a, const P* b, TileResult<A> c) const {
    if constexpr (kHasTileProducts<T>) {
      if (tiles_) return multiply_tiles(depth, a, b, c);
    }
    register_tile<kPanelRows, kVectors>(depth, TileOperand<P>{a, 1, kPanelRows}, b, kPanelColumns, c);
  }

  // An addend that is c itself is there already where the sums go to c.
  bool starts_from_addend() const { return !own_sums_ && static_cast<const void*>(product_.addend) == product_.c; }

  // What is added to element (row, column) of the product.
  A added_at(int64_t row, int64_t column) const {
    const A bias = product_.bias ? A(widen(product_.bias[column])) : A(0);
    return product_.addend ? bias + widen(product_.addend[row * product_.n + column]) : bias;
  }

  // Makes c of the patch's sums.
  void finish_patch(const Patch& patch) const {
    const R* addend = starts_from_addend() ? nullptr : product_.addend;
    if (!own_sums_ && !addend && !product_.bias) return;
    const A* sums = sums_of(patch);
    const int64_t stride = own_sums_ ? sums_stride_ : product_.n;
    const int64_t row = turned_ ? patch.column : patch.row;
    const int64_t column = turned_ ? patch.row : patch.column;
    const int64_t rows = turned_ ? patch.columns : patch.rows;
    const int64_t columns = turned_ ? patch.rows : patch.columns;
    const T* bias = product_.bias ? product_.bias + column : nullptr;
    constexpr int64_t piece = 64;
    for (int64_t r = 0; r < rows; ++r) {
      R* c = product_.c + (row + r) * product_.n + column;
      const R* added = addend ? addend + (row + r) * product_.n + column : nullptr;
      for (int64_t first = 0; first < columns; first += piece) {
        const int64_t count = std::min(piece, columns - first);
        A values[piece];
        if (turned_) {
          for (int64_t i = 0; i < count; ++i) values[i] = sums[(first + i) * stride + r];
        } else {
          std::copy(sums + r * stride + first, sums + r * stride + first + count, values);
        }
        if (bias) {
          for (int64_t i = 0; i < count; ++i) values[i] += widen(bias[first + i]);
        }
        if (added) {
          for (int64_t i = 0; i < count; ++i) values[i] += widen(added[first + i]);
        }
        store_row(values, count, c + first);
      }
    }
  }

  Product<T, R> product_;
  int threads_;
  bool tiles_;
  int64_t panel_rows_;
  int64_t depth_step_;  // what the depth of a panel is a multiple of
  // Turned round, c^T = b @ a^T: the micro kernel reads b in place, and a, which is small, is packed in b's stead.
  bool turned_;
  int64_t rows_in_all_, columns_in_all_;
  MatrixView<T> a_, b_;
  bool packs_a_;
  bool shares_b_;  // one packed b for all threads; else each thread packs what its patch alone needs
  bool own_sums_;  // sums do not go to c itself
  int64_t run_, span_;
  int64_t rows_, columns_;  // of a patch
  int64_t thread_a_ = 0, thread_b_ = 0, thread_sums_ = 0, sums_stride_ = 0;
  P* packed_a_ = nullptr;  // [threads][rows_ / panel_rows_][depth][panel_rows_]
  P* packed_b_ = nullptr;  // [runs of the span][panels][depth][kPanelColumns]; or [threads] of a patch's panels
  A* sums_ = nullptr;      // [threads][rows_, columns_]; where k has several spans [rows_in_all_, sums_stride_]
};

}  // namespace pfa::cpu::PFA_ISA
