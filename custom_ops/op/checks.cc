#include "op/checks.h"

#include <algorithm>
#include <stdexcept>

namespace pfa::op {

std::string text(Shape shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.rank; ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + "]";
}

bool agree(int64_t expected, int64_t got) { return expected == got || expected < 0 || got < 0; }

bool agree(Shape expected, Shape got) {
  if (expected.rank != got.rank) return false;
  for (size_t i = 0; i < got.rank; ++i) {
    if (!agree(expected[i], got[i])) return false;
  }
  return true;
}

bool is_one_of(const std::string& dtype, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), dtype) != names.end();
}

int64_t rows_of(Shape shape) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.rank; ++i) rows *= shape[i];
  return rows;
}

void refuse(const char* op, const char* kind, const std::string& name, const std::string& expected,
            const std::string& got) {
  throw std::invalid_argument(std::string("[") + op + "] " + kind + ": " + name + ": expected " + expected + ", got " +
                              got);
}

void Arguments::refuse_shape(int input, const std::string& expected) const {
  refuse(op, "ValueError", names[input], expected, text(shapes[input]));
}

void Arguments::refuse_dtype(int input, const std::string& expected) const {
  refuse(op, "TypeError", names[input], expected, dtypes[input]);
}

void Arguments::check_shape(int input, Shape expected, std::initializer_list<int> given) const {
  if (!has(input) || agree(expected, shapes[input])) return;
  std::string what = "shape " + text(expected);
  const char* joint = " for ";
  for (int other : given) {
    what += std::string(joint) + names[other] + " of shape " + text(shapes[other]);
    joint = " and ";
  }
  refuse_shape(input, what);
}

void Arguments::check_rows(int x, const std::string& name) const {
  if (shapes[x].rank == 0) refuse_shape(x, "shape [..., " + name + "]");
  if (shapes[x].last() == 0) refuse_shape(x, name + " of at least 1");
}

void Arguments::check_float(int input) const {
  if (!is_one_of(dtypes[input], {"float32", "float64", "float16", "bfloat16"})) {
    refuse_dtype(input, "float32, float64, float16 or bfloat16");
  }
}

void Arguments::check_dtype_like(int input, int like) const {
  if (has(input) && dtypes[input] != dtypes[like]) refuse_dtype(input, dtypes[like] + " like " + names[like]);
}

void Arguments::check_dtypes(int x, int weight, std::initializer_list<int> others) const {
  check_float(x);
  const std::string& dtype = dtypes[x];
  if (dtypes[weight] != dtype && !(dtype == "float32" && is_one_of(dtypes[weight], {"float16", "bfloat16"}))) {
    const std::string as_x = dtype + " like x";
    refuse_dtype(weight, dtype == "float32" ? as_x + ", float16 or bfloat16" : as_x);
  }
  for (int input : others) {
    if (!has(input) || dtypes[input] == dtypes[weight]) continue;
    if (dtypes[input] == dtype) refuse_dtype(weight, dtype + " like x and " + names[input]);
    check_dtype_like(input, weight);
  }
}

void Arguments::check_norm_dtypes(int x, std::initializer_list<int> norms) const {
  const std::string& dtype = dtypes[x];
  const bool is_16bit = is_one_of(dtype, {"float16", "bfloat16"});
  const std::string* norm = nullptr;
  for (int input : norms) {
    if (!has(input)) continue;
    const std::string& got = dtypes[input];
    if (got != dtype && !(is_16bit && got == "float32")) {
      const std::string as_x = dtype + " like x";
      refuse_dtype(input, is_16bit ? "float32, or " + as_x : as_x);
    }
    if (norm && got != *norm) refuse_dtype(input, *norm + " like the other layer-norm parameters");
    norm = &got;
  }
}

}  // namespace pfa::op
