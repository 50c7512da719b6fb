// What the checks of all operators share. Shapes may have unknown dimensions (-1, in static graphs), which agree with
// anything. Texts are made where a check has failed only: checks run at every call.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace pfa::op {

// A tensor's dimensions, wherever they lie.
struct Shape {
  const int64_t* sizes;
  size_t rank;

  Shape(const int64_t* sizes = nullptr, size_t rank = 0) : sizes(sizes), rank(rank) {}
  template <size_t kRank>
  Shape(const std::array<int64_t, kRank>& sizes) : Shape(sizes.data(), kRank) {}
  int64_t operator[](size_t i) const { return sizes[i]; }
  int64_t last() const { return sizes[rank - 1]; }
};

std::string text(Shape shape);
bool agree(int64_t expected, int64_t got);
bool agree(Shape expected, Shape got);
bool is_one_of(const std::string& dtype, std::initializer_list<const char*> names);

// The number of rows of a tensor that is read as [rows, its last dimension].
int64_t rows_of(Shape shape);

// Throws std::invalid_argument with the message "[<op>] <kind>: <name>: expected ..., got ...". Python raises it as its
// kind, ValueError or TypeError.
[[noreturn]] void refuse(const char* op, const char* kind, const std::string& name, const std::string& expected,
                         const std::string& got);

// What came for an operator's inputs; nothing where one is absent.
struct Arguments {
  const char* op;
  const char* const* names;  // as errors call the inputs
  const Shape* shapes;
  const std::string* dtypes;
  int64_t present;

  bool has(int input) const { return present >> input & 1; }

  [[noreturn]] void refuse_shape(int input, const std::string& expected) const;
  [[noreturn]] void refuse_dtype(int input, const std::string& expected) const;

  // The input, if it is there, has the expected shape, which those of the inputs `given` make necessary.
  void check_shape(int input, Shape expected, std::initializer_list<int> given) const;
  // x has a shape [..., name] that ends in 1 or more.
  void check_rows(int x, const std::string& name) const;

  void check_float(int input) const;
  // The input, if it is there, has the dtype of `like`.
  void check_dtype_like(int input, int like) const;
  // x is of a float dtype, `weight` of the same, or of a 16-bit one beside a float32 x, and `others` are like `weight`.
  void check_dtypes(int x, int weight, std::initializer_list<int> others) const;
  // Layer-norm parameters are of the dtype of x, or of float32, and all of the same.
  void check_norm_dtypes(int x, std::initializer_list<int> norms) const;
};

}  // namespace pfa::op
