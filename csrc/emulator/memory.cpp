#include "memory.h"

#include <utility>

namespace attnfast::emulator {

void Memory::allow(const void* data, int64_t bytes, bool writable, std::string name) {
  if (!data || bytes <= 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  regions_.push_back({begin, begin + bytes, writable, std::move(name)});
}

std::string Memory::describe(const void* data, int bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const Region* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Region& r : regions_) {
    const uintptr_t d = end > r.end ? end - r.end : begin < r.begin ? r.begin - begin : 0;
    if (d < distance) nearest = &r, distance = d;
  }
  if (!nearest) return "no tensor was given";
  if (distance == 0) return nearest->name + " is read-only";
  return std::to_string(distance) + " bytes " +
         (end > nearest->end ? "past the end of " : "before ") + nearest->name;
}

}  // namespace attnfast::emulator
