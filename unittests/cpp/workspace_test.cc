// The linear stage writes nothing behind the workspace that it asked for, with an activation and without, whatever the
// shape, the way the weight is stored and the number of threads.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "core/cpu/context.h"

namespace {

using namespace pfa;

int failures = 0;

constexpr size_t kAlignment = 64, kGuard = 1 << 16;
constexpr char kMark = 0x5A;

void check(const cpu::Implementation& implementation, LinearParams p, int threads) {
  std::vector<char> x(p.rows * p.in_features * size_of(p.dtype)),
      weight(p.in_features * p.out_features * size_of(p.dtype)), bias(p.out_features * size_of(p.dtype)),
      out(p.rows * p.out_features * size_of(p.dtype)), pre_activation(out.size());
  p.x = x.data();
  p.weight = weight.data();
  p.bias = bias.data();
  p.out = out.data();
  if (p.activation != Activation::kNone) p.pre_activation = pre_activation.data();
  cpu::Context context;
  context.threads = threads;
  context.implementation = &implementation;
  const size_t bytes = stage_workspace_bytes(context, p, Phase::kForward);
  std::vector<char> memory(kAlignment + bytes + kGuard, kMark);
  void* start = memory.data();
  size_t space = memory.size();
  p.stage_workspace = std::align(kAlignment, bytes + kGuard, start, space);
  linear_forward(context, p);
  const char* const guard = static_cast<const char*>(start) + bytes;
  for (size_t i = 0; i < kGuard && guard + i < memory.data() + memory.size(); ++i) {
    if (guard[i] == kMark) continue;
    ++failures;
    std::printf("%s: %lld x %lld x %lld, %lld bytes a number, weight %s, %s, %d threads: writes byte %zu behind %zu\n",
                implementation.name, static_cast<long long>(p.rows), static_cast<long long>(p.in_features),
                static_cast<long long>(p.out_features), static_cast<long long>(size_of(p.dtype)),
                p.transpose_weight ? "[out, in]" : "[in, out]",
                p.activation == Activation::kNone ? "no activation" : "gelu", threads, i, bytes);
    return;
  }
}

}  // namespace

int main() {
  for (const cpu::Implementation* implementation : cpu::usable_implementations()) {
    for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (int64_t rows : {1, 7, 29, 64, 144}) {
        for (int64_t in : {2, 40, 300}) {
          for (int64_t out : {33, 100, 256}) {
            for (int variant = 0; variant < 8; ++variant) {
              LinearParams p;
              p.rows = rows;
              p.in_features = in;
              p.out_features = out;
              p.dtype = dtype;
              p.transpose_weight = variant % 2;
              p.activation = variant / 2 % 2 ? Activation::kGelu : Activation::kNone;
              check(*implementation, p, variant / 4 == 0 ? 1 : 3);
            }
          }
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures > 0;
}
