// Matrix products by cuBLASLt. Row-major matrices are column-major ones transposed, so cuBLASLt is asked for
// d^T = op(b)^T op(a)^T: its A is our b, its B our a, its bias runs along the columns of d.
//
// A plan is what cuBLASLt needs to know of a product: descriptors and one of the algorithms that its heuristic names.
// Plans are kept per thread, since the bias pointer of a call is set in the descriptor. Products of unaligned matrices
// get no workspace, so that the size told before the pointers are known is enough.
#include "core/cuda/linear/matrix_product.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <string>

#include "core/cuda/linear/cublaslt.h"
#include "core/cuda/rows/activation.h"
#include "core/cuda/rows/column_sums.h"

namespace pfa {
namespace cuda {
namespace {

namespace lt = cublaslt;

constexpr size_t kMaxWorkspaceBytes = size_t{32} << 20;
constexpr uintptr_t kAlignment = 16;
constexpr size_t kMaxPlans = 4096;
using Candidates = std::array<lt::HeuristicResult, 8>;

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return CUDA_R_64F;
    case DType::kFloat16:
      return CUDA_R_16F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

struct Plan {
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    for (lt::MatrixLayout layout : {a, b, d}) {
      if (layout) lt::api().layout_destroy(layout);
    }
    if (desc) lt::api().desc_destroy(desc);
  }

  lt::MatmulDesc desc = nullptr;
  lt::MatrixLayout a = nullptr, b = nullptr, d = nullptr;
  bool supported = false;
  lt::Algorithm algorithm{};
  size_t workspace_bytes = 0;
};

int attribute(const lt::Algorithm& algorithm, lt::AlgorithmAttribute name) {
  int32_t value = -1;
  size_t written = 0;
  return lt::api().algorithm_get(&algorithm, name, &value, sizeof(value), &written) == 0 ? value : -1;
}

// Which of the algorithms that the heuristic names, best first by its reckoning, to take. Where a row of the result is
// at least as long as its sums, writing it is a large share of the work. Hopper's kernels with smaller tiles write one
// while they compute the next, and took 0.87 to 1.03 of the time of those that the heuristic prefers (H200, cuBLAS 13,
// at the limit of its power). All give the same bits.
int choose(const Context& context, const MatrixProduct& p, const Candidates& candidates, int found) {
  constexpr int64_t kMostToSum = 4096;
  constexpr int64_t kLeastResults = 256 * 128 * 128;
  if (context.compute_capability != 90 || !is_16bit_float(p.dtype) || p.result_dtype != p.dtype || p.a_transposed ||
      p.k > p.n || p.k > kMostToSum || p.m * p.n < kLeastResults) {
    return 0;
  }
  const auto is_whole = [&](int i) { return attribute(candidates[i].algorithm, lt::kAlgorithmParts) == 1; };
  for (const int tile : {lt::kTile128x128, lt::kTile128x160, lt::kTile176x128}) {
    for (int i = 0; i < found && is_whole(0); ++i) {
      if (candidates[i].status == 0 && is_whole(i) && attribute(candidates[i].algorithm, lt::kAlgorithmTile) == tile) {
        return i;
      }
    }
  }
  return 0;
}

std::unique_ptr<Plan> make_plan(const Context& context, const MatrixProduct& p, bool aligned) {
  const lt::Api& api = lt::api();
  auto plan = std::make_unique<Plan>();
  const lt::ComputeType compute = p.dtype == DType::kFloat64                         ? lt::kCompute64F
                                  : p.dtype == DType::kFloat32 && context.allow_tf32 ? lt::kCompute32FFastTF32
                                                                                     : lt::kCompute32F;
  lt::check(api.desc_create(&plan->desc, compute, p.dtype == DType::kFloat64 ? CUDA_R_64F : CUDA_R_32F),
            "cublasLtMatmulDescCreate");
  const auto set = [&](lt::DescAttribute attribute, const auto& value) {
    lt::check(api.desc_set(plan->desc, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
  };
  set(lt::kDescTransA, p.b_transposed ? lt::kTransposed : lt::kNormal);
  set(lt::kDescTransB, p.a_transposed ? lt::kTransposed : lt::kNormal);
  if (p.has_relu) set(lt::kDescEpilogue, p.has_bias ? lt::kEpilogueReluBias : lt::kEpilogueRelu);
  if (p.has_bias) {
    if (!p.has_relu) set(lt::kDescEpilogue, lt::kEpilogueBias);
    // The heuristic wants a pointer; the call sets the real one.
    const void* any = reinterpret_cast<const void*>(uintptr_t{256});
    set(lt::kDescBiasPointer, any);
  }

  const auto layout = [&](lt::MatrixLayout& result, DType dtype, int64_t rows, int64_t cols) {
    lt::check(api.layout_create(&result, cuda_type(dtype), cols, rows, cols), "cublasLtMatrixLayoutCreate");
  };
  layout(plan->a, p.dtype, p.b_transposed ? p.n : p.k, p.b_transposed ? p.k : p.n);
  layout(plan->b, p.dtype, p.a_transposed ? p.k : p.m, p.a_transposed ? p.m : p.k);
  layout(plan->d, p.result_dtype, p.m, p.n);

  lt::Preference preference = nullptr;
  lt::check(api.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
  const uint64_t max_workspace = aligned ? kMaxWorkspaceBytes : 0;
  api.preference_set(preference, lt::kPreferenceMaxWorkspaceBytes, &max_workspace, sizeof(max_workspace));
  // Parts of a sum are not to be rounded to 16 bits before they are added up.
  const uint32_t schemes = lt::kReduceInComputeType;
  api.preference_set(preference, lt::kPreferenceReductionSchemes, &schemes, sizeof(schemes));
  const auto set_alignment = [&](lt::PreferenceAttribute attribute, DType dtype) {
    const uint32_t alignment = static_cast<uint32_t>(aligned ? kAlignment : size_of(dtype));
    api.preference_set(preference, attribute, &alignment, sizeof(alignment));
  };
  set_alignment(lt::kPreferenceMinAlignmentA, p.dtype);
  set_alignment(lt::kPreferenceMinAlignmentB, p.dtype);
  set_alignment(lt::kPreferenceMinAlignmentC, p.result_dtype);
  set_alignment(lt::kPreferenceMinAlignmentD, p.result_dtype);
  Candidates candidates{};
  int found = 0;
  const lt::Status status = api.heuristic(lt::handle(context.device), plan->desc, plan->a, plan->b, plan->d, plan->d,
                                          preference, static_cast<int>(candidates.size()), candidates.data(), &found);
  api.preference_destroy(preference);
  const lt::HeuristicResult& result = candidates[choose(context, p, candidates, found)];
  plan->supported = status == 0 && found > 0 && result.status == 0;
  plan->algorithm = result.algorithm;
  plan->workspace_bytes = plan->supported ? result.workspace_bytes : 0;
  return plan;
}

const Plan& plan_of(const Context& context, const MatrixProduct& p, bool aligned) {
  using Key = std::array<int64_t, 5>;
  thread_local std::map<Key, std::unique_ptr<Plan>> plans;
  const int64_t switches = static_cast<int64_t>(p.dtype) | p.a_transposed << 8 | p.b_transposed << 9 | aligned << 10 |
                           (context.allow_tf32 && p.dtype == DType::kFloat32) << 11 | p.has_bias << 12 |
                           p.has_relu << 13 | static_cast<int64_t>(p.result_dtype) << 16;
  const Key key = {p.m, p.n, p.k, switches, context.device};
  auto it = plans.find(key);
  if (it == plans.end()) {
    if (plans.size() >= kMaxPlans) plans.clear();
    it = plans.emplace(key, make_plan(context, p, aligned)).first;
  }
  return *it->second;
}

bool has_epilogue(const MatrixProduct& p) { return p.has_bias || p.has_relu; }

MatrixProduct without_epilogue(MatrixProduct p) {
  p.has_bias = p.has_relu = false;
  p.bias = nullptr;
  return p;
}

// What the product leaves to do where cuBLASLt does not.
void run_epilogue(Context& context, const MatrixProduct& p) {
  if (p.has_bias) add_bias(context, p.result_dtype, p.d, p.bias, p.m, p.n);
  if (!p.has_relu) return;
  ActivationRows relu;
  relu.dtype = p.result_dtype;
  relu.rows = p.m;
  relu.cols = p.n;
  relu.h = relu.u = p.d;
  activate(context, relu);
}

bool is_aligned(const MatrixProduct& p) {
  const auto bits = reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b) |
                    reinterpret_cast<uintptr_t>(p.c) | reinterpret_cast<uintptr_t>(p.d) |
                    reinterpret_cast<uintptr_t>(p.bias);
  return bits % kAlignment == 0;
}

}  // namespace

void matrix_product(Context& context, const MatrixProduct& p, void* workspace) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) {
    // Nothing to sum over, as for weight gradients of an empty batch.
    const size_t bytes = p.m * p.n * size_of(p.result_dtype);
    if (!p.adds_c) {
      check(cudaMemsetAsync(p.d, 0, bytes, context.stream), "matrix_product: cudaMemsetAsync");
    } else if (p.c != p.d) {
      check(cudaMemcpyAsync(p.d, p.c, bytes, cudaMemcpyDeviceToDevice, context.stream),
            "matrix_product: cudaMemcpyAsync");
    }
    run_epilogue(context, p);
    return;
  }

  const bool aligned = is_aligned(p);
  const Plan& plan = plan_of(context, p, aligned);
  if (!plan.supported) {
    if (!has_epilogue(p)) {
      throw std::runtime_error("cuBLASLt has no algorithm for a matrix product of m = " + std::to_string(p.m) +
                               ", n = " + std::to_string(p.n) + ", k = " + std::to_string(p.k));
    }
    matrix_product(context, without_epilogue(p), workspace);
    run_epilogue(context, p);
    return;
  }

  const lt::Api& api = lt::api();
  if (p.has_bias) {
    lt::check(api.desc_set(plan.desc, lt::kDescBiasPointer, &p.bias, sizeof(p.bias)), "cublasLtMatmulDescSetAttribute");
  }
  const double alpha64 = 1.0, beta64 = p.adds_c ? 1.0 : 0.0;
  const float alpha32 = 1.0f, beta32 = p.adds_c ? 1.0f : 0.0f;
  const bool is_double = p.dtype == DType::kFloat64;
  lt::check(
      api.matmul(lt::handle(context.device), plan.desc, is_double ? static_cast<const void*>(&alpha64) : &alpha32, p.b,
                 plan.a, p.a, plan.b, is_double ? static_cast<const void*>(&beta64) : &beta32, p.adds_c ? p.c : p.d,
                 plan.d, p.d, plan.d, &plan.algorithm, workspace, plan.workspace_bytes, context.stream),
      "cublasLtMatmul");
}

size_t matrix_product_workspace_bytes(const Context& context, const MatrixProduct& p) {
  if (p.m == 0 || p.n == 0 || p.k == 0) return 0;
  const Plan& plan = plan_of(context, p, true);
  if (!plan.supported && has_epilogue(p)) return matrix_product_workspace_bytes(context, without_epilogue(p));
  return plan.workspace_bytes;
}

}  // namespace cuda
}  // namespace pfa
