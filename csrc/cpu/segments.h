// The keys of a row of a block mask's blocks, one stretch after another; without a mask, all keys.
#pragma once
#include <algorithm>

#include "head.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// What a row of an empty block has.
inline constexpr int32_t kNoBits[128 * 4] = {};

class Segments {
 public:
  // Of the queries from t0 on, which are of one row of blocks, with those of keys key_begin ..
  // key_end - 1; `every`: blocks that are not attended too.
  template <class Element>
  Segments(const Head<Element>& head, Index t0, Index key_begin, Index key_end, bool every = false)
      : mask_(head.problem.blocks), S_(head.S), every_(every) {
    if (!mask_.starts) {
      whole_ = every ? Segment{0, head.S} : Segment{head.live_begin, head.live_end};
      return;
    }
    const int32_t* starts =
        mask_.starts + head.b * mask_.b + head.h * mask_.h + t0 / mask_.size * 2;
    block_ = key_begin / mask_.size;
    last_block_ = (min_of(key_end, S_) + mask_.size - 1) / mask_.size;
    for (int list = 0; list < 2; ++list) {
      const int32_t *first = mask_.keys + starts[list], *last = mask_.keys + starts[list + 1];
      first = std::lower_bound(first, last, block_);
      next_[list] = first - mask_.keys;
      end_[list] = std::lower_bound(first, last, last_block_) - mask_.keys;
    }
  }

  // False where there is none left.
  bool next(Segment* segment) {
    if (!mask_.starts) {
      if (whole_.begin >= whole_.end) return false;
      *segment = whole_, whole_.begin = whole_.end;
      return true;
    }
    if (every_) return next_block(segment);
    if (next_[0] < end_[0]) {  // full ones that lie next to one another, together
      const Index first = mask_.keys[next_[0]++];
      Index count = 1;
      for (; next_[0] < end_[0] && mask_.keys[next_[0]] == first + count; ++next_[0]) ++count;
      *segment = of_blocks(first, count, nullptr);
      return true;
    }
    if (next_[1] == end_[1]) return false;
    *segment = of_blocks(mask_.keys[next_[1]], 1, bits_of(next_[1]));
    ++next_[1];
    return true;
  }

 private:
  bool next_block(Segment* segment) {
    if (block_ >= last_block_) return false;
    const int32_t* bits = kNoBits;
    for (int list = 0; list < 2; ++list) {
      const Index entry = next_[list];
      if (entry == end_[list] || mask_.keys[entry] != block_) continue;
      bits = list ? bits_of(entry) : nullptr;
      ++next_[list];
    }
    *segment = of_blocks(block_++, 1, bits);
    return true;
  }

  Segment of_blocks(Index first, Index count, const int32_t* bits) const {
    const Index begin = first * mask_.size;
    return {begin, min_of(begin + count * mask_.size, S_), bits, mask_.size / 32};
  }

  const int32_t* bits_of(Index entry) const {
    return mask_.bits + mask_.slots[entry] * mask_.size * (mask_.size / 32);
  }

  const BlockMask& mask_;
  Segment whole_{};
  Index S_, next_[2], end_[2], block_ = 0, last_block_ = 0;  // full entries, and partial ones
  bool every_;
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
