// Matrix products on the CPU by the libraries that Paddle has loaded: oneDNN for float32, MKL's CBLAS for float64, and where a
// Paddle build has neither, paddle::matmul.
#pragma once

#include "core/cpu/context.h"

namespace pfa::op {

cpu::Gemm<float> find_sgemm();
cpu::Gemm<double> find_dgemm();

}  // namespace pfa::op
