#include "global.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace attnfast::ptx {

namespace {

std::string hex(uint64_t x) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

}  // namespace

void GlobalMemory::allow(uint64_t begin, uint64_t end, bool writable) {
  if (end > begin) ranges_.push_back({begin, end, writable, {}});
}

void GlobalMemory::arrange(bool checks) {
  checks_ = checks;
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<Range> joined;
  for (Range& r : ranges_) {
    // Views of one tensor; what may be written is so wherever it is seen from.
    if (!joined.empty() && r.begin < joined.back().end) {
      joined.back().writable |= r.writable;
      joined.back().end = std::max(joined.back().end, r.end);
    } else {
      joined.push_back(std::move(r));
    }
  }
  ranges_ = std::move(joined);
}

GlobalMemory::Range& GlobalMemory::inside(uint64_t address, int bytes, bool writes) {
  if (last_ >= ranges_.size() || address < ranges_[last_].begin ||
      address + bytes > ranges_[last_].end) {
    const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                                        [](uint64_t a, const Range& r) { return a < r.begin; });
    if (after == ranges_.begin() || address + bytes > (after - 1)->end) {
      std::string where = "outside of every tensor";
      if (after != ranges_.begin() && address < (after - 1)->end + (1 << 20)) {
        where = std::to_string(address + bytes - (after - 1)->end) + " bytes past the end of one";
      }
      throw Fault(std::string(writes ? "write" : "read") + " of " + std::to_string(bytes) +
                  " bytes of global memory at " + hex(address) + ", " + where);
    }
    last_ = after - 1 - ranges_.begin();
  }
  Range& range = ranges_[last_];
  if (writes && !range.writable) throw Fault("write to a tensor that is only read");
  return range;
}

GlobalMemory::Page* GlobalMemory::page(const Range& range, uint64_t address) const {
  const size_t n = address / kPageBytes - range.begin / kPageBytes;
  return n < range.pages.size() ? range.pages[n].get() : nullptr;
}

GlobalMemory::Page& GlobalMemory::page_to_write(Range& range, uint64_t address) {
  if (range.pages.empty()) {
    range.pages.resize(range.end / kPageBytes - range.begin / kPageBytes + 1);
  }
  std::unique_ptr<Page>& p = range.pages[address / kPageBytes - range.begin / kPageBytes];
  if (!p) p = std::make_unique<Page>();
  return *p;
}

template <class F>
void GlobalMemory::each(Range& range, uint64_t address, int bytes, bool writes, F f) {
  for (uint64_t a = address; a < address + bytes;) {
    const uint64_t page_end = std::min((a / kPageBytes + 1) * kPageBytes, address + bytes);
    Page* p = writes ? &page_to_write(range, a) : page(range, a);
    for (; p && a < page_end; a += 2 - a % 2) f(p->writes[a % kPageBytes / 2], a);
    a = page_end;
  }
}

bool GlobalMemory::ordered(const Write& write, const Access& by) {
  if (write.block == kNobody || write.block == by.who.block) return true;
  return by.who.behind(write.block, write.warp, write.lane, write.clock);
}

void GlobalMemory::note(Write& write, const Access& by, bool strong) {
  write.block = by.who.block, write.warp = static_cast<int8_t>(by.who.warp);
  write.lane = static_cast<int8_t>(by.lane), write.clock = by.who.clock;
  write.instruction = by.instruction, write.strong = strong;
}

char* GlobalMemory::read(uint64_t address, int bytes, const Access& by, bool strong) {
  Range& range = inside(address, bytes, false);
  if (checks_ && !range.pages.empty()) {
    each(range, address, bytes, false, [&](const Write& write, uint64_t a) {
      if ((strong && write.strong) || ordered(write, by)) return;
      throw Fault("race between blocks: global memory at " + hex(a) +
                      " is read, another block wrote it in the same launch",
                  write.instruction);
    });
  }
  return reinterpret_cast<char*>(address);
}

char* GlobalMemory::write(uint64_t address, int bytes, const Access& by, const char* data,
                          bool strong) {
  Range& range = inside(address, bytes, true);
  char* there = reinterpret_cast<char*>(address);
  changes += strong;
  if (!checks_) return there;
  each(range, address, bytes, true, [&](Write& write, uint64_t a) {
    const bool whole = bytes > 1 && a % 2 == 0 && a + 2 <= address + bytes;
    const bool same = !std::memcmp(there + (a - address), data + (a - address), whole ? 2 : 1);
    // Of two neighbouring bytes each may be another block's.
    if (!(strong && write.strong) && !ordered(write, by) && !same && whole) {
      throw Fault("race between blocks: global memory at " + hex(a) +
                      " is written, another block wrote another value there",
                  write.instruction);
    }
    note(write, by, strong);
  });
  return there;
}

char* GlobalMemory::update(uint64_t address, int bytes, const Access& by) {
  Range& range = inside(address, bytes, true);
  ++changes;
  if (!checks_) return reinterpret_cast<char*>(address);
  each(range, address, bytes, true, [&](Write& write, uint64_t a) {
    if (!write.strong && !ordered(write, by)) {
      throw Fault("race between blocks: an atomic operation on global memory at " + hex(a) +
                      ", another block wrote it in the same launch",
                  write.instruction);
    }
    note(write, by, true);
  });
  return reinterpret_cast<char*>(address);
}

}  // namespace attnfast::ptx
