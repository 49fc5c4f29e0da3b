// The tiles of attention_bwd_fused.h, and the scratch that it takes.
#pragma once
#include "prims/prims.h"

namespace attnfast::cuda {

template <int kD>
struct FusedShape {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
  static constexpr int kStay = kWarps * 16, kMove = 64;  // keys, and queries
  static constexpr int kStayBytes = kStay * kD * 2, kMoveBytes = kMove * kD * 2;
  static constexpr int kTermBytes = kMove * 4, kStageBytes = 2 * kMoveBytes + 3 * kTermBytes;
  static constexpr int kScoreBytes = kStay * kMove * 2;
  static constexpr int kSharedBytes = 2 * kStayBytes + 2 * kStageBytes + kScoreBytes;
  // Of a warp's part of a tile of dq, 16 queries by half of D, the sums so far.
  static constexpr int kPart = 16 * kD / 2;

  static int64_t parts(int64_t heads, int64_t padded) { return heads * padded / kMove * kWarps; }
};

}  // namespace attnfast::cuda
