// Global memory: what the host lets a kernel access, and which block wrote what.
#pragma once
#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "program.h"

namespace attnfast::ptx {

// Blocks of one launch are not ordered: one that reads what another wrote, or writes another value
// over it, is at fault, unless atomic operations lead from one to the other.
class GlobalMemory {
 public:
  // Before the first access; ranges may overlap.
  void allow(uint64_t begin, uint64_t end, bool writable);
  void arrange(bool checks);

  // The bytes of an access, checked.
  //   Raises Fault.
  char* read(uint64_t address, int bytes, int block, bool strong = false);
  char* write(uint64_t address, int bytes, int block, int instruction, const char* data);
  char* update(uint64_t address, int bytes, int block, int instruction);

 private:
  static constexpr int kPageBytes = 4096, kGranules = kPageBytes / 2;
  static constexpr int kNobody = -1, kAtomics = -2;
  struct Page {
    int writer[kGranules], instruction[kGranules];  // of every two bytes
  };
  struct Range {
    uint64_t begin, end;
    bool writable;
    std::vector<std::unique_ptr<Page>> pages;  // null: no block has written there
  };

  Range& inside(uint64_t address, int bytes, bool writes);
  Page* page(const Range& range, uint64_t address) const;
  Page& page_to_write(Range& range, uint64_t address);
  bool ordered(int writer, int block) const;
  // Calls f(page, granule, address) for every two bytes; stops at pages that are not there.
  template <class F>
  void each(Range& range, uint64_t address, int bytes, bool writes, F f);

  std::vector<Range> ranges_;  // disjoint, in order
  size_t last_ = 0;            // where the last access fell
  bool checks_ = true, written_ = false;
  std::set<std::pair<uint64_t, int>> updated_by_;  // address, block: of atomic operations
  std::set<std::pair<int, int>> ordered_;          // first block, later block
};

}  // namespace attnfast::ptx
