// Keys that lists name: a list made a sorted set, rows gathered, and scores of all heads that share
// a list.
//
// Here keys lie in vector lanes, and the rows of a tile are the heads of a group: S[head][key].
#pragma once
#include "arena.h"
#include "head.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr Index kGathered = 64;  // keys of one tile

// Sorts lists of keys: bits, and a bit for each word of them that is not zero, so that few keys of
// many are soon found.
class KeySet {
 public:
  KeySet(Parts& parts, Index S) {
    const Index words = S / 64 + 1, marks = words / 64 + 1;
    bits_ = parts.take<uint64_t>(words), marks_ = parts.take<uint64_t>(marks);
    if (!bits_) return;
    memset(bits_, 0, words * sizeof(uint64_t));
    memset(marks_, 0, marks * sizeof(uint64_t));
  }

  // The keys of a list from begin to end - 1, each once; returns how many.
  Index sort(const int32_t* list, Index K, Index begin, Index end, int32_t* to) {
    for (Index j = 0; j < K; ++j) {
      const Index key = list[j];
      if (key < begin || key >= end) continue;
      bits_[key / 64] |= uint64_t{1} << key % 64;
      marks_[key / 4096] |= uint64_t{1} << key / 64 % 64;
    }
    Index n = 0;
    for (Index i = begin / 4096; i * 4096 < end; ++i) {
      for (; marks_[i]; marks_[i] &= marks_[i] - 1) {
        const Index word = i * 64 + __builtin_ctzll(marks_[i]);
        for (; bits_[word]; bits_[word] &= bits_[word] - 1)
          to[n++] = static_cast<int32_t>(word * 64 + __builtin_ctzll(bits_[word]));
      }
    }
    return n;
  }

 private:
  uint64_t *bits_, *marks_;
};

// to[j * padded + d], zero from D to `padded`, of n rows.
template <class Element>
inline void gather_rows(const Element* rows, Index stride, const int32_t* keys, Index n, Index D,
                        Index padded, float* to) {
  for (Index j = 0; j < n; ++j)
    pack_rows(rows + keys[j] * stride, 0, 1, D, padded, 1.0f, to + j * padded);
}

// to[d * ld + j] = row(j)[d], zero for j from n to ld, which is n rounded up to whole vectors.
template <class Row>
inline void transpose_rows(const Row& row, Index n, Index D, Index ld, float* to) {
  for (Index j = 0; j < n; j += kLanes) {
    const Index live = min_of(n - j, kLanes);
    decltype(row(0)) from[kLanes];
    for (Index i = 0; i < live; ++i) from[i] = row(j + i);
    for (Index d = 0; d < D; d += kLanes) {
      const Index width = min_of(D - d, kLanes);
      Vec r[kLanes];
      if (live == kLanes && width == kLanes) {
        ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) r[i] = load(from[i] + d);
      } else {
        for (Index i = 0; i < kLanes; ++i)
          r[i] = i < live ? load_part(from[i] + d, width) : zeros();
      }
      transpose_tile(r);
      for (Index i = 0; i < width; ++i) store(to + (d + i) * ld + j, r[i]);
    }
  }
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
