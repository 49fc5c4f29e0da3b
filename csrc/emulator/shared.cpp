#include "shared.h"

#include <algorithm>
#include <cstring>

namespace attnfast::emulator {

void SharedMemory::reset(int bytes, int warps) {
  const size_t cells = (bytes + 3) / 4;
  data_.assign(cells * 4, static_cast<char>(0xFF));  // NaN in every floating-point type
  cells_.assign(cells, Cell{});
  if (read_clocks_.size() < cells * kMaxWarps) read_clocks_.resize(cells * kMaxWarps);
  clocks_.assign(warps, Clocks{});
  for (int w = 0; w < warps; ++w) clocks_[w].seen[w] = 1;
}

const char* SharedMemory::check_bounds(uint32_t address, int bytes) const {
  if (address < kBase || address - kBase + bytes > size()) return "outside the block's memory";
  if (address % bytes) return "misaligned";
  return nullptr;
}

const char* SharedMemory::read(uint32_t address, int bytes, int thread, bool collective) {
  if (const char* fault = check_bounds(address, bytes)) return fault;
  const int warp = thread / kWarp;
  const Clocks& mine = clocks_[warp];
  const size_t first = (address - kBase) / 4;
  for (size_t i = first; i < first + (bytes + 3) / 4; ++i) {
    Cell& cell = cells_[i];
    if (cell.copies) return "read while an asynchronous copy into it is under way";
    if (!cell.write_clock) return "read, but never written";
    const int other = cell.writer / kWarp;
    if (other != warp && mine.seen[other] < cell.write_clock) {
      return "a race: read without a barrier after another warp's write";
    }
    if (other == warp && (collective || cell.writer != thread) && cell.write_epoch == mine.epoch) {
      return "a race: read without sync_warp after another lane's write";
    }
    cell.readers |= 1u << warp;
    cell.reader = collective ? -1 : static_cast<int16_t>(thread);
    cell.read_epoch = mine.epoch;
    read_clocks_[i * kMaxWarps + warp] = mine.seen[warp];
  }
  return nullptr;
}

const char* SharedMemory::check_write(Cell& cell, size_t index, int thread) const {
  const int warp = thread / kWarp;
  const Clocks& mine = clocks_[warp];
  if (cell.copies) return "written while an asynchronous copy into it is under way";
  if (cell.write_clock) {
    const int other = cell.writer / kWarp;
    if (other != warp && mine.seen[other] < cell.write_clock) {
      return "a race: written without a barrier after another warp's write";
    }
    if (other == warp && cell.writer != thread && cell.write_epoch == mine.epoch) {
      return "a race: written without sync_warp after another lane's write";
    }
  }
  for (uint32_t left = cell.readers; left; left &= left - 1) {
    const int other = __builtin_ctz(left);
    if (other != warp && mine.seen[other] < read_clocks_[index * kMaxWarps + other]) {
      return "a race: written without a barrier after another warp's read";
    }
    if (other == warp && cell.reader >= 0 && cell.reader != thread && cell.reader / kWarp == warp &&
        cell.read_epoch == mine.epoch) {
      return "a race: written without sync_warp after another lane's read";
    }
  }
  cell.readers = 0;
  return nullptr;
}

const char* SharedMemory::write(uint32_t address, int bytes, int thread) {
  if (const char* fault = check_bounds(address, bytes)) return fault;
  const Clocks& mine = clocks_[thread / kWarp];
  const size_t first = (address - kBase) / 4;
  for (size_t i = first; i < first + (bytes + 3) / 4; ++i) {
    Cell& cell = cells_[i];
    if (const char* fault = check_write(cell, i, thread)) return fault;
    cell.write_clock = mine.seen[thread / kWarp];
    cell.write_epoch = mine.epoch;
    cell.writer = static_cast<int16_t>(thread);
  }
  return nullptr;
}

const char* SharedMemory::begin_copy(uint32_t address, int bytes, int thread) {
  if (const char* fault = check_bounds(address, bytes)) return fault;
  const size_t first = (address - kBase) / 4;
  for (size_t i = first; i < first + (bytes + 3) / 4; ++i) {
    if (const char* fault = check_write(cells_[i], i, thread)) return fault;
    ++cells_[i].copies;
  }
  std::memset(at(address), 0xFF, bytes);
  return nullptr;
}

void SharedMemory::end_copy(uint32_t address, int bytes, int thread) {
  const Clocks& mine = clocks_[thread / kWarp];
  const size_t first = (address - kBase) / 4;
  for (size_t i = first; i < first + (bytes + 3) / 4; ++i) {
    Cell& cell = cells_[i];
    --cell.copies;
    cell.write_clock = mine.seen[thread / kWarp];
    cell.write_epoch = mine.epoch;
    cell.writer = static_cast<int16_t>(thread);
  }
}

void SharedMemory::join(const std::vector<int>& warps) {
  Clocks all;
  for (int w : warps) {
    for (size_t i = 0; i < clocks_.size(); ++i) {
      all.seen[i] = std::max(all.seen[i], clocks_[w].seen[i]);
    }
  }
  for (int w : warps) {
    Clocks& clock = clocks_[w];
    std::copy(std::begin(all.seen), std::end(all.seen), clock.seen);
    ++clock.seen[w], ++clock.epoch;
  }
}

}  // namespace attnfast::emulator
