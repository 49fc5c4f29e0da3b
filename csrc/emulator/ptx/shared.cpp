#include "shared.h"

#include <cstring>

namespace attnfast::ptx {

namespace {

std::string byte(uint32_t address) { return "shared byte " + std::to_string(address); }

std::string named(int agent, int lane) {
  if (agent >= kMaxWarps) return "an asynchronous copy";
  if (lane < 0) return "warp " + std::to_string(agent);
  return "thread " + std::to_string(agent * kLanes + lane);
}

}  // namespace

void SharedMemory::reset(int bytes, int warps, bool checks) {
  words_ = (bytes + 3) / 4, warps_ = warps, checks_ = checks;
  data_.resize(words_ * 4);
  for (size_t n = 0; n < words_; ++n) std::memcpy(&data_[4 * n], &kPoison, 4);
  data_.resize(bytes);
  cells_.assign(words_, Cell{});
  if (reads_.size() < words_ * warps) reads_.resize(words_ * warps);
}

void SharedMemory::check_bounds(uint32_t address, int bytes) const {
  if (address >= kSharedBase && address - kSharedBase + bytes <= data_.size()) return;
  throw Fault("shared address " + std::to_string(address) + " (" + std::to_string(bytes) +
              " bytes) is outside of shared memory, " + std::to_string(kSharedBase) + " to " +
              std::to_string(kSharedBase + data_.size()));
}

size_t SharedMemory::split(size_t word) {
  if (cells_[word].split >= 0) return cells_[word].split;
  const size_t first = cells_.size();
  Cell copied = cells_[word];
  copied.split = -1;
  cells_.insert(cells_.end(), 4, copied);
  cells_[word].split = static_cast<int>(first);
  if (reads_.size() < cells_.size() * warps_) reads_.resize(cells_.size() * warps_ * 3 / 2);
  for (size_t b = first; b < first + 4; ++b) {
    std::memcpy(&reads_[b * warps_], &reads_[word * warps_], warps_ * sizeof(Read));
  }
  return first;
}

template <class F>
void SharedMemory::each(uint32_t address, int bytes, F f) {
  const uint32_t end = address + bytes;
  for (uint32_t a = address; a < end;) {
    const size_t word = (a - kSharedBase) / 4;
    const uint32_t next = std::min(end, (a & ~3u) + 4);
    if (next - a == 4 && cells_[word].split < 0) {
      f(word, a, 4);
    } else {
      const size_t first = split(word);
      for (uint32_t b = a; b < next; ++b) f(first + b % 4, b, 1);
    }
    a = next;
  }
}

void SharedMemory::check_idle(const Cell& cell, uint32_t address, bool writes) const {
  if (cell.claimed) throw Fault(byte(address) + " is an mbarrier's", cell.write_instruction);
  if (cell.copies) {
    throw Fault(byte(address) + (writes ? " is written" : " is read") +
                    " while an asynchronous copy to it is not waited for",
                cell.write_instruction);
  }
  if (writes && cell.async_reads) {
    throw Fault(byte(address) + " is written while an asynchronous instruction reads it");
  }
}

void SharedMemory::check_writer(const Cell& cell, uint32_t address, const Access& access,
                                const char* verb) const {
  if (cell.writer == access.who.warp && cell.writer_lane == access.lane && access.lane >= 0) return;
  if (access.who.known.behind(cell.writer, cell.writer_lane, cell.write_clock)) return;
  throw Fault("race: " + byte(address) + verb + named(cell.writer, cell.writer_lane) +
                  " wrote it with no barrier between",
              cell.write_instruction);
}

void SharedMemory::check_readers(size_t cell, uint32_t address, const Access& access) const {
  for (Mask left = cells_[cell].readers; left; left &= left - 1) {
    const int warp = __builtin_ctz(left);
    const Read& r = reads_[cell * warps_ + warp];
    const bool own = r.lane == kTogether || (r.lane == access.lane && access.lane >= 0);
    if (warp == access.who.warp && own) continue;
    if (access.who.known.behind(warp, r.lane, r.clock)) continue;
    throw Fault("race: " + byte(address) + " is written, " + named(warp, r.lane) +
                    " read it with no barrier between",
                r.instruction);
  }
}

void SharedMemory::note_read(size_t cell, const Access& access) {
  Cell& c = cells_[cell];
  const Mask bit = 1u << access.who.warp;
  Read& r = reads_[cell * warps_ + access.who.warp];
  const bool open = (c.readers & bit) && r.clock > access.who.known.seen[access.who.warp];
  int lane = access.lane;
  if (open && r.lane != lane && r.lane != kTogether) lane = lane == kTogether ? r.lane : kMany;
  c.readers |= bit;
  r = {access.who.clock, access.instruction, lane};
}

void SharedMemory::note_write(Cell& c, const Access& access) {
  c.writer = static_cast<int16_t>(access.who.warp),
  c.writer_lane = static_cast<int8_t>(access.lane);
  c.write_clock = access.who.clock, c.write_instruction = access.instruction, c.readers = 0;
}

void SharedMemory::read(uint32_t address, int bytes, const Access& access) {
  check_bounds(address, bytes);
  if (!checks_) return;
  each(address, bytes, [&](size_t cell, uint32_t a, int) {
    const Cell& c = cells_[cell];
    check_idle(c, a, false);
    if (!c.write_clock) throw Fault(byte(a) + " is read and was never written");
    check_writer(c, a, access, " is read, ");
    note_read(cell, access);
  });
}

void SharedMemory::write(uint32_t address, int bytes, const Access& access, const char* data) {
  check_bounds(address, bytes);
  if (!checks_) return;
  each(address, bytes, [&](size_t cell, uint32_t a, int n) {
    Cell& c = cells_[cell];
    check_idle(c, a, true);
    // Two that write what is there are no race: replicas do.
    const bool same = data && !std::memcmp(at(a), data + (a - address), n);
    if (!same) {
      if (c.write_clock) check_writer(c, a, access, " is written, ");
      check_readers(cell, a, access);
    }
    note_write(c, access);
  });
}

void SharedMemory::update(uint32_t address, int bytes, const Access& access, bool reads) {
  check_bounds(address, bytes);
  if (!checks_) return;
  each(address, bytes, [&](size_t cell, uint32_t a, int) {
    Cell& c = cells_[cell];
    check_idle(c, a, !reads);
    if (c.write_clock) return;
    if (reads) throw Fault(byte(a) + " is read and was never written");
    note_write(c, access);
  });
}

void SharedMemory::begin_write(uint32_t address, int bytes, const Access& access) {
  check_bounds(address, bytes);
  if (checks_) {
    each(address, bytes, [&](size_t cell, uint32_t a, int) {
      Cell& c = cells_[cell];
      check_idle(c, a, true);
      if (c.write_clock) check_writer(c, a, access, " is written, ");
      check_readers(cell, a, access);
      note_write(c, access);
      ++c.copies;
    });
  }
  for (int n = 0; n < bytes; ++n) {
    *at(address + n) = static_cast<char>(kPoison >> 8 * ((address + n) % 4));
  }
}

void SharedMemory::end_write(uint32_t address, int bytes, int agent, int lane, uint32_t clock,
                             int instruction) {
  if (!checks_) return;
  each(address, bytes, [&](size_t cell, uint32_t, int) {
    Cell& c = cells_[cell];
    --c.copies;
    c.writer = static_cast<int16_t>(agent), c.writer_lane = static_cast<int8_t>(lane);
    c.write_clock = clock, c.write_instruction = instruction;
  });
}

void SharedMemory::begin_async_read(uint32_t address, int bytes, const Access& access) {
  check_bounds(address, bytes);
  if (!checks_) return;
  each(address, bytes, [&](size_t cell, uint32_t a, int) {
    Cell& c = cells_[cell];
    check_idle(c, a, false);
    if (!c.write_clock) throw Fault(byte(a) + " is read and was never written");
    check_writer(c, a, access, " is read, ");
    if (c.writer < kMaxWarps && c.write_clock > access.who.known.fenced[c.writer]) {
      throw Fault(byte(a) + " is read by the asynchronous proxy, " +
                      named(c.writer, c.writer_lane) +
                      " wrote it with no fence.proxy.async between",
                  c.write_instruction);
    }
    ++c.async_reads;
  });
}

void SharedMemory::end_async_read(uint32_t address, int bytes, const Access& access) {
  if (!checks_) return;
  each(address, bytes, [&](size_t cell, uint32_t, int) {
    --cells_[cell].async_reads;
    note_read(cell, access);
  });
}

void SharedMemory::claim(uint32_t address, const Access& access) {
  check_bounds(address, 8);
  if (!checks_) return;
  each(address, 8, [&](size_t cell, uint32_t a, int) {
    Cell& c = cells_[cell];
    check_idle(c, a, true);
    if (c.write_clock) check_writer(c, a, access, " becomes an mbarrier, ");
    check_readers(cell, a, access);
    note_write(c, access);
    c.claimed = true;
  });
}

void SharedMemory::release(uint32_t address) {
  if (!checks_) return;
  each(address, 8, [&](size_t cell, uint32_t, int) {
    cells_[cell].claimed = false, cells_[cell].write_clock = 0;
  });
}

}  // namespace attnfast::ptx
