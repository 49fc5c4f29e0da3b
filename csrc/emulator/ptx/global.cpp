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
  if (!p) {
    p = std::make_unique<Page>();
    std::fill(p->writer, p->writer + kGranules, kNobody);
  }
  return *p;
}

template <class F>
void GlobalMemory::each(Range& range, uint64_t address, int bytes, bool writes, F f) {
  for (uint64_t a = address; a < address + bytes;) {
    const uint64_t page_end = std::min((a / kPageBytes + 1) * kPageBytes, address + bytes);
    Page* p = writes ? &page_to_write(range, a) : page(range, a);
    for (; p && a < page_end; a += 2 - a % 2) f(*p, a % kPageBytes / 2, a);
    a = page_end;
  }
}

bool GlobalMemory::ordered(int writer, int block) const {
  if (writer == kNobody || writer == block) return true;
  if (writer == kAtomics) {
    return std::any_of(updated_by_.begin(), updated_by_.end(),
                       [&](const auto& update) { return update.second == block; });
  }
  return ordered_.count({writer, block}) != 0;
}

char* GlobalMemory::read(uint64_t address, int bytes, int block, bool strong) {
  Range& range = inside(address, bytes, false);
  if (checks_ && !strong && !range.pages.empty()) {
    each(range, address, bytes, false, [&](Page& p, int g, uint64_t a) {
      if (ordered(p.writer[g], block)) return;
      throw Fault("race between blocks: global memory at " + hex(a) + " is read, " +
                      (p.writer[g] == kAtomics ? "atomic operations" : "another block") +
                      " wrote it in the same launch",
                  p.instruction[g]);
    });
  }
  return reinterpret_cast<char*>(address);
}

char* GlobalMemory::write(uint64_t address, int bytes, int block, int instruction,
                          const char* data) {
  Range& range = inside(address, bytes, true);
  char* there = reinterpret_cast<char*>(address);
  if (!checks_) return there;
  each(range, address, bytes, true, [&](Page& p, int g, uint64_t a) {
    const bool whole = bytes > 1 && a % 2 == 0 && a + 2 <= address + bytes;
    const bool same =
        data && !std::memcmp(there + (a - address), data + (a - address), whole ? 2 : 1);
    // Of two neighbouring bytes each may be another block's.
    if (!ordered(p.writer[g], block) && !same && whole) {
      throw Fault("race between blocks: global memory at " + hex(a) +
                      " is written, another block wrote another value there",
                  p.instruction[g]);
    }
    p.writer[g] = block, p.instruction[g] = instruction;
  });
  return there;
}

char* GlobalMemory::update(uint64_t address, int bytes, int block, int instruction) {
  Range& range = inside(address, bytes, true);
  if (!checks_) return reinterpret_cast<char*>(address);
  // Whoever updated this place before is before this block, with all that was before it.
  for (auto u = updated_by_.lower_bound({address, 0}); u != updated_by_.end(); ++u) {
    if (u->first != address) break;
    if (u->second == block) continue;
    std::set<std::pair<int, int>> more = {{u->second, block}};
    for (const auto& [first, later] : ordered_) {
      if (later == u->second) more.insert({first, block});
    }
    ordered_.insert(more.begin(), more.end());
  }
  updated_by_.insert({address, block});
  each(range, address, bytes, true, [&](Page& p, int g, uint64_t a) {
    if (p.writer[g] != kAtomics && !ordered(p.writer[g], block)) {
      throw Fault("race between blocks: an atomic operation on global memory at " + hex(a) +
                      ", another block wrote it in the same launch",
                  p.instruction[g]);
    }
    p.writer[g] = kAtomics, p.instruction[g] = instruction;
  });
  return reinterpret_cast<char*>(address);
}

}  // namespace attnfast::ptx
