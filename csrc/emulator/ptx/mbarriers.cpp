#include "mbarriers.h"

namespace attnfast::ptx {

namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;

}  // namespace

Mbarriers::Mbarrier& Mbarriers::find(uint32_t address) {
  const auto found = all_.find(address);
  if (found == all_.end()) {
    throw Fault("there is no mbarrier at shared address " + std::to_string(address));
  }
  return found->second;
}

const Mbarriers::Mbarrier& Mbarriers::find(uint32_t address) const {
  return const_cast<Mbarriers*>(this)->find(address);
}

void Mbarriers::init(uint32_t address, uint32_t count, const Access& by) {
  if (address % 8) throw Fault("an mbarrier that is not aligned to 8 bytes");
  if (!count || count > kMostBytes) throw Fault("an mbarrier of " + std::to_string(count));
  if (all_.count(address)) throw Fault("an mbarrier is there already", find(address).instruction);
  Mbarrier m{};
  m.expected = m.pending = count;
  m.slot = slots_++ % kSlots;
  m.initialised_by = by.who.warp, m.lane = by.lane, m.instruction = by.instruction;
  m.initialised_at = by.who.clock;
  all_.emplace(address, m);
}

void Mbarriers::invalidate(uint32_t address) {
  find(address);
  all_.erase(address);
}

void Mbarriers::check(uint32_t address, const Access& by) const {
  const Mbarrier& m = find(address);
  if (m.initialised_by == by.who.warp && (m.lane == by.lane || by.lane < 0)) return;
  if (by.who.known.behind(m.initialised_by, m.lane, m.initialised_at)) return;
  throw Fault("race: the mbarrier at shared address " + std::to_string(address) +
                  " is used with no barrier after its initialisation",
              m.instruction);
}

uint64_t Mbarriers::arrive(uint32_t address, uint32_t count, const Clocks& clocks, const Access& by,
                           bool for_ever) {
  check(address, by);
  Mbarrier& m = find(address);
  if (count > m.pending) {
    throw Fault("more arrivals than an mbarrier has left in its phase: " + describe(address));
  }
  const uint64_t phase = m.phase;
  m.arriving.join(clocks);
  m.pending -= count;
  if (for_ever) m.expected -= count;
  advance(m);
  return phase;
}

void Mbarriers::expect(uint32_t address, uint32_t bytes, const Access& by) {
  check(address, by);
  Mbarrier& m = find(address);
  m.bytes += bytes;
  if (m.bytes > kMostBytes) throw Fault("an mbarrier expects too many bytes");
}

void Mbarriers::complete(uint32_t address, uint32_t bytes, uint32_t clock) {
  Mbarrier& m = find(address);
  uint32_t& seen = m.arriving.seen[kMaxWarps + m.slot];
  seen = std::max(seen, clock);
  m.bytes -= bytes;
  if (m.bytes < -kMostBytes) throw Fault("more bytes land than an mbarrier can count");
  advance(m);
}

void Mbarriers::advance(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.done.join(m.arriving);
  ++m.phase, m.pending = m.expected;
}

bool Mbarriers::over(uint32_t address, uint64_t phase) const { return find(address).phase > phase; }

uint64_t Mbarriers::latest(uint32_t address, bool parity) const {
  const uint64_t phase = find(address).phase;
  return (phase & 1) != parity ? phase : phase - 1;  // the first one's parity is 0
}

void Mbarriers::acquire(uint32_t address, Position& position) const {
  position.known.join(find(address).done);
}

int Mbarriers::agent(uint32_t address) const { return kMaxWarps + find(address).slot; }

uint32_t Mbarriers::tick(uint32_t address) { return ++ticks_[find(address).slot]; }

std::string Mbarriers::describe(uint32_t address) const {
  const Mbarrier& m = find(address);
  return "mbarrier at shared address " + std::to_string(address) + ", phase " +
         std::to_string(m.phase - 1) + ", which lacks " + std::to_string(m.pending) + " of " +
         std::to_string(m.expected) + " arrivals and " + std::to_string(m.bytes) + " bytes";
}

}  // namespace attnfast::ptx
