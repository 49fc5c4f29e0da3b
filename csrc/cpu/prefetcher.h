// Rows that are wanted soon, asked for a few cache lines at a time between the products of those
// that are there: in one burst, products would wait for room in the list of what was asked for.
#pragma once
#include "simd.h"

namespace attnfast::cpu::ATTNFAST_ISA {

class Prefetcher {
 public:
  void clear() { count_ = next_ = lines_ = 0; }

  template <class Element>
  void add(const Element* rows, Index stride, Index n, Index D) {
    if (n <= 0 || D <= 0) return;
    const Index bytes = D * Index(sizeof(Element));
    ranges_[count_++] = {reinterpret_cast<const char*>(rows), stride * Index(sizeof(Element)), n,
                         bytes, 0};
    lines_ += n * ((bytes + 63) / 64);
  }

  Index lines() const { return lines_; }

  void advance(Index lines) {
    while (lines > 0 && next_ < count_) {
      Range r = ranges_[next_];  // in registers
      for (; lines > 0 && r.rows > 0; --lines) {
        __builtin_prefetch(r.row + r.byte, 0, 2);
        r.byte += 64;
        if (r.byte < r.bytes) continue;
        r.byte = 0, r.row += r.stride, --r.rows;
      }
      ranges_[next_] = r;
      if (r.rows == 0) ++next_;
    }
  }

 private:
  struct Range {
    const char* row;  // the next, of `rows` that are left
    Index stride, rows, bytes, byte;
  };
  Range ranges_[8];
  int count_ = 0, next_ = 0;
  Index lines_ = 0;
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
