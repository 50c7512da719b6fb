#include "gemm.h"

#include <dlfcn.h>

#include <cstring>

#include "paddle/extension.h"

namespace pfa::op {
namespace {

using OneDnnSgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t, float,
                            float*, int64_t);
using OneDnnBgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const uint16_t*, int64_t, const uint16_t*, int64_t,
                            float, float*, int64_t);
using CblasDgemm = void (*)(int, int, int, int, int, int, double, const double*, int, const double*, int, double, double*, int);

void* loaded_symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
  return handle ? dlsym(handle, name) : nullptr;
}

OneDnnSgemm one_dnn_sgemm() {
  static const auto function = reinterpret_cast<OneDnnSgemm>(loaded_symbol("libdnnl.so.3", "dnnl_sgemm"));
  return function;
}

// Not in oneDNN's headers, but exported by the libraries that Paddle brings.
OneDnnBgemm one_dnn_bgemm() {
  static const auto function = reinterpret_cast<OneDnnBgemm>(loaded_symbol("libdnnl.so.3", "dnnl_gemm_bf16bf16f32"));
  return function;
}

CblasDgemm cblas_dgemm() {
  static const auto function = reinterpret_cast<CblasDgemm>(loaded_symbol("libmklml_intel.so", "cblas_dgemm"));
  return function;
}

void sgemm_by_one_dnn(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float beta, float* c, int64_t ldc) {
  one_dnn_sgemm()(trans_a ? 'T' : 'N', trans_b ? 'T' : 'N', m, n, k, 1.0f, a, lda, b, ldb, beta, c, ldc);
}

void bgemm_by_one_dnn(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda,
                      const uint16_t* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  one_dnn_bgemm()(trans_a ? 'T' : 'N', trans_b ? 'T' : 'N', m, n, k, 1.0f, a, lda, b, ldb, beta, c, ldc);
}

// Whether oneDNN multiplies bfloat16 numbers, which it refuses to where its environment holds it to older instructions, and as
// it should: row-major, with sums in float32 and beta.
bool bgemm_works() {
  if (!cpu::has_bfloat16_products() || !one_dnn_bgemm()) return false;
  constexpr uint16_t one = 0x3F80, two = 0x4000, three = 0x4040;
  const uint16_t a[] = {one, two, three, one};
  const uint16_t b[] = {two, one, one, three};
  float c[] = {0.5f, 0.0f, 0.0f, 0.25f};
  const int status = one_dnn_bgemm()('N', 'T', 2, 2, 2, 1.0f, a, 2, b, 2, 1.0f, c, 2);
  return status == 0 && c[0] == 4.5f && c[1] == 7.0f && c[2] == 7.0f && c[3] == 6.25f;
}

void dgemm_by_cblas(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
                    int64_t ldb, double beta, double* c, int64_t ldc) {
  constexpr int row_major = 101;
  constexpr int plain = 111;
  constexpr int transposed = 112;
  cblas_dgemm()(row_major, trans_a ? transposed : plain, trans_b ? transposed : plain, static_cast<int>(m), static_cast<int>(n),
                static_cast<int>(k), 1.0, a, static_cast<int>(lda), b, static_cast<int>(ldb), beta, c, static_cast<int>(ldc));
}

template <class T>
paddle::Tensor dense(const T* source, int64_t rows, int64_t columns, int64_t stride) {
  const paddle::DataType dtype = sizeof(T) == 4 ? paddle::DataType::FLOAT32 : paddle::DataType::FLOAT64;
  paddle::Tensor tensor = paddle::empty({rows, columns}, dtype, paddle::CPUPlace());
  for (int64_t r = 0; r < rows; ++r) std::memcpy(tensor.data<T>() + r * columns, source + r * stride, columns * sizeof(T));
  return tensor;
}

template <class T>
void gemm_by_paddle(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                    int64_t ldb, T beta, T* c, int64_t ldc) {
  const paddle::Tensor product = paddle::matmul(trans_a ? dense(a, k, m, lda) : dense(a, m, k, lda),
                                                trans_b ? dense(b, n, k, ldb) : dense(b, k, n, ldb), trans_a, trans_b);
  const T* source = product.data<T>();
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      T& target = c[r * ldc + i];
      target = source[r * n + i] + (beta == 0 ? T(0) : beta * target);
    }
  }
}

}  // namespace

cpu::Gemm<float> find_sgemm() { return one_dnn_sgemm() ? sgemm_by_one_dnn : gemm_by_paddle<float>; }

cpu::Gemm<double> find_dgemm() { return cblas_dgemm() ? dgemm_by_cblas : gemm_by_paddle<double>; }

cpu::BFloat16Gemm find_bgemm() { return bgemm_works() ? bgemm_by_one_dnn : nullptr; }

}  // namespace pfa::op
