// Rows of tensors in global memory: tiles of them to shared memory, and sums of tiles back.
#pragma once
#include "tile.h"

namespace attnfast::cuda {

// Rows in global memory of which [begin, end) exist; all others read as zero.
template <class Element>
struct Rows {
  const Element* data;
  int64_t stride;  // of a row, in elements
  int begin, end;
  int columns;  // of a row; the tile's other columns are zero
  // Whether every row begins at a multiple of 16 bytes and ends at one, with less than 2^32 bytes
  // from one to the 32nd after it.
  bool aligned;

  ATTNFAST_DEVICE bool has(int r) const { return r >= begin && r < end; }
  ATTNFAST_DEVICE int64_t offset(int r) const { return r * stride; }
};

// Eight elements of a row that begins anywhere.
template <class Element>
ATTNFAST_DEVICE Words4 gather_chunk(const Element* row, int column, int columns) {
  uint32_t half[8];
  ATTNFAST_UNROLL for (int i = 0; i < 8; ++i) {
    half[i] = column + i < columns ? load_global(row + column + i).bits : 0;
  }
  return {half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16,
          half[6] | half[7] << 16};
}

// Starts to fill a tile of kRows rows with those from `first` on. SomeRows are Rows, or find theirs
// otherwise.
template <int kD, int kRows, int kThreads, bool kMayBeUnaligned, class SomeRows>
ATTNFAST_DEVICE void load_tile(uint32_t tile, const SomeRows& rows, int first) {
  constexpr int kChunks = kD / 8, kAll = kRows * kChunks;
  if (kMayBeUnaligned && !rows.aligned) {
    ATTNFAST_NO_UNROLL for (int n = thread_index(); n < kAll; n += kThreads) {
      const int r = n / kChunks, chunk = n % kChunks;
      const bool has = rows.has(first + r);
      const auto* row = rows.data + (has ? rows.offset(first + r) : 0);
      store_shared(tile + Swizzle<kD>::offset(r, chunk),
                   gather_chunk(row, chunk * 8, has ? rows.columns : 0));
    }
    return;
  }
  ATTNFAST_UNROLL for (int i = 0; i < kAll; i += kThreads) {
    const int n = i + thread_index(), r = n / kChunks, chunk = n % kChunks;
    if (kAll % kThreads && n >= kAll) break;
    const bool has = rows.has(first + r) && chunk * 8 < rows.columns;
    const auto* from = rows.data + (has ? rows.offset(first + r) + chunk * 8 : 0);
    copy_async(tile + Swizzle<kD>::offset(r, chunk), from, has ? 16 : 0);
  }
}

// Fills tiles with rows, one tile after the other. Of aligned rows a thread takes the same chunk of
// every kStep-th, so that a copy's address is the first one's and a multiple of `step`.
template <class Element, int kD, int kRows, int kThreads, bool kMayBeUnaligned>
class TileWalk {
 public:
  ATTNFAST_DEVICE TileWalk(const Rows<Element>& rows, int first)
      : row_(thread_index() / kChunks), step_(static_cast<uint32_t>(rows.stride * kStep * 2)) {
    const int chunk = thread_index() % kChunks;
    place_ = Swizzle<kD>::offset(row_, chunk);
    has_chunk_ = chunk * 8 < rows.columns;
    from_ = reinterpret_cast<const char*>(rows.data + rows.offset(first + row_) + chunk * 8);
  }

  // Starts to fill a tile with the rows from `first` on, where the walk has come to.
  ATTNFAST_DEVICE void load(uint32_t tile, const Rows<Element>& rows, int first) const {
    if (kMayBeUnaligned && !rows.aligned) {
      load_tile<kD, kRows, kThreads, true>(tile, rows, first);
    } else if (first >= rows.begin && first + kRows <= rows.end) {
      fill(tile, [](int) { return true; });
    } else {
      fill(tile, [&](int r) { return rows.has(first + r); });
    }
  }
  // Starts to fill a tile with those of its rows that `has` says are there.
  template <class Has>
  ATTNFAST_DEVICE void fill(uint32_t tile, Has has) const {
    if (kStep * kChunks < kThreads && row_ >= kStep) return;  // a warp too many
    ATTNFAST_UNROLL for (int i = 0; i < kRows / kStep; ++i) {
      // The same place in every eighth row: between them, row_ lacks the bits of i * kStep.
      const uint32_t place = place_ ^ (i * kStep % 8) * 16;
      copy_async(tile + place + i * kStep * kD * 2, from_ + uint64_t{step_} * i,
                 has_chunk_ && has(row_ + i * kStep) ? 16 : 0);
    }
  }
  // Goes on to the tile below, or above.
  ATTNFAST_DEVICE void down() { from_ += uint64_t{step_} * (kRows / kStep); }
  ATTNFAST_DEVICE void up() { from_ -= uint64_t{step_} * (kRows / kStep); }
  // Goes so many elements farther.
  ATTNFAST_DEVICE void by(int64_t elements) { from_ += elements * 2; }

 private:
  static constexpr int power_of_two(int most) { return most > 1 ? 2 * power_of_two(most / 2) : 1; }
  static constexpr int kChunks = kD / 8, kStep = power_of_two(min_of(kThreads / kChunks, kRows));
  static_assert(kStep >= 8 || kD % 64 == 0);

  int row_;         // the thread's first, in a tile
  uint32_t place_;  // of its chunk there
  bool has_chunk_;
  const char* from_;
  uint32_t step_;  // bytes
};

// Writes a warp's 16 * kM rows of sums, each times its factor ([2 * m + half]), rounded to Element,
// by way of `own`, rows of a tile that no other warp touches: `rows` of them exist, of `columns`.
template <int kD, bool kMayBeUnaligned, class Element, int kM>
ATTNFAST_DEVICE void store_rows(const float (&sum)[kM][kD / 8][4], const float (&factor)[2 * kM],
                                uint32_t own, Element* out, int64_t stride, int rows, int columns,
                                bool aligned, int lane) {
  ATTNFAST_UNROLL for (int r = 0; r < 2 * kM; ++r) {
    const uint32_t row = r * 8 + lane / 4;
    ATTNFAST_UNROLL for (int n = 0; n < kD / 8; ++n) {
      const float (&x)[4] = sum[r / 2][n];
      store_shared(own + Swizzle<kD>::offset(row, n) + lane % 4 * 4,
                   pack<Element>(x[r % 2 * 2] * factor[r], x[r % 2 * 2 + 1] * factor[r]));
    }
  }
  sync_warp();
  constexpr int kChunks = kD / 8;
  for (int n = lane; n < kM * 16 * kChunks; n += kWarpSize) {
    const int row = n / kChunks, chunk = n % kChunks;
    if (row >= rows || chunk * 8 >= columns) continue;
    const auto x = load_shared<Words4>(own + Swizzle<kD>::offset(row, chunk));
    Element* to = out + row * stride + chunk * 8;
    if (!kMayBeUnaligned || aligned) {
      store_global(reinterpret_cast<Words4*>(to), x);
      continue;
    }
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
    ATTNFAST_UNROLL for (int i = 0; i < 8; ++i) {
      if (chunk * 8 + i >= columns) break;
      store_global(to + i, Element{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
    }
  }
}

}  // namespace attnfast::cuda
