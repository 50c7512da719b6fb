// The two functions of CBLAS that are needed are declared here: libraries differ in their names and in their integer
// (PFA_CBLAS_SGEMM, PFA_CBLAS_DGEMM, PFA_BLAS_INT, set by CMakeLists.txt), and some come without a header.
#include "pybind/blas.h"

#include <limits>
#include <stdexcept>
#include <string>

using BlasInt = PFA_BLAS_INT;

extern "C" {
void PFA_CBLAS_SGEMM(int layout, int trans_a, int trans_b, BlasInt m, BlasInt n, BlasInt k, float alpha, const float* a,
                     BlasInt lda, const float* b, BlasInt ldb, float beta, float* c, BlasInt ldc);
void PFA_CBLAS_DGEMM(int layout, int trans_a, int trans_b, BlasInt m, BlasInt n, BlasInt k, double alpha, const double* a,
                     BlasInt lda, const double* b, BlasInt ldb, double beta, double* c, BlasInt ldc);
}

namespace pfa {
namespace {

constexpr int kRowMajor = 101;

int transposition(bool transposed) { return transposed ? 112 : 111; }

BlasInt blas_int(int64_t size) {
  if (size > std::numeric_limits<BlasInt>::max()) {
    throw std::length_error("matrix product: this BLAS counts to " + std::to_string(std::numeric_limits<BlasInt>::max()) +
                            ", got a size of " + std::to_string(size));
  }
  return static_cast<BlasInt>(size);
}

}  // namespace

void blas_sgemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                int64_t ldb, float beta, float* c, int64_t ldc) {
  PFA_CBLAS_SGEMM(kRowMajor, transposition(trans_a), transposition(trans_b), blas_int(m), blas_int(n), blas_int(k), 1.0f, a,
                  blas_int(lda), b, blas_int(ldb), beta, c, blas_int(ldc));
}

void blas_dgemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
                int64_t ldb, double beta, double* c, int64_t ldc) {
  PFA_CBLAS_DGEMM(kRowMajor, transposition(trans_a), transposition(trans_b), blas_int(m), blas_int(n), blas_int(k), 1.0, a,
                  blas_int(lda), b, blas_int(ldb), beta, c, blas_int(ldc));
}

}  // namespace pfa
