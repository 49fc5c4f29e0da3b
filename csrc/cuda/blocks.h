// The blocks that a block mask leaves to attend: which tiles are walked, and what their bits say.
//
// A line is a row of blocks, or a column. It has a list of full blocks and one of partial ones, both
// ascending, of which only those that positions reach are walked.
#pragma once
#include <type_traits>

#include "arguments.h"
#include "head.h"
#include "prims/prims.h"

namespace attnfast::cuda {

constexpr int kFull = -1, kEmpty = -2;  // slots of blocks that have no bits
constexpr int kNoTile = kFarthest;

// The first of the ascending entries begin .. end - 1 that is not before a block; end if none.
ATTNFAST_DEVICE int search(const int32_t* blocks, int begin, int end, int block) {
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (load_global(blocks + middle) < block) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// A line's entries: full ones first .. end_full - 1, partial ones partial .. last - 1.
struct BlockLists {
  const int32_t *blocks, *slots;
  int first, end_full, partial, last;

  ATTNFAST_DEVICE BlockLists(const BlockMask& mask, const Head& head, int line, bool column)
      : blocks(column ? mask.queries : mask.keys), slots(column ? mask.column_slots : mask.slots) {
    const int32_t* at = mask.starts + head.b * mask.b + head.h * mask.h + 2 * line;
    if (column) at += mask.column_starts;
    first = load_global(at), end_full = partial = load_global(at + 1), last = load_global(at + 2);
  }
};

// The tiles of kTile keys, or kColumn of queries, of the line that has the row `own`, from `begin`,
// where a tile begins, to `end`: by their first rows, kNoTile after the last.
template <int kTile, bool kColumn>
class BlockTiles {
 public:
  ATTNFAST_DEVICE BlockTiles(const BlockMask& mask, const Head& head, int own, int begin, int end)
      : size_(static_cast<int>(mask.size)),
        begin_(begin),
        end_(end),
        of_(mask, head, own / size_, kColumn) {
    const int block = begin / size_, end_block = (max_of(end, 1) - 1) / size_ + 1;
    of_.first = search(of_.blocks, of_.first, of_.end_full, block);
    of_.end_full = search(of_.blocks, of_.first, of_.end_full, end_block);
    of_.partial = search(of_.blocks, of_.partial, of_.last, block);
    of_.last = search(of_.blocks, of_.partial, of_.last, end_block);
  }

  ATTNFAST_DEVICE int first() { return begin_ < end_ ? enter() : kNoTile; }
  ATTNFAST_DEVICE int after(int tile) {
    tile += kTile;
    if (tile & (size_ - 1) && tile < end_) return tile;
    ++of_.first;
    return enter();
  }
  // Of the tile that was asked for last.
  ATTNFAST_DEVICE int slot() const { return slot_; }

 private:
  ATTNFAST_DEVICE int enter() {
    if (of_.first == of_.end_full) of_.first = of_.partial;
    if (of_.first >= of_.last) return kNoTile;
    slot_ = load_global(of_.slots + of_.first);
    return max_of(load_global(of_.blocks + of_.first) * size_, begin_);
  }

  int size_, begin_, end_, slot_ = kFull;
  BlockLists of_;  // its first entry is the one at hand
};

// The same without a block mask: all tiles.
template <int kTile>
class EveryTile {
 public:
  ATTNFAST_DEVICE EveryTile(const BlockMask&, const Head&, int, int begin, int) : begin_(begin) {}
  ATTNFAST_DEVICE int first() const { return begin_; }
  ATTNFAST_DEVICE int after(int tile) const { return tile + kTile; }
  ATTNFAST_DEVICE int slot() const { return kFull; }

 private:
  int begin_;
};

template <Form kForm, int kTile, bool kColumn>
using TilesOf = std::conditional_t<kHasBlocks<kForm>, BlockTiles<kTile, kColumn>, EveryTile<kTile>>;

// The slot of the block that a tile lies in.
ATTNFAST_DEVICE int slot_at(const BlockMask& mask, const Head& head, int t0, int s0) {
  const int size = static_cast<int>(mask.size), block = s0 / size;
  const BlockLists of(mask, head, t0 / size, false);
  const int full = search(of.blocks, of.first, of.end_full, block);
  if (full < of.end_full && load_global(of.blocks + full) == block) return kFull;
  const int partial = search(of.blocks, of.partial, of.last, block);
  if (partial == of.last || load_global(of.blocks + partial) != block) return kEmpty;
  return load_global(of.slots + partial);
}

// What a partial block's bits say of a warp's tile (scores.h says which lane holds what): each lane
// has its queries' words for 32 keys. Without kPresent, and of full blocks, nothing is left out.
template <bool kPresent, bool kTransposed, int kM, int kN>
class BlockBits {
 public:
  ATTNFAST_DEVICE BlockBits(const BlockMask& mask, int slot, int t0, int s0, int lane)
      : partial_(kPresent && slot >= 0) {
    if (!partial_) return;
    const int size = static_cast<int>(mask.size), words = size / 32;
    const int t = t0 & (size - 1), s = s0 & (size - 1);  // within the block
    const int row = t + (kTransposed ? lane % 4 * 2 : lane / 4);
    const int32_t* of = mask.bits + (int64_t{slot} * size + row) * words + s / 32;
    ATTNFAST_UNROLL for (int r = 0; r < kRows; ++r) {
      const int down = kTransposed ? r / 2 * 8 + r % 2 : r * 8;
      ATTNFAST_UNROLL for (int w = 0; w < kWords; ++w) {
        const auto word = static_cast<uint32_t>(load_global(of + down * words + w));
        word_[r][w] = word >> (kTransposed ? s % 32 + lane / 4 : lane % 4 * 2);
      }
    }
  }

  // `value` where a key is left out. Returns whether the block is partial.
  ATTNFAST_DEVICE bool mask(float (&s)[kM][kN][4], float value = -kInfinity) const {
    if (!partial_) return false;
    ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
      ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
        ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
          const uint32_t word = kTransposed ? word_[n * 2 + e % 2][0] : word_[m * 2 + e / 2][n / 4];
          const int bit = kTransposed ? m * 16 + e / 2 * 8 : n % 4 * 8 + e % 2;
          if (!(word >> bit & 1)) s[m][n][e] = value;
        }
      }
    }
    return true;
  }

 private:
  static constexpr int kRows = kTransposed ? 2 * kN : 2 * kM;
  static constexpr int kWords = kTransposed ? 1 : kN / 4;
  static_assert(kTransposed ? kM <= 2 : kN % 4 == 0);

  bool partial_;
  uint32_t word_[kRows][kWords];
};

}  // namespace attnfast::cuda
