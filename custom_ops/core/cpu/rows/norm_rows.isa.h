// Layer norm of one row, and its gradient.

namespace pfa::cpu::PFA_ISA {

// row = (row - mean) * rstd * scale + bias, with mean and variance over the row; scale and bias may be null.
template <class A>
void normalize_row(A* __restrict row, int64_t count, double epsilon, const A* __restrict scale,
                   const A* __restrict bias, A& mean, A& rstd) {
  mean = row_sum(row, count) / count;
  const A variance = row_squared_distance(row, mean, count) / count;
  rstd = A(1) / std::sqrt(variance + static_cast<A>(epsilon));
  const A shift = mean;
  const A factor = rstd;
  for (int64_t i = 0; i < count; ++i) {
    const A normal = (row[i] - shift) * factor;
    row[i] = normal * (scale ? scale[i] : A(1)) + (bias ? bias[i] : A(0));
  }
}

// row = row * scale + bias; either may be null.
template <class A>
void scale_row(A* __restrict row, int64_t count, const A* __restrict scale, const A* __restrict bias) {
  for (int64_t i = 0; i < count; ++i) row[i] = row[i] * (scale ? scale[i] : A(1)) + (bias ? bias[i] : A(0));
}

// row = (row - mean) * rstd
template <class A>
void standardize_row(A* __restrict row, int64_t count, A mean, A rstd) {
  for (int64_t i = 0; i < count; ++i) row[i] = (row[i] - mean) * rstd;
}

// Turns `gradient` (of the layer norm's output) into the gradient of its input, and adds to the sums for scale and bias
// unless they are null. `normal` is the normalised row before scale and bias.
template <class A>
void normalize_row_backward(const A* __restrict normal, A* __restrict gradient, int64_t count, A rstd,
                            const A* __restrict scale, A* __restrict d_scale, A* __restrict d_bias) {
  if (d_scale) {
    for (int64_t i = 0; i < count; ++i) d_scale[i] += gradient[i] * normal[i];
  }
  if (d_bias) {
    for (int64_t i = 0; i < count; ++i) d_bias[i] += gradient[i];
  }
  if (scale) {
    for (int64_t i = 0; i < count; ++i) gradient[i] *= scale[i];
  }
  const A gradient_mean = row_sum(gradient, count) / count;
  const A projection = row_dot(gradient, normal, count) / count;
  for (int64_t i = 0; i < count; ++i) gradient[i] = (gradient[i] - gradient_mean - normal[i] * projection) * rstd;
}

}  // namespace pfa::cpu::PFA_ISA
