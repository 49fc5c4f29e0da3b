// How decoding shares out the keys of a sequence: by its length alone, so that its result does not
// depend on the batch, on the cache's size or on the GPU.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define ATTNFAST_EVERYWHERE __host__ __device__
#else
#define ATTNFAST_EVERYWHERE
#endif

namespace attnfast::cuda {

constexpr int64_t kMostSplits = 64, kLeastKeys = 256, kKeyTile = 64;

// Keys of one split of a sequence of that length: a whole number of tiles.
ATTNFAST_EVERYWHERE inline int64_t keys_per_split(int64_t length) {
  const int64_t tiles = (length + kMostSplits * kKeyTile - 1) / (kMostSplits * kKeyTile);
  return tiles * kKeyTile > kLeastKeys ? tiles * kKeyTile : kLeastKeys;
}
ATTNFAST_EVERYWHERE inline int64_t splits_of(int64_t length) {
  const int64_t keys = keys_per_split(length);
  return (length + keys - 1) / keys;
}
// The most that a sequence of up to `capacity` keys has.
inline int64_t most_splits(int64_t capacity) {
  const int64_t least = (capacity + kLeastKeys - 1) / kLeastKeys;
  return least < kMostSplits ? least : kMostSplits;
}

}  // namespace attnfast::cuda
