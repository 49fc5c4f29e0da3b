// What a layout costs: shared-memory wavefronts and global-memory sectors of every primitive.
//
// Shared memory serves one 4-byte word of each of its 32 banks at a time: a request of a warp takes
// as many wavefronts as its fullest bank has different words, 16-byte accesses in four parts.
// Global memory comes in sectors of 32 bytes. Both are counted beside the least that would do.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "place.h"

namespace attnfast::emulator {

struct Count {
  int64_t requests = 0;  // of whole warps
  int64_t cost = 0;      // wavefronts or sectors
  int64_t least = 0;     // what the same bytes would cost in the best layout

  void add(const Count& other) {
    requests += other.requests, cost += other.cost, least += other.least;
  }
};

// By (file, line, primitive).
using Counts = std::map<std::tuple<std::string, int, std::string>, Count>;

enum class Space { kShared, kGlobal };

// One instruction of a warp: the addresses of the lanes that took part.
Count count_request(Space space, const std::vector<uint64_t>& addresses, int bytes);

// Collects the accesses of one warp's lanes, which arrive one by one, into requests: the nth access
// of every lane at one place is one request.
class WarpAccesses {
 public:
  void add(int lane, const Place& place, Space space, uint64_t address, int bytes);
  // At a collective: no later access belongs to a request from before it.
  void flush(Counts* counts);

 private:
  struct Site {
    Place place;
    Space space;
    int bytes;
    std::vector<std::vector<uint64_t>> requests;
    int count[32] = {};
  };
  std::vector<Site> sites_;
};

}  // namespace attnfast::emulator
