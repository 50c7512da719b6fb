// Matrix products for a core without Paddle, by the BLAS that CMakeLists.txt found.
#pragma once

#include <cstdint>

namespace pfa {

// c [m, n] = op(a) @ op(b) + beta * c, row-major, op the transposition where asked for: op(a) is [m, k], op(b) is [k, n]. When
// beta is 0, c may hold anything. Throws std::length_error for a size that the BLAS cannot count.
void blas_sgemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                int64_t ldb, float beta, float* c, int64_t ldc);
void blas_dgemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
                int64_t ldb, double beta, double* c, int64_t ldc);

}  // namespace pfa
