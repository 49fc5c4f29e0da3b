// Global memory as a kernel may see it: the tensors of the call, and nothing else.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace attnfast::emulator {

struct Region {
  uintptr_t begin, end;
  bool writable;
  std::string name;
};

class Memory {
 public:
  // Registers `bytes` from `data` on under the name that messages use.
  void allow(const void* data, int64_t bytes, bool writable, std::string name);

  // Null, or why a kernel may not touch these bytes. `hint` remembers where the last access fell.
  const char* refuse(const void* data, int bytes, bool write, size_t* hint) const {
    const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
    if (*hint < regions_.size() && inside(regions_[*hint], begin, end, write)) return nullptr;
    for (size_t i = 0; i < regions_.size(); ++i) {
      if (inside(regions_[i], begin, end, write)) {
        *hint = i;
        return nullptr;
      }
    }
    return write ? "a write outside every tensor that may be written"
                 : "a read outside every tensor";
  }

  const std::vector<Region>& regions() const { return regions_; }

  // "4 bytes past the end of k": where an address lies relative to the nearest region.
  std::string describe(const void* data, int bytes) const;

 private:
  static bool inside(const Region& r, uintptr_t begin, uintptr_t end, bool write) {
    return begin >= r.begin && end <= r.end && (!write || r.writable);
  }
  std::vector<Region> regions_;
};

}  // namespace attnfast::emulator
