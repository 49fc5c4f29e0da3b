// The tiles of attention_decode.cu.
#pragma once
#include "splits.h"
#include "tile.h"

namespace attnfast::cuda {

// Rows of queries, and keys of which each warp has 16. kSmall: half the warps and keys, for the
// shared memory of sm_75.
template <int kD, bool kSmall>
struct DecodeShape {
  static constexpr int kWarps = kSmall ? 2 : 4, kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16, kOwnKeys = 16, kKeys = kWarps * kOwnKeys;
  static constexpr int kSharedBytes = (kRows + 2 * kKeys) * kD * 2;
  static constexpr bool kOnTuring = kSharedBytes <= kTuringShared;
  static_assert(kKeyTile % kKeys == 0 && (kSmall ? kOnTuring : kSharedBytes <= kSharedLimit));
  static_assert(kWarps * kRows * kD * 4 <= 2 * kKeys * kD * 2, "sums take the place of k and v");
};

}  // namespace attnfast::cuda
