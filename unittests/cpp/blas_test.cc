// Matrix products of the BLAS that this build found, against plain loops: transposes, leading dimensions, beta.
#include "pybind/blas.h"

#include <cstdio>
#include <limits>
#include <vector>

namespace {

using pfa::blas_dgemm;
using pfa::blas_sgemm;

void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
          float beta, float* c, int64_t ldc) {
  blas_sgemm(trans_a, trans_b, m, n, k, a, lda, b, ldb, beta, c, ldc);
}

void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
          int64_t ldb, double beta, double* c, int64_t ldc) {
  blas_dgemm(trans_a, trans_b, m, n, k, a, lda, b, ldb, beta, c, ldc);
}

template <class T>
bool agrees(bool trans_a, bool trans_b, T beta) {
  const int64_t m = 5, n = 7, k = 11, padding = 3;
  const int64_t lda = (trans_a ? m : k) + padding, ldb = (trans_b ? k : n) + padding, ldc = n + padding;
  std::vector<T> a((trans_a ? k : m) * lda), b((trans_b ? n : k) * ldb), c(m * ldc);
  for (size_t i = 0; i < a.size(); ++i) a[i] = T(int64_t(i * 37 % 19) - 9);
  for (size_t i = 0; i < b.size(); ++i) b[i] = T(int64_t(i * 53 % 23) - 11);
  for (size_t i = 0; i < c.size(); ++i) c[i] = beta == 0 ? std::numeric_limits<T>::quiet_NaN() : T(i % 5);
  const std::vector<T> before = c;
  gemm(trans_a, trans_b, m, n, k, a.data(), lda, b.data(), ldb, beta, c.data(), ldc);

  // Small integers: every sum is exact, so the comparison is too.
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      T expected = beta == 0 ? T(0) : beta * before[i * ldc + j];
      for (int64_t l = 0; l < k; ++l)
        expected += a[trans_a ? l * lda + i : i * lda + l] * b[trans_b ? j * ldb + l : l * ldb + j];
      if (!(c[i * ldc + j] == expected)) {
        std::printf("trans_a %d, trans_b %d, beta %g, [%d, %d]: expected %g, got %g\n", trans_a, trans_b, double(beta), int(i),
                    int(j), double(expected), double(c[i * ldc + j]));
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  bool passed = true;
  for (bool trans_a : {false, true}) {
    for (bool trans_b : {false, true}) {
      for (double beta : {0.0, 1.0, 2.0}) {
        passed = agrees<float>(trans_a, trans_b, float(beta)) && passed;
        passed = agrees<double>(trans_a, trans_b, beta) && passed;
      }
    }
  }
  return passed ? 0 : 1;
}
