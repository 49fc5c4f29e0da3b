// Shared memory of one block, with the history that tells whether an access is ordered.
//
// Every word remembers its last write and each warp's last read, a byte at a time once it was
// accessed in parts. An access races unless those that it must follow lie behind it by the warps'
// clocks. What asynchronous copies write is poison until they land, and what they read must stay
// as it is until they are waited for.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "clocks.h"

namespace attnfast::ptx {

constexpr uint32_t kPoison = 0x7FA17FA1;  // a signalling NaN in fp32, a NaN in bf16 and fp16

class SharedMemory {
 public:
  void reset(int bytes, int warps, bool checks);
  char* at(uint32_t address) { return data_.data() + (address - kSharedBase); }
  void check_bounds(uint32_t address, int bytes) const;

  // Raise Fault for what is wrong with an access; `data` is what a write will leave.
  void read(uint32_t address, int bytes, const Access& access);
  void write(uint32_t address, int bytes, const Access& access, const char* data);
  // Of volatile and atomic accesses, which do not race.
  void update(uint32_t address, int bytes, const Access& access, bool reads);

  // An asynchronous write, from its issue to when `agent` has landed it. Poisons.
  void begin_write(uint32_t address, int bytes, const Access& access);
  void end_write(uint32_t address, int bytes, int agent, int lane, uint32_t clock, int instruction);
  // An asynchronous read, from its issue to its wait. It is of the asynchronous proxy: generic
  // writes have to be fenced.
  void begin_async_read(uint32_t address, int bytes, const Access& access);
  void end_async_read(uint32_t address, int bytes, const Access& access);

  // An mbarrier's bytes are no data.
  void claim(uint32_t address, const Access& access);
  void release(uint32_t address);

 private:
  struct Cell {
    uint32_t write_clock = 0;  // 0: never written
    int write_instruction = -1;
    int16_t writer = 0;  // an agent
    int8_t writer_lane = kMany;
    bool claimed = false;
    uint16_t copies = 0;       // that will write here
    uint16_t async_reads = 0;  // under way
    Mask readers = 0;          // warps, since the last write
    int split = -1;            // a word's bytes have cells from here on
  };
  struct Read {
    uint32_t clock;
    int instruction : 24;
    int lane : 8;
  };

  // Calls f(cell, address of its first byte, bytes) for all that an access touches.
  template <class F>
  void each(uint32_t address, int bytes, F f);
  size_t split(size_t word);
  void check_idle(const Cell& cell, uint32_t address, bool writes) const;
  void check_writer(const Cell& cell, uint32_t address, const Access& access,
                    const char* verb) const;
  void check_readers(size_t cell, uint32_t address, const Access& access) const;
  void note_read(size_t cell, const Access& access);
  void note_write(Cell& cell, const Access& access);

  std::vector<char> data_;
  std::vector<Cell> cells_;  // of words, then of the bytes of those that are split
  std::vector<Read> reads_;  // [cell][warp], valid where the cell's bit of readers is set
  size_t words_ = 0;
  int warps_ = 1;
  bool checks_ = true;
};

}  // namespace attnfast::ptx
