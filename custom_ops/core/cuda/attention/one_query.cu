// Attention of one query, as in decoding with a cache of keys, forward: float16 and bfloat16, compute capability 8.0
// and later. Reading keys and values takes nearly all the time, so they go from memory into registers once, as
// operands.
//
// A warp takes 16 keys at a time, which are the rows of its products (mma.sync m16n8k16); the columns are up to eight
// query heads that read the same head of keys. Whatever order the inner dimension has, both operands have it, so that
// lane 4 g + t can hold the 16-byte vectors t, t + 4, ... of the rows g and g + 8 of the keys, and vector g (and g + 8)
// of the rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of the values, whose head dims are the rows of the second product.
//
// The keys of a head are split over thread blocks, and over their warps, by sizes alone: so results are the same bits
// each time. Each thread block leaves its sums, which a second kernel joins; a head's only thread block writes the
// result.
#include <algorithm>

#include "core/arena.h"
#include "core/cuda/attention/launch.h"
#include "core/cuda/attention/mask.cuh"
#include "core/cuda/attention/mma_products.cuh"
#include "core/cuda/attention/passes.h"
#include "core/cuda/attention/softmax.cuh"
#include "core/cuda/numbers.cuh"

namespace pfa {
namespace cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kHeads = 8;  // of queries, of a thread block

template <int kHeadDim>
struct OneQueryShape {
  static constexpr int kTiles = 128 / kHeadDim;  // of 16 keys, that a warp has at a time: 4 KiB of keys
  static constexpr int kWarpKeys = 16 * kTiles;
  static constexpr int kBlockKeys = kWarps * kWarpKeys;
  static constexpr int kBlocksPerSm = kHeadDim > 64 ? 3 : 4;
};

// How keys are split, and what the thread blocks of a head leave.
struct Splits {
  int first_key;  // that the query sees, and the one after the last
  int end_key;
  int keys;        // of a thread block
  int count;       // thread blocks of a head
  float* sums;     // [batch * H, count, D]: not yet divided; if there are several
  float2* maxima;  // [batch * H, count]: the highest score in units of log2, and the sum of exponentials
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// The kernel that follows may begin now: from compute capability 9.0 on.
__device__ __forceinline__ void let_next_grid_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// A vector that is read once.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

__device__ __forceinline__ uint32_t part(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// An 8 x 8 matrix of 16-bit numbers, of which a lane has row g, columns 2 t and 2 t + 1: its transpose likewise.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Over the lanes that have the same t.
template <class F>
__device__ __forceinline__ float over_rows(float value, F&& f) {
#pragma unroll
  for (int lane = 4; lane < 32; lane *= 2) value = f(value, __shfl_xor_sync(0xFFFFFFFFu, value, lane));
  return value;
}

// A warp's part of the keys of a head.
template <class T, int kHeadDim>
struct WarpKeys {
  static constexpr int kTiles = OneQueryShape<kHeadDim>::kTiles;
  static constexpr int kVectors = kHeadDim / 32;  // of a row of keys, that a lane holds

  uint4 query[kVectors];              // of head g
  float sums[kHeadDim / 16][4] = {};  // of heads 2 t (0, 2) and 2 t + 1 (1, 3): see dim_of
  RowSoftmax<float> softmax[2];       // of these heads

  // The head dim of sums[i][e].
  static __device__ __forceinline__ int dim_of(int i, int e) {
    return i / 4 * 64 + static_cast<int>(threadIdx.x % 32 / 4) * 8 + i % 4 * 2 + e / 2;
  }

  // Keys key0.. below end_key; mask_offsets of the two heads.
  __device__ __forceinline__ void add(const ForwardArgs& args, const HeadRows<const T>& keys,
                                      const HeadRows<const T>& values, int key0, int end_key,
                                      const int64_t (&mask_offsets)[2]) {
    const int g = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    uint4 k[kTiles][kVectors][2];
    uint4 v[kTiles][kHeadDim / 64][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = key0 + 16 * m + 8 * half + g;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int d = 32 * i + 8 * t;
          k[m][i][half] = key < end_key && d < args.head_dim() ? load_once(keys.row(key) + d) : uint4{};
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = key0 + 16 * m + 2 * t + j / 2 * 8 + j % 2;
#pragma unroll
        for (int i = 0; i < kHeadDim / 64; ++i) {
          const int d = 64 * i + 8 * g;
          v[m][i][j] = key < end_key && d < args.head_dim() ? load_once(values.row(key) + d) : uint4{};
        }
      }
    }

    float s[kTiles][4] = {};  // [keys g, g + 8][heads 2 t, 2 t + 1]
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const uint32_t rows[4] = {part(k[m][i][0], j), part(k[m][i][1], j), part(k[m][i][0], j + 1),
                                    part(k[m][i][1], j + 1)};
          mma::multiply_add<T>(s[m], rows, part(query[i], j), part(query[i], j + 1));
        }
      }
    }
    exponentiate(args, key0, end_key, mask_offsets, s);

#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const uint32_t p0 = transpose(pack<T>(s[m][0], s[m][1]));
      const uint32_t p1 = transpose(pack<T>(s[m][2], s[m][3]));
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        const uint4(&rows)[4] = v[m][i / 4];
        uint32_t a[4];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint32_t first = part(rows[2 * pair], i % 4);
          const uint32_t second = part(rows[2 * pair + 1], i % 4);
          a[2 * pair] = __byte_perm(first, second, 0x5410);
          a[2 * pair + 1] = __byte_perm(first, second, 0x7632);
        }
        mma::multiply_add<T>(sums[i], a, p0, p1);
      }
    }
  }

 private:
  // Products of the query and keys to probabilities, and the sums so far to the new highest scores.
  __device__ __forceinline__ void exponentiate(const ForwardArgs& args, int key0, int end_key,
                                               const int64_t (&mask_offsets)[2], float (&s)[kTiles][4]) {
    const float scale_log2 = static_cast<float>(args.score_scale * kLog2e);
    const auto key_of = [&](int m, int e) { return key0 + 16 * m + lane_row(e); };
    float scale = scale_log2;
    if (args.mask.data) {
      with_mask_elements(args.mask, [&](const auto* elements) {
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) {
          const int key = min(key_of(i / 4, i % 4), end_key - 1);
          const float added = mask_log2<float>(elements[mask_offsets[i % 2] + key * args.mask.strides[3]]);
          s[i / 4][i % 4] = fmaf(s[i / 4][i % 4], scale_log2, added);
        }
      });
      scale = 1.0f;
    }
    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      float& score = s[i / 4][i % 4];
      if (key_of(i / 4, i % 4) >= end_key) score = -INFINITY;
      highest[i % 2] = fmaxf(highest[i % 2], score);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      highest[h] = over_rows(highest[h], [](float a, float b) { return fmaxf(a, b); });
      float correction;
      const float base = softmax[h].raise(highest[h] * scale, correction);
      float sum = 0.0f;
#pragma unroll
      for (int i = h; i < 4 * kTiles; i += 2) {
        s[i / 4][i % 4] = exp2_of(fmaf(s[i / 4][i % 4], scale, -base));
        sum += s[i / 4][i % 4];
      }
      softmax[h].total = softmax[h].total * correction + sum;
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        sums[i][h] *= correction;
        sums[i][2 + h] *= correction;
      }
    }
  }
};

#endif

// What the sums of some of a head's keys are to be multiplied with, where the highest score of all is known.
__device__ __forceinline__ float weight_of(float maximum, float highest) {
  return highest == -INFINITY ? 0.0f : exp2_of(maximum - highest);
}

// Until the kernel before this one has ended, where this one may begin earlier.
__device__ __forceinline__ void wait_for_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Number d of the result of a head and, where d is 0, its statistics.
template <class T>
__device__ __forceinline__ void store_result(const ForwardArgs& args, const HeadIndex& h, int d, float highest,
                                             float total, float sum) {
  const float factor = total > 0 ? static_cast<float>(args.drop_scale) / total : 0.0f;
  args.layout.query_rows<T>(args.out, h).row(0)[d] = narrow<T>(sum * factor);
  if (d > 0 || !args.log_sum_exp) return;
  const int64_t index = args.layout.statistics(h);
  static_cast<float*>(args.log_sum_exp)[index] = total > 0 ? logf(total) : INFINITY;
  static_cast<float*>(args.score_shift)[index] = total > 0 ? highest : 0.0f;
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps, OneQueryShape<kHeadDim>::kBlocksPerSm)
    attention_one_query(const ForwardArgs args, const Splits splits, const int parts_of_group) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  __shared__ float maxima[kWarps][kHeads];
  __shared__ float totals[kWarps][kHeads];
  __shared__ float warp_sums[kWarps][kHeads][kHeadDim];
  write_random_state(args);
  const int split = blockIdx.x % splits.count;
  const uint32_t part = blockIdx.x / splits.count;
  const auto group = static_cast<uint32_t>(args.layout.group);
  const uint32_t first_of_group = part % parts_of_group * kHeads;
  const uint32_t flat0 = part / parts_of_group * group + first_of_group;  // batch * H + head, of the first head
  const int heads = static_cast<int>(min(group - first_of_group, static_cast<uint32_t>(kHeads)));
  const HeadIndex h = args.layout.head(flat0);
  const auto keys = args.layout.key_rows<const T>(args.key, h);
  const auto values = args.layout.key_rows<const T>(args.value, h);
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;

  WarpKeys<T, kHeadDim> mine;
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) {
    const int d = 32 * i + 8 * t;
    const bool exists = g < heads && d < args.head_dim();
    const T* row = args.layout.query_rows<const T>(args.query, args.layout.head(flat0 + (exists ? g : 0))).row(0);
    mine.query[i] = exists ? *reinterpret_cast<const uint4*>(row + d) : uint4{};
  }
  int64_t mask_offsets[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mask_offsets[i] = h.batch * args.mask.strides[0] + (h.head + min(2 * t + i, heads - 1)) * args.mask.strides[1];
  }
  const int first = splits.first_key + split * splits.keys;
  const int end = min(first + splits.keys, splits.end_key);
  for (int key0 = first + warp * OneQueryShape<kHeadDim>::kWarpKeys; key0 < end;
       key0 += OneQueryShape<kHeadDim>::kBlockKeys) {
    mine.add(args, keys, values, key0, end, mask_offsets);
  }
  let_next_grid_begin();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = over_rows(mine.softmax[i].total, [](float a, float b) { return a + b; });
    if (g == 0) {
      maxima[warp][2 * t + i] = mine.softmax[i].maximum;
      totals[warp][2 * t + i] = total;
    }
  }
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) warp_sums[warp][2 * t + e % 2][mine.dim_of(i, e)] = mine.sums[i][e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * args.head_dim(); i += 32 * kWarps) {
    const int head = i / args.head_dim();
    const int d = i % args.head_dim();
    float highest = maxima[0][head];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, maxima[w][head]);
    float total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = weight_of(maxima[w][head], highest);
      total += totals[w][head] * weight;
      sum += warp_sums[w][head][d] * weight;
    }
    if (splits.count == 1) {
      store_result<T>(args, args.layout.head(flat0 + head), d, highest, total, sum);
    } else {
      const int64_t index = static_cast<int64_t>(flat0 + head) * splits.count + split;
      splits.sums[index * args.head_dim() + d] = sum;
      if (d == 0) splits.maxima[index] = make_float2(highest, total);
    }
  }
#endif
}

constexpr int kJoinThreads = 256;

// A thread block joins what the thread blocks of a head left. Neighbouring threads have four head dims each, and those
// that have the same share out the parts.
template <class T>
__global__ void __launch_bounds__(kJoinThreads) join_splits(const ForwardArgs args, const Splits splits) {
  extern __shared__ float parts[];  // [threads / vectors][head_dim]
  wait_for_grid();
  const int head_dim = args.head_dim();
  const float2* maxima = splits.maxima + static_cast<int64_t>(blockIdx.x) * splits.count;
  const float* sums = splits.sums + static_cast<int64_t>(blockIdx.x) * splits.count * head_dim;
  float highest = -INFINITY;
#pragma unroll 8
  for (int i = 0; i < splits.count; ++i) highest = fmaxf(highest, maxima[i].x);
  const int vectors = head_dim / 4;
  const int rows = kJoinThreads / vectors;
  const int row = threadIdx.x / vectors;
  const int d = threadIdx.x % vectors * 4;
  if (row < rows) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int i = row; i < splits.count; i += rows) {
      const float4 part = *reinterpret_cast<const float4*>(sums + static_cast<int64_t>(i) * head_dim + d);
      const float weight = weight_of(maxima[i].x, highest);
      sum.x += part.x * weight;
      sum.y += part.y * weight;
      sum.z += part.z * weight;
      sum.w += part.w * weight;
    }
    *reinterpret_cast<float4*>(parts + row * head_dim + d) = sum;
  }
  float total = 0.0f;
#pragma unroll 8
  for (int i = 0; i < splits.count; ++i) total += maxima[i].y * weight_of(maxima[i].x, highest);
  __syncthreads();
  if (threadIdx.x >= head_dim) return;
  float sum = 0.0f;
  for (int r = 0; r < rows; ++r) sum += parts[r * head_dim + threadIdx.x];
  store_result<T>(args, args.layout.head(blockIdx.x), threadIdx.x, highest, total, sum);
}

int parts_of_group(const AttentionArgs& args) { return static_cast<int>(ceil_div(args.layout.group, kHeads)); }

template <int kHeadDim>
Splits plan(const Context& context, const AttentionArgs& args) {
  using Shape = OneQueryShape<kHeadDim>;
  const Range<int> keys = args.visibility.keys_of(0);
  const int64_t at_once = int64_t{context.num_sms} * Shape::kBlocksPerSm;
  const int64_t wanted = std::max<int64_t>(1, at_once / (args.kv_heads() * parts_of_group(args)));
  const int64_t units = std::max<int64_t>(1, ceil_div(keys.end - keys.first, Shape::kBlockKeys));
  const int64_t of_block = ceil_div(units, wanted);
  Splits splits{};
  splits.first_key = keys.first;
  splits.end_key = keys.end;
  splits.keys = static_cast<int>(of_block * Shape::kBlockKeys);
  splits.count = static_cast<int>(ceil_div(units, of_block));
  return splits;
}

Splits place(const Context& context, const AttentionArgs& args, Arena& arena) {
  Splits splits = args.head_dim() > 64 ? plan<128>(context, args) : plan<64>(context, args);
  if (splits.count > 1) {
    const size_t parts = args.heads() * splits.count;
    splits.sums = static_cast<float*>(arena.take(sizeof(float) * parts * args.head_dim()));
    splits.maxima = static_cast<float2*>(arena.take(sizeof(float2) * parts));
  }
  return splits;
}

template <class T>
void launch_join(const Context& context, const ForwardArgs& args, const Splits& splits) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(args.heads()));
  config.blockDim = dim3(kJoinThreads);
  config.dynamicSmemBytes = sizeof(float) * (kJoinThreads / (args.head_dim() / 4)) * args.head_dim();
  config.stream = context.stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  const void* kernel = reinterpret_cast<const void*>(join_splits<T>);
  config.numAttrs = kernel_attributes(context, kernel).ptxVersion >= 90 ? 1 : 0;  // what waits for the other
  check(cudaLaunchKernelEx(&config, join_splits<T>, args, splits), "attention_join_splits");
}

}  // namespace

size_t one_query_attention_forward_workspace_bytes(const Context& context, const AttentionParams& p) {
  Arena arena;
  place(context, attention_args(p), arena);
  return arena.used();
}

void one_query_attention_forward(Context& context, const AttentionParams& p) {
  const ForwardArgs args = forward_args(p);
  clear_out_residue(context, p);
  Arena arena(p.stage_workspace);
  const Splits splits = place(context, args, arena);
  dispatch_16bit(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_head_dim<64, 128>(args.head_dim(), [&](auto head_dim) {
      launch(context, "attention_one_query", attention_one_query<T, decltype(head_dim)::value>,
             args.kv_heads() * parts_of_group(args) * splits.count, 32 * kWarps, 0, args, splits, parts_of_group(args));
    });
    if (splits.count > 1) launch_join<T>(context, args, splits);
  });
}

}  // namespace cuda
}  // namespace pfa
