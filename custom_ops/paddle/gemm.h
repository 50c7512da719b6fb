// Matrix products on the CPU by the libraries that Paddle has loaded: oneDNN for float32 and bfloat16, MKL's CBLAS for float64, and where a
// Paddle build has neither, paddle::matmul.
#pragma once

#include "core/cpu/context.h"

namespace pfa::op {

cpu::Gemm<float> find_sgemm();
cpu::Gemm<double> find_dgemm();
// Null where it would be no faster than widening to float32: without instructions for dot products of bfloat16 numbers.
cpu::BFloat16Gemm find_bgemm();

}  // namespace pfa::op
