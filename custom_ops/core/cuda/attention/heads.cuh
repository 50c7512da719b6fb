// What a thread block works on: a tile of a head, and what it knows of that head. Shared by all kernels.
#pragma once

#include "core/cuda/attention/args.h"

namespace pfa {
namespace cuda {

// A thread block's share where each has one tile of one head.
struct TileIndex {
  uint32_t head;  // batch * H + head
  int first;      // the tile's first query or key
};

// The tile of this thread block, of `count` queries or keys in tiles of kRows. Under a causal mask the last queries
// have the longest walk, and so do the first keys: `from_last` starts the last tiles of a head first.
template <int kRows>
__device__ __forceinline__ TileIndex tile_of_block(int count, bool from_last) {
  const int tiles = (count + kRows - 1) / kRows;
  const int tile = static_cast<int>(blockIdx.x % tiles);
  return {blockIdx.x / tiles, (from_last ? tiles - 1 - tile : tile) * kRows};
}

__device__ __forceinline__ PhiloxState philox_of(const ForwardArgs& args) {
  return philox_state(args.seed, args.offset, DropoutStage::kAttention);
}

__device__ __forceinline__ PhiloxState philox_of(const BackwardArgs& args) {
  return philox_state(args.random_state[0], args.random_state[1], DropoutStage::kAttention);
}

// What tells a head's scores from those of others.
struct HeadState {
  HeadIndex index;
  Visibility<int> visibility;
  HiddenRanges<int> ranges;
  int64_t mask_offset;     // of its element (0, 0)
  PhiloxState philox_key;  // only with dropout
};

// Who sees whom in a sequence; of packed ones, no more positions than the longest has. kPacked: sequences may be
// packed.
template <bool kPacked>
__device__ __forceinline__ Visibility<int> visibility_of_sequence(const AttentionArgs& args, int64_t batch) {
  if (kPacked && args.layout.query_starts) {
    // Nobody has looked at the numbers: what they say of tokens that there are not is no length.
    const auto length = [&](const int32_t* starts, int longest, int64_t tokens) {
      const int begin = starts[batch];
      const int end = min(starts[batch + 1], static_cast<int>(tokens));
      return begin >= 0 && end > begin ? min(end - begin, longest) : 0;
    };
    AttentionParams p;
    p.causal = args.causal;
    p.window_left = args.window_left;
    p.window_right = args.window_right;
    return visibility_of<int>(p, length(args.layout.query_starts, args.visibility.queries, args.layout.queries),
                              length(args.layout.key_starts, args.visibility.keys, args.layout.keys));
  }
  return args.visibility;
}

template <bool kPacked = false, class Args>
__device__ __forceinline__ HeadState head_state(const Args& args, uint32_t flat, bool drops) {
  const HeadIndex h = args.layout.head(flat);
  const int64_t* strides = args.mask.strides;
  const Visibility<int> visibility = visibility_of_sequence<kPacked>(args, h.batch);
  return {h, visibility, hidden_ranges(args.hidden_ranges, h.batch, h.kv_head, visibility.queries),
          h.batch * strides[0] + h.head * strides[1], drops ? philox_of(args) : PhiloxState{}};
}

// The visibility of a head: where all sequences are as long, that of args, which needs no registers.
template <bool kPacked>
__device__ __forceinline__ const Visibility<int>& head_visibility(const AttentionArgs& args, const HeadState& head) {
  return kPacked ? head.visibility : args.visibility;
}

// Where a head's row statistics begin. Those of a packed sequence begin where it does, rounded down to whole tiles, and
// a tile further for each sequence before it, so that there is room to round up its length.
template <bool kPacked>
__device__ __forceinline__ int64_t row_statistics(const BackwardArgs& args, const HeadIndex& h) {
  if (kPacked && args.layout.query_starts) {
    const int64_t begin = args.layout.query_starts[h.batch] / kStatisticsMultiple + h.batch;
    return h.head * args.rows_padded + begin * kStatisticsMultiple;
  }
  return h.flat * args.rows_padded;
}

// A head's inputs.
template <class T>
struct Head : HeadState {
  HeadRows<const T> q;
  HeadRows<const T> k;
  HeadRows<const T> v;
};

template <class T>
struct ForwardHead : Head<T> {
  HeadRows<T> out;
};

template <class Acc>
struct RowStatistics {
  Acc lse2;
  Acc shift2;
  Acc delta;
};

template <class T, class Acc>
struct BackwardHead : Head<T> {
  HeadRows<const T> d_out;
  HeadRows<T> d_q;
  HeadRows<T> d_k;
  HeadRows<T> d_v;
  const Acc* lse2;  // of every query and those that fill its tile, as the others
  const Acc* shift2;
  const Acc* delta;

  __device__ __forceinline__ RowStatistics<Acc> statistics(int row) const {
    return {lse2[row], shift2[row], delta[row]};
  }
};

template <class T, bool kPacked, class Args>
__device__ __forceinline__ Head<T> head_of(const Args& args, uint32_t flat, bool drops) {
  const HeadState state = head_state<kPacked>(args, flat, drops);
  const QkvLayout& layout = args.layout;
  return {state, layout.query_rows<const T>(args.query, state.index), layout.key_rows<const T>(args.key, state.index),
          layout.key_rows<const T>(args.value, state.index)};
}

template <class T, bool kPacked>
__device__ __forceinline__ ForwardHead<T> forward_head(const ForwardArgs& args, uint32_t flat, bool drops) {
  const Head<T> head = head_of<T, kPacked>(args, flat, drops);
  return {head, args.layout.query_rows<T>(args.out, head.index)};
}

template <class T, class Acc, bool kPacked = false>
__device__ __forceinline__ BackwardHead<T, Acc> backward_head(const BackwardArgs& args, uint32_t flat, bool drops) {
  const Head<T> head = head_of<T, kPacked>(args, flat, drops);
  const QkvLayout& layout = args.layout;
  const int64_t statistics = row_statistics<kPacked>(args, head.index);
  return {head,
          layout.query_rows<const T>(args.d_out, head.index),
          layout.query_rows<T>(args.d_query, head.index),
          layout.key_rows<T>(args.d_key, head.index),
          layout.key_rows<T>(args.d_value, head.index),
          static_cast<const Acc*>(args.lse2) + statistics,
          static_cast<const Acc*>(args.shift2) + statistics,
          static_cast<const Acc*>(args.delta) + statistics};
}

// Called by all threads of a forward kernel: leaves the random state to the stages that come later.
__device__ __forceinline__ void write_random_state(const ForwardArgs& args) {
  if (blockIdx.x == 0 && threadIdx.x == 0 && args.random_state) {
    args.random_state[0] = args.seed;
    args.random_state[1] = args.offset;
  }
}

}  // namespace cuda
}  // namespace pfa
