// The whole block on every instruction set of this processor: in float64 the result against its definition and the
// gradients against differences, in the other types against float64.
#include "core/attention_block.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "core/cpu/context.h"

namespace {

using namespace pfa;

constexpr int64_t kBatch = 2, kSeq = 71, kHeads = 2, kDim = 20, kEmbed = kHeads * kDim, kRows = kBatch * kSeq;

using Values = std::vector<double>;

// x, qkv_weight, qkv_bias, linear_weight, linear_bias.
constexpr int kInputs = 5;
constexpr int64_t kSizes[kInputs] = {kRows * kEmbed, 3 * kEmbed * kEmbed, 3 * kEmbed, kEmbed * kEmbed, kEmbed};
using Inputs = Values[kInputs];

// x + causal attention, with neither dropout nor layer norms.
Values definition(const Inputs& in) {
  const auto& [x, qkv_weight, qkv_bias, linear_weight, linear_bias] = in;
  Values qkv(kRows * 3 * kEmbed), attended(kRows * kEmbed), out(kRows * kEmbed);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < 3 * kEmbed; ++c) {
      double sum = qkv_bias[c];
      for (int64_t e = 0; e < kEmbed; ++e) sum += x[r * kEmbed + e] * qkv_weight[c * kEmbed + e];
      qkv[r * 3 * kEmbed + c] = sum;
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const double* query = &qkv[r * 3 * kEmbed + h * kDim];
      double total = 0;
      for (int64_t other = r / kSeq * kSeq; other <= r; ++other) {
        const double* key = &qkv[other * 3 * kEmbed + kEmbed + h * kDim];
        double score = 0;
        for (int64_t d = 0; d < kDim; ++d) score += query[d] * key[d];
        const double weight = std::exp(score / std::sqrt(double(kDim)));
        total += weight;
        for (int64_t d = 0; d < kDim; ++d) attended[r * kEmbed + h * kDim + d] += weight * key[kEmbed + d];
      }
      for (int64_t d = 0; d < kDim; ++d) attended[r * kEmbed + h * kDim + d] /= total;
    }
    for (int64_t e = 0; e < kEmbed; ++e) {
      double sum = x[r * kEmbed + e] + linear_bias[e];
      for (int64_t f = 0; f < kEmbed; ++f) sum += attended[r * kEmbed + f] * linear_weight[f * kEmbed + e];
      out[r * kEmbed + e] = sum;
    }
  }
  return out;
}

uint16_t bfloat16_of(double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

double value_of(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::vector<char> stored(const Values& values, DType dtype) {
  std::vector<char> bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kFloat64) reinterpret_cast<double*>(bytes.data())[i] = values[i];
    if (dtype == DType::kFloat32) reinterpret_cast<float*>(bytes.data())[i] = static_cast<float>(values[i]);
    if (dtype == DType::kBFloat16) reinterpret_cast<uint16_t*>(bytes.data())[i] = bfloat16_of(values[i]);
  }
  return bytes;
}

Values loaded(const std::vector<char>& bytes, DType dtype) {
  Values values(bytes.size() / size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = dtype == DType::kFloat64   ? reinterpret_cast<const double*>(bytes.data())[i]
                : dtype == DType::kFloat32 ? reinterpret_cast<const float*>(bytes.data())[i]
                                           : value_of(reinterpret_cast<const uint16_t*>(bytes.data())[i]);
  }
  return values;
}

struct Results {
  Values out;
  Inputs gradients;
};

Results run_block(const cpu::Implementation& implementation, DType dtype, const Inputs& in, const Values& d_out) {
  AttentionBlockParams p;
  p.batch = kBatch;
  p.seq_len = kSeq;
  p.rows = kRows;
  p.embed_dim = kEmbed;
  p.num_heads = p.num_kv_heads = kHeads;
  p.head_dim = kDim;
  p.scale = 1.0 / std::sqrt(static_cast<double>(kDim));
  p.dtype = p.residual_dtype = p.norm_dtype = dtype;
  p.causal = true;
  p.final_layer_norm = false;
  std::vector<char> inputs[kInputs], gradients[kInputs], out(kRows * kEmbed * size_of(dtype)),
      d_out_bytes = stored(d_out, dtype);
  const void** const input_pointers[] = {&p.x, &p.qkv_weight, &p.qkv_bias, &p.linear_weight, &p.linear_bias};
  void** const gradient_pointers[] = {&p.d_x, &p.d_qkv_weight, &p.d_qkv_bias, &p.d_linear_weight, &p.d_linear_bias};
  for (int i = 0; i < kInputs; ++i) {
    inputs[i] = stored(in[i], dtype);
    gradients[i].resize(inputs[i].size());
    *input_pointers[i] = inputs[i].data();
    *gradient_pointers[i] = gradients[i].data();
  }
  p.out = out.data();
  p.d_out = d_out_bytes.data();
  cpu::Context context;
  context.threads = 2;
  context.implementation = &implementation;

  std::vector<char> saved(saved_bytes(p));
  std::vector<char> workspace(forward_workspace_bytes(context, p, true));
  run_forward(context, p, saved.data(), workspace.data());
  workspace.assign(backward_workspace_bytes(context, p), 0);
  run_backward(context, p, saved.data(), workspace.data());

  Results results;
  results.out = loaded(out, dtype);
  for (int i = 0; i < kInputs; ++i) results.gradients[i] = loaded(gradients[i], dtype);
  return results;
}

int failures = 0;

void expect_close(const char* isa, const char* what, const Values& got, const Values& expected, double tolerance) {
  double error = 0, scale = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error = std::max(error, std::isnan(got[i]) ? INFINITY : std::fabs(got[i] - expected[i]));
    scale = std::max(scale, std::fabs(expected[i]));
  }
  if (error <= tolerance * scale) return;
  ++failures;
  std::printf("%s, %s: off by %g of %g\n", isa, what, error, scale);
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t count, double scale) {
    Values values(count);
    for (double& value : values) value = value_of(bfloat16_of(scale * normal(random)));  // exact in every type
    return values;
  };
  Inputs in;
  for (int i = 0; i < kInputs; ++i) in[i] = draw(kSizes[i], i == 1 || i == 3 ? 0.2 : 1.0);
  const Values d_out = draw(kRows * kEmbed, 1.0);
  const Values expected = definition(in);

  const Results exact = run_block(*cpu::usable_implementations().front(), DType::kFloat64, in, d_out);
  for (int i = 0; i < kInputs; ++i) {
    const double step = 1e-5;
    const Values direction = draw(kSizes[i], 1.0);
    double slope = 0;
    for (double sign : {1.0, -1.0}) {
      Inputs moved;
      for (int j = 0; j < kInputs; ++j) moved[j] = in[j];
      for (int64_t e = 0; e < kSizes[i]; ++e) moved[i][e] += sign * step * direction[e];
      slope += sign * dot(definition(moved), d_out) / (2 * step);
    }
    expect_close("float64", "gradient along a direction", {dot(exact.gradients[i], direction)}, {slope}, 1e-6);
  }
  const struct {
    DType dtype;
    double tolerance;
  } types[] = {{DType::kFloat64, 1e-12}, {DType::kFloat32, 1e-5}, {DType::kBFloat16, 0.02}};
  for (const cpu::Implementation* implementation : cpu::usable_implementations()) {
    for (const auto& type : types) {
      const Results got = run_block(*implementation, type.dtype, in, d_out);
      expect_close(implementation->name, "out", got.out, expected, type.tolerance);
      for (int i = 0; i < kInputs; ++i) {
        expect_close(implementation->name, "gradient", got.gradients[i], exact.gradients[i], type.tolerance);
      }
    }
  }
  return failures ? 1 : 0;
}
