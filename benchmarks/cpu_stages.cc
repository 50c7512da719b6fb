// Times every stage of the block in training, forward and backward, and what its time cannot be below; cpu_block.py
// runs it.
//
//   cpu_stages DTYPE BATCH SEQ_LEN EMBED_DIM NUM_HEADS DROPOUT ROUNDS
//
// prints a line for each stage: its name, the least time of ROUNDS in seconds, and its floor in seconds. The floor of a
// matrix product and of attention is its multiplications and additions over 80% of the cores' peak, measured by a loop
// of multiply-adds in registers; that of the residual, which reads two tensors of x's size and writes two, is a copy of
// two.
#include <omp.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/attention_block.h"
#include "core/cpu/context.h"
#include "core/cpu/parallel.h"

namespace {

using namespace pfa;

double least_time(int rounds, const std::function<void()>& run) {
  run();
  double least = INFINITY;
  for (int i = 0; i < rounds; ++i) {
    const double start = omp_get_wtime();
    run();
    least = std::min(least, omp_get_wtime() - start);
  }
  return least;
}

// Multiplications and additions a second of all threads. The file is compiled for this processor, so these are its
// widest vectors.
double peak(bool bfloat16, int threads) {
  constexpr int64_t steps = 4000000;
  constexpr int sums = 12;  // hide the latency
#if defined(__AVX512F__)
  typedef float Vector __attribute__((vector_size(64)));
#elif defined(__AVX2__)
  typedef float Vector __attribute__((vector_size(32)));
#else
  typedef float Vector __attribute__((vector_size(16)));
#endif
  const volatile float start = 1e-3f;  // which the compiler does not know
  double operations = 2.0 * sizeof(Vector) / sizeof(float);
  auto run = [&](int64_t, int) {
    const Vector factor = Vector{} + start;
    Vector sum[sums];
    for (int s = 0; s < sums; ++s) sum[s] = Vector{} + s * start;  // all different, or the compiler computes one
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
      for (int s = 0; s < sums; ++s) sum[s] = sum[s] * factor + factor;
    }
    for (int s = 1; s < sums; ++s) sum[0] += sum[s];
    const volatile float sink = sum[0][0];
    (void)sink;
  };
#if defined(__AVX512BF16__)
  auto run_bfloat16 = [&](int64_t, int) {
    const auto factor = (__m512bh)_mm512_set1_epi32(0x3C003C00);
    __m512 sum[sums];
    for (int s = 0; s < sums; ++s) sum[s] = _mm512_set1_ps(s * start);
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
      for (int s = 0; s < sums; ++s) sum[s] = _mm512_dpbf16_ps(sum[s], factor, factor);
    }
    for (int s = 1; s < sums; ++s) sum[0] += sum[s];
    const volatile float sink = sum[0][0];
    (void)sink;
  };
  if (bfloat16) {
    operations *= 2;
    return operations * sums * steps * threads /
           least_time(3, [&] { cpu::parallel_for(threads, threads, run_bfloat16); });
  }
#endif
  return operations * sums * steps * threads / least_time(3, [&] { cpu::parallel_for(threads, threads, run); });
}

// Lives until the program ends.
char* allocate(size_t bytes) {
  static std::vector<std::unique_ptr<char, decltype(&std::free)>> all;
  all.emplace_back(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)), &std::free);
  return all.back().get();
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 8) {
    std::fprintf(stderr, "expected DTYPE BATCH SEQ_LEN EMBED_DIM NUM_HEADS DROPOUT ROUNDS\n");
    return 2;
  }
  const bool bfloat16 = !std::strcmp(arguments[1], "bfloat16");
  AttentionBlockParams p;
  p.dtype = bfloat16 ? DType::kBFloat16 : DType::kFloat32;
  p.residual_dtype = p.dtype;
  p.batch = std::atoll(arguments[2]);
  p.seq_len = std::atoll(arguments[3]);
  p.rows = p.batch * p.seq_len;
  p.embed_dim = std::atoll(arguments[4]);
  p.num_heads = p.num_kv_heads = std::atoll(arguments[5]);
  p.head_dim = p.embed_dim / p.num_heads;
  p.scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  p.attn_dropout = p.dropout = dropout_of(std::atof(arguments[6]), true, true);
  const int rounds = std::atoi(arguments[7]);

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto tensor = [&](int64_t size, float scale, DType dtype) {
    char* data = allocate(size * size_of(dtype));
    for (int64_t i = 0; i < size; ++i) {
      const float value = scale * normal(random);
      std::memcpy(data + i * size_of(dtype), reinterpret_cast<const char*>(&value) + 4 - size_of(dtype),
                  size_of(dtype));
    }
    return data;
  };
  const int64_t rows = p.rows, embed = p.embed_dim;
  const float weight_scale = 1 / std::sqrt(static_cast<float>(embed));
  p.x = tensor(rows * embed, 1, p.dtype);
  p.qkv_weight = tensor(3 * embed * embed, weight_scale, p.dtype);
  p.qkv_bias = tensor(3 * embed, 1, p.dtype);
  p.linear_weight = tensor(embed * embed, weight_scale, p.dtype);
  p.linear_bias = tensor(embed, 1, p.dtype);
  p.ln_scale = tensor(embed, 1, p.norm_dtype);
  p.ln_bias = tensor(embed, 1, p.norm_dtype);
  p.out = tensor(rows * embed, 1, p.dtype);
  p.d_out = tensor(rows * embed, 1, p.dtype);
  p.d_x = tensor(rows * embed, 1, p.dtype);
  p.d_qkv_weight = tensor(3 * embed * embed, 1, p.dtype);
  p.d_qkv_bias = tensor(3 * embed, 1, p.dtype);
  p.d_linear_weight = tensor(embed * embed, 1, p.dtype);
  p.d_linear_bias = tensor(embed, 1, p.dtype);
  p.d_ln_scale = tensor(embed, 1, p.norm_dtype);
  p.d_ln_bias = tensor(embed, 1, p.norm_dtype);

  cpu::Context context;
  context.threads = cpu::max_threads();
  p.seed = 1;
  char* const saved = allocate(saved_bytes(p));
  const AttentionBlockParams forward =
      plan_forward(context, p, true, saved, allocate(forward_workspace_bytes(context, p, true))).params;
  const AttentionBackwardPlan backward =
      plan_backward(context, p, saved, allocate(backward_workspace_bytes(context, p)));

  const double qkv = 2.0 * rows * 3 * embed * embed, output = 2.0 * rows * embed * embed;
  const double attention = 4.0 * p.batch * p.seq_len * p.seq_len * embed;
  const double row_bytes = static_cast<double>(rows * embed * size_of(p.dtype));
  const struct {
    const char* name;
    void (*run)(cpu::Context&, const AttentionBlockParams&);
    const AttentionBlockParams* params;
    double operations;
  } stages[] = {
      {"qkv_linear_forward", cpu::qkv_linear_forward, &forward, qkv},
      {"attention_forward",
       [](cpu::Context& c, const AttentionBlockParams& p) { cpu::attention_forward(c, attention_of(p)); }, &forward,
       attention},
      {"output_linear_forward", cpu::output_linear_forward, &forward, output},
      // projection, x; z, out
      {"residual_forward", [](cpu::Context& c, const AttentionBlockParams& p) { cpu::residual_forward(c, p); },
       &forward, 0},
      // d_out, z; d_residual, d_linear
      {"residual_backward", [](cpu::Context& c, const AttentionBlockParams& p) { cpu::residual_backward(c, p); },
       &backward.output, 0},
      {"output_linear_backward", cpu::output_linear_backward, &backward.output, 2 * output},
      {"attention_backward",
       [](cpu::Context& c, const AttentionBlockParams& p) { cpu::attention_backward(c, attention_of(p)); },
       &backward.attention, 2.5 * attention},
      {"qkv_linear_backward", cpu::qkv_linear_backward, &backward.input, 2 * qkv},
  };
  const double operations_per_second = 0.8 * peak(bfloat16, context.threads);
  // The copy of half of the bytes reads and writes as many.
  const auto bytes = static_cast<int64_t>(2 * row_bytes);
  char* const source = allocate(bytes);
  char* const target = allocate(bytes);
  std::memset(source, 1, bytes);
  const double copy = least_time(std::max(rounds, 3), [&] {
    cpu::parallel_for(context.threads, context.threads, [&](int64_t part, int) {
      const int64_t first = bytes * part / context.threads;
      std::memcpy(target + first, source + first, bytes * (part + 1) / context.threads - first);
    });
  });
  // In the block's order once, for what a stage reads has to be there.
  for (const auto& stage : stages) stage.run(context, *stage.params);
  for (const auto& stage : stages) {
    const double seconds = least_time(rounds, [&] { stage.run(context, *stage.params); });
    std::printf("%s %.9g %.9g\n", stage.name, seconds,
                stage.operations ? stage.operations / operations_per_second : copy);
  }
  return 0;
}
