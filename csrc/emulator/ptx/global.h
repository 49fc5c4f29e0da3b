// Global memory: what the host lets a kernel access, and which block wrote what.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "clocks.h"

namespace attnfast::ptx {

// Blocks of one launch are not ordered: one that reads what another wrote, or writes another value
// over it, is at fault, unless the other's write has been handed to it. Atomic and other strong
// accesses do not race with one another.
class GlobalMemory {
 public:
  // Before the first access; ranges may overlap.
  void allow(uint64_t begin, uint64_t end, bool writable);
  void arrange(bool checks);

  // The bytes of an access, checked.
  //   Raises Fault.
  char* read(uint64_t address, int bytes, const Access& by, bool strong = false);
  // `data` is what it will leave.
  char* write(uint64_t address, int bytes, const Access& by, const char* data, bool strong = false);
  char* update(uint64_t address, int bytes, const Access& by);

  // What those who read there with a strong access are handed: null for nothing.
  std::shared_ptr<const Others>& handed(uint64_t address) { return handed_[address]; }

  uint64_t changes = 0;  // strong writes

 private:
  static constexpr int kPageBytes = 4096, kGranules = kPageBytes / 2;
  static constexpr int kNobody = -1;
  struct Write {
    int block = kNobody, instruction = -1;
    uint32_t clock = 0;
    int8_t warp = 0, lane = 0;
    bool strong = false;
  };
  struct Page {
    Write writes[kGranules];  // the last one of every two bytes
  };
  struct Range {
    uint64_t begin, end;
    bool writable;
    std::vector<std::unique_ptr<Page>> pages;  // null: no block has written there
  };

  Range& inside(uint64_t address, int bytes, bool writes);
  Page* page(const Range& range, uint64_t address) const;
  Page& page_to_write(Range& range, uint64_t address);
  static bool ordered(const Write& write, const Access& by);
  static void note(Write& write, const Access& by, bool strong);
  // Calls f(write, address) for every two bytes; stops at pages that are not there.
  template <class F>
  void each(Range& range, uint64_t address, int bytes, bool writes, F f);

  std::vector<Range> ranges_;  // disjoint, in order
  size_t last_ = 0;            // where the last access fell
  bool checks_ = true;
  std::map<uint64_t, std::shared_ptr<const Others>> handed_;  // by address
};

}  // namespace attnfast::ptx
