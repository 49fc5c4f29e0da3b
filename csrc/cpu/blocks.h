// Blocks of every (sequence, head), numbered one after the other: as many as its rows need, however
// long the longest sequence is.
#pragma once
#include <algorithm>

#include "arena.h"
#include "elements.h"

namespace attnfast::cpu::ATTNFAST_ISA {

struct Block {
  Index b, h;
  Index index, count;  // which of how many blocks of its head
};

class Blocks {
 public:
  // Sequence b has the rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1; null: each has `rows`.
  Blocks(const int32_t* cu_seqlens, Index B, Index heads, Index rows, Index size)
      : B_(B), heads_(heads), per_head_((rows + size - 1) / size) {
    if (!cu_seqlens) return;
    fill([=](Index b) { return (cu_seqlens[b + 1] - cu_seqlens[b] + size - 1) / size; });
  }

  // Sequence b has count(b) blocks.
  template <class Count>
  Blocks(Index B, Index heads, const Count& count) : B_(B), heads_(heads), per_head_(0) {
    fill(count);
  }

  Index count() const { return starts_ ? starts_[B_] : B_ * heads_ * per_head_; }

  // Of one head of sequence b.
  Index of(Index b) const { return starts_ ? (starts_[b + 1] - starts_[b]) / heads_ : per_head_; }

  // The first block of a head, numbered b * heads + h; of the head after the last: count().
  Index first_of(Index head) const {
    if (!starts_) return head * per_head_;
    const Index b = head / heads_, h = head % heads_;
    return starts_[b] + (h ? h * of(b) : 0);
  }

  Block operator[](Index i) const {
    if (!starts_) {
      const Index head = i / per_head_;
      return {head / heads_, head % heads_, i % per_head_, per_head_};
    }
    const Index b = std::upper_bound(starts_ + 1, starts_ + B_ + 1, i) - (starts_ + 1);
    const Index count = of(b), in_sequence = i - starts_[b];
    return {b, in_sequence / count, in_sequence % count, count};
  }

 private:
  template <class Count>
  void fill(const Count& count) {
    memory_ = Arena((B_ + 1) * sizeof(Index));
    starts_ = reinterpret_cast<Index*>(memory_.data());
    starts_[0] = 0;
    for (Index b = 0; b < B_; ++b) starts_[b + 1] = starts_[b] + heads_ * count(b);
  }

  Index B_, heads_, per_head_;
  Arena memory_;
  Index* starts_ = nullptr;  // [B + 1]; null: all sequences have per_head_ blocks
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
