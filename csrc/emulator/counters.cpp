#include "counters.h"

#include <algorithm>

namespace attnfast::emulator {

Count count_request(Space space, const std::vector<uint64_t>& addresses, int bytes) {
  Count count;
  count.requests = 1;
  std::vector<uint64_t> units;
  if (space == Space::kGlobal) {
    for (const uint64_t a : addresses) {
      for (uint64_t s = a / 32; s <= (a + bytes - 1) / 32; ++s) units.push_back(s);
    }
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
    count.cost = static_cast<int64_t>(units.size());
    std::vector<uint64_t> distinct = addresses;
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    count.least = (static_cast<int64_t>(distinct.size()) * bytes + 31) / 32;
    return count;
  }
  const size_t lanes = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;  // served together
  for (size_t first = 0; first < addresses.size(); first += lanes) {
    units.clear();
    for (size_t i = first; i < std::min(first + lanes, addresses.size()); ++i) {
      for (int b = 0; b < std::max(bytes, 4); b += 4) units.push_back(addresses[i] / 4 + b / 4);
    }
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
    int words[32] = {}, fullest = 0;
    for (const uint64_t word : units) fullest = std::max(fullest, ++words[word % 32]);
    count.cost += fullest;
    count.least += (static_cast<int64_t>(units.size()) + 31) / 32;
  }
  return count;
}

void WarpAccesses::add(int lane, const Place& place, Space space, uint64_t address, int bytes) {
  auto site = std::find_if(sites_.begin(), sites_.end(),
                           [&](const Site& s) { return s.place == place && s.bytes == bytes; });
  if (site == sites_.end()) {
    sites_.push_back({place, space, bytes, {}, {}});
    site = sites_.end() - 1;
  }
  const size_t nth = site->count[lane]++;
  if (site->requests.size() <= nth) site->requests.resize(nth + 1);
  site->requests[nth].push_back(address);
}

void WarpAccesses::flush(Counts* counts) {
  for (Site& site : sites_) {
    Count& total = (*counts)[{site.place.file_name(), site.place.line, site.place.op}];
    for (auto& request : site.requests) {
      std::sort(request.begin(), request.end());  // lanes arrive in any order
      total.add(count_request(site.space, request, site.bytes));
    }
  }
  sites_.clear();
}

}  // namespace attnfast::emulator
