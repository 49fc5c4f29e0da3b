// Shared memory of one block, with the history that tells whether an access is ordered.
//
// Every 4 bytes remember who wrote them last and which warps have read them since. Warps keep
// vector clocks, which barriers join: an access races unless the ones it must follow happened
// before it (FastTrack, Flanagan and Freund 2009). Within a warp, lanes are ordered by sync_warp.
// Where an asynchronous copy is under way, nothing may read or write; its destination holds NaN
// until it lands.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace attnfast::emulator {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

// What a warp knows of the others: the clock up to which each one's accesses lie behind it.
struct Clocks {
  uint32_t seen[kMaxWarps] = {};
  uint32_t epoch = 0;  // counts the warp's own synchronisations, sync_warp included
};

class SharedMemory {
 public:
  // Addresses start here, not at zero, so that a kernel cannot confuse offsets and addresses.
  static constexpr uint32_t kBase = 1024;

  void reset(int bytes, int warps);
  uint32_t size() const { return static_cast<uint32_t>(cells_.size() * 4); }
  char* at(uint32_t address) { return data_.data() + (address - kBase); }
  Clocks& clocks(int warp) { return clocks_[warp]; }

  // Each returns null, or what is wrong with the access. Collective: of a warp as a whole.
  const char* read(uint32_t address, int bytes, int thread, bool collective);
  const char* write(uint32_t address, int bytes, int thread);
  const char* begin_copy(uint32_t address, int bytes, int thread);
  void end_copy(uint32_t address, int bytes, int thread);

  // All accesses of these warps so far happen before what any of them does next.
  void join(const std::vector<int>& warps);
  // The same between the lanes of a warp.
  void join_lanes(int warp) { ++clocks_[warp].epoch; }

 private:
  struct Cell {
    uint32_t write_clock = 0, write_epoch = 0;  // of the writing warp; clock 0: never written
    uint32_t readers = 0;                       // warps that have read it since
    uint32_t read_epoch = 0;
    int16_t writer = -1, reader = -1;  // threads; reader -1: all lanes at once
    uint16_t copies = 0;               // under way into it
  };

  const char* check_bounds(uint32_t address, int bytes) const;
  const char* check_write(Cell& cell, size_t index, int thread) const;

  std::vector<char> data_;
  std::vector<Cell> cells_;
  std::vector<uint32_t> read_clocks_;  // [cell][warp], valid where the cell's bit of readers is set
  std::vector<Clocks> clocks_;
};

}  // namespace attnfast::emulator
