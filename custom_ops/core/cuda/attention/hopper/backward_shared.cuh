// The shapes of the tiles of backward.cuh, and what the threads of its thread blocks share beside them.
#pragma once

#include "core/cuda/attention/hopper/hidden_tiles.cuh"
#include "core/cuda/attention/hopper/passes.h"
#include "core/cuda/attention/hopper/ring.cuh"

namespace pfa {
namespace cuda {
namespace hopper {

constexpr int kSumPanel = 64 * kPanelColumns;  // sums of d_q that a warpgroup adds to at a time

struct BackwardMaps {
  CUtensorMap query;
  CUtensorMap key;
  CUtensorMap value;
  CUtensorMap d_out;
};

template <int kHeadDim>
struct BackwardShape {
  static constexpr int kThreads = 384;
  static constexpr int kQueries = backward_queries(kHeadDim);
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;       // a tile of k or v
  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;  // a tile of q or d_out
  static constexpr int kScorePanelBytes = kKeys * kRowBytes;   // dS^T for 64 queries
  static constexpr int kScoreBytes = kQueries / 64 * kScorePanelBytes;
  static constexpr int kStatisticBytes = kQueries * static_cast<int>(sizeof(float));
  // How many of the computing threads arrive at a barrier: all, or one of each warp. With small tiles of queries the
  // former takes 8% longer.
  static constexpr int kArrivals = kQueries > 64 || kSanitized ? 256 : 8;
  // The probabilities of 128 queries are kept in their 16-bit form only.
  static constexpr bool kPackedOnly = kQueries > 64;
  static constexpr size_t kSharedBytes =
      1024 + kStages * (2 * kKeyBytes + 2 * kQueryBytes + kScoreBytes + 3 * kStatisticBytes);
};

#if PFA_HOPPER_CODE

constexpr uint32_t kNoHead = 0xFFFFFFFFu;
constexpr int kTurnThreads = 64;  // that await turns and end them

// A tile of keys that a thread block has taken.
struct KeyWork {
  OrderedTile place;  // its head is kNoHead where all tiles are taken
  SequenceTile keys;  // of the first query head that reads them
  Range<int> walk;    // over these tiles of each of its query heads' queries; with ranges, over so many
  Range<int> turns;   // the same also where a mask hides all of these keys; where turns are taken
};

// A step of its walk.
struct WalkStep {
  int head;  // of those that read the keys
  int tile;  // of its queries
  bool ranges_hide;
};

// What the threads of a thread block share, beside the tiles.
template <int kArrivals>
struct BackwardShared {
  Ring<kStages, kArrivals> kv, q, d_out;
  KeyWork work[kStages];                // what lies in the stages of kv
  SeenTiles seen_tiles;                 // with ranges: the tiles of queries that are yet to be copied
  WalkStep steps[kStages];              // what lies in the stages of q
  uint64_t added, may_take, has_taken;  // d_q of this tile to the sums; that of an earlier head from them
  // Where turns are taken: `full` when it is the thread block's turn at a step's queries, `empty` when others have been
  // told that it is over; and what the step adds to the sums.
  Ring<kStages, 1> turn;
  uint64_t step_added[kStages];
};

#endif

}  // namespace hopper
}  // namespace cuda
}  // namespace pfa
