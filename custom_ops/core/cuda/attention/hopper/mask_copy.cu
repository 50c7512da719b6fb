// The copy of a mask [B, H, queries, keys], each but the last 1 where the mask broadcasts over it: rows are padded to
// 16 bytes, and a thread writes 4 of them.
#include <cuda_runtime_api.h>

#if CUDART_VERSION >= 12010

#include "core/cuda/attention/hopper/mask.cuh"
#include "core/cuda/attention/hopper/mask_copy.h"
#include "core/cuda/attention/launch.h"

namespace pfa {
namespace cuda {
namespace hopper {
namespace {

constexpr int kCopyThreads = 256;
constexpr int64_t kRowMultiple = 16;  // bytes, as tensor maps want strides

struct MaskCopy {
  Mask from;
  uint32_t* to;
  int64_t heads;    // that differ, of a sequence
  int64_t queries;  // that differ
  int64_t words;    // of all rows
  int row_words;
  int keys;
};

template <class From, class To>
__global__ void __launch_bounds__(kCopyThreads) copy_mask_kernel(const MaskCopy copy) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (index >= copy.words) return;
  constexpr int kElements = 4 / sizeof(To);  // of a word
  const int key0 = static_cast<int>(index % copy.row_words) * kElements;
  const int64_t row = index / copy.row_words;
  const int64_t head = row / copy.queries;
  const int64_t* strides = copy.from.strides;
  const From* from = static_cast<const From*>(copy.from.data) + head / copy.heads * strides[0] +
                     head % copy.heads * strides[1] + row % copy.queries * strides[2];
  uint32_t word = 0;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    if (key0 + e >= copy.keys) break;
    const From element = from[(key0 + e) * strides[3]];
    const uint32_t bits = sizeof(From) > 4 ? element != 0 : static_cast<uint32_t>(element);
    word |= bits << (32 / kElements) * e;
  }
  copy.to[index] = word;
}

int64_t count(const AttentionArgs& args, int axis, int64_t all) { return args.mask.strides[axis] ? all : 1; }
int64_t rows_of(const AttentionArgs& args) {
  return count(args, 0, args.batch) * count(args, 1, args.layout.num_heads) * count(args, 2, args.visibility.queries);
}

}  // namespace

Mask place_mask_copy(Arena& arena, const AttentionArgs& args, bool backward) {
  Mask copy{};
  const int64_t size = size_of(args.mask.dtype);
  const bool is_wide = args.mask.dtype == DType::kInt64;
  if (!args.mask.data || args.mask.strides[2] == 0 || (size > kMaxTiledMaskBytes && !is_wide)) return copy;
  if (backward ? !is_wide : mask_has_tensor_map(args)) return copy;
  copy.dtype = is_wide ? DType::kBool : args.mask.dtype;
  const int64_t copy_size = size_of(copy.dtype);
  const int64_t row_bytes = ceil_div(args.visibility.keys * copy_size, kRowMultiple) * kRowMultiple;
  const int64_t result_bytes = 2 * args.heads() * args.visibility.queries * args.head_dim();
  if (row_bytes * rows_of(args) > result_bytes) return copy;
  const int64_t row = row_bytes / copy_size;
  const int64_t head = row * count(args, 2, args.visibility.queries);
  copy.strides[3] = 1;
  copy.strides[2] = row;
  copy.strides[1] = args.mask.strides[1] ? head : 0;
  copy.strides[0] = args.mask.strides[0] ? head * count(args, 1, args.layout.num_heads) : 0;
  copy.data = arena.take(row_bytes * rows_of(args));
  return copy;
}

void use_mask_copy(const Context& context, const Mask& copy, AttentionArgs& args) {
  if (copy.strides[3] == 0) return;
  MaskCopy work{args.mask, static_cast<uint32_t*>(const_cast<void*>(copy.data))};
  work.heads = count(args, 1, args.layout.num_heads);
  work.queries = count(args, 2, args.visibility.queries);
  work.row_words = static_cast<int>(copy.strides[2] * size_of(copy.dtype) / 4);
  work.words = rows_of(args) * work.row_words;
  work.keys = args.visibility.keys;
  const auto run = [&](void (*kernel)(MaskCopy)) {
    launch(context, "attention_copy_mask", kernel, ceil_div(work.words, kCopyThreads), kCopyThreads, 0, work);
  };
  switch (size_of(args.mask.dtype)) {
    case 8:
      run(copy_mask_kernel<uint64_t, uint8_t>);
      break;
    case 4:
      run(copy_mask_kernel<uint32_t, uint32_t>);
      break;
    case 2:
      run(copy_mask_kernel<uint16_t, uint16_t>);
      break;
    default:
      run(copy_mask_kernel<uint8_t, uint8_t>);
  }
  args.mask = copy;
}

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa

#endif
