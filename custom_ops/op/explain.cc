// For Python's explain(): which implementations a call may take, fastest first, up to the one that it takes, and why
// not those before it.
#include <string>
#include <utility>

#include "core/cpu/implementations.h"
#include "core/qkv_layout.h"
#include "op/devices.h"
#ifdef PFA_WITH_CUDA
#include "core/cuda/attention/implementations.h"
#endif

namespace pfa::op {
namespace {

// A line "pass<tab>implementation<tab>why not"; the last is empty for the implementation that is taken. True for that.
bool add_line(std::string& lines, const char* pass, const char* name, const char* why_not) {
  lines += std::string(pass) + '\t' + name + '\t' + (why_not ? why_not : "") + '\n';
  return !why_not;
}

void explain_cpu(std::string& lines) {
  for (const char* pass : {"forward", "backward"}) {
    const auto& all = cpu::compiled_implementations();
    for (auto i = all.rbegin(); i != all.rend(); ++i) {
      if (add_line(lines, pass, (*i)->name, (*i)->why_not())) break;
    }
  }
}

#ifdef PFA_WITH_CUDA
void explain_card(std::string& lines, int card, const AttentionParams& p) {
  const CurrentCard current(card);  // what was compiled for it is asked of the current card
  const cuda::Context context = context_of_card(card, nullptr);
  for (const auto& [pass, name] : {std::pair{cuda::Pass::kForward, "forward"}, {cuda::Pass::kBackward, "backward"}}) {
    for (const cuda::AttentionImplementation* implementation : cuda::kAttentionImplementations) {
      if (add_line(lines, name, implementation->name, implementation->why_not(context, p, pass))) break;
    }
  }
}
#endif

}  // namespace

// card: a GPU's number, or -1 for the CPU. element: 32, 64 or 16 for floats of so many bits, -16 for bfloat16. Returns
// lines as add_line writes them, or one that begins with "!" and says what failed; valid until the next call on this
// thread.
extern "C" __attribute__((visibility("default"))) const char* custom_fused_attention_explain(int32_t card,
                                                                                             int32_t element,
                                                                                             int64_t head_dim) {
  thread_local std::string lines;
  lines.clear();
  try {
    AttentionParams p;
    p.batch = p.num_heads = p.num_kv_heads = 1;
    p.queries = p.keys = 128;  // one query may have an implementation of its own
    p.head_dim = head_dim;
    p.dtype = element == 64    ? DType::kFloat64
              : element == 16  ? DType::kFloat16
              : element == -16 ? DType::kBFloat16
                               : DType::kFloat32;
    const void* const somewhere = nullptr;  // which counts as aligned
    p.query = p.key = p.value = heads_from(somewhere, 0, p.queries, p.num_heads, p.head_dim, p.dtype);
    if (card < 0) {
      explain_cpu(lines);
    } else {
#ifdef PFA_WITH_CUDA
      explain_card(lines, card, p);
#else
      lines = "!this build has no kernels for GPUs";
#endif
    }
  } catch (const std::exception& error) {
    lines = std::string("!") + error.what();
  }
  return lines.c_str();
}

}  // namespace pfa::op
