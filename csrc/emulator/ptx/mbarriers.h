// The mbarriers of a block: arrivals and bytes of asynchronous copies that complete a phase.
#pragma once
#include <cstdint>
#include <map>
#include <string>

#include "clocks.h"

namespace attnfast::ptx {

class Mbarriers {
 public:
  void reset() { *this = Mbarriers(); }

  // Each raises Fault for an address without an mbarrier.
  void init(uint32_t address, uint32_t count, const Access& by);
  void invalidate(uint32_t address);
  // Returns the phase that is under way before. `clocks` is what the arrival publishes.
  uint64_t arrive(uint32_t address, uint32_t count, const Clocks& clocks, const Access& by,
                  bool for_ever = false);
  void expect(uint32_t address, uint32_t bytes, const Access& by);
  // An asynchronous copy of so many bytes has landed.
  void complete(uint32_t address, uint32_t bytes, uint32_t clock);

  // Whether the phase is over; `acquire` gives what was published until then.
  bool over(uint32_t address, uint64_t phase) const;
  // The latest phase of that parity that has begun; the one before the first, if none has.
  uint64_t latest(uint32_t address, bool parity) const;
  void acquire(uint32_t address, Position& position) const;
  void check(uint32_t address, const Access& by) const;

  // Of copies that report to it: their agent, and a new time of it.
  int agent(uint32_t address) const;
  uint32_t tick(uint32_t address);

  std::string describe(uint32_t address) const;

 private:
  struct Mbarrier {
    int64_t expected, pending, bytes = 0;
    uint64_t phase = 1;  // under way; 0 is over from the start
    int slot;
    Clocks arriving, done;
    int initialised_by, lane, instruction;
    uint32_t initialised_at;
  };
  Mbarrier& find(uint32_t address);
  const Mbarrier& find(uint32_t address) const;
  void advance(Mbarrier& m);

  std::map<uint32_t, Mbarrier> all_;
  int slots_ = 0;
  uint32_t ticks_[kSlots] = {};
};

}  // namespace attnfast::ptx
