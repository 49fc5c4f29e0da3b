// Scheduling, memory and its checks.
#include "machine.h"

#include <algorithm>
#include <cstring>

namespace attnfast::ptx {

static std::string hex(uint64_t x) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

// What is there and what is to be written, in words.
std::string Machine::held(uint64_t address, int bytes, const char* data) const {
  if (!data || address % 4 || bytes % 4) return "";
  std::string there = " (there", written = ", now";
  for (int i = 0; i < bytes; i += 4) {
    uint32_t a, b;
    std::memcpy(&a, &shared[address + i], 4), std::memcpy(&b, data + i, 4);
    there += ' ' + hex(a), written += ' ' + hex(b);
  }
  return there + written + ')';
}

void Machine::touch(Warp& w, uint64_t address, int bytes, int lane, bool writes, const char* data) {
  const int thread = w.index * kLanes + std::max(lane, 0);
  for (int i = 0; i < bytes; i++) {
    Shadow& s = shadow[address + i];
    if (s.pending)
      throw Fault("shared byte " + std::to_string(address + i) +
                  (writes ? " is written" : " is read") +
                  " while a cp.async to it is not waited for");
    if (!writes && !s.written && options.uninitialised)
      throw Fault("shared byte " + std::to_string(address + i) + " is read and was never written");
    if (options.races && !partial_barriers && s.writer >= 0 && s.write_epoch == epoch) {
      const bool same_warp = s.writer / kLanes == w.index;
      const bool races =
          !same_warp || (s.write_warp_epoch == w.epoch && (lane < 0 || s.writer != thread));
      const bool benign = writes && data && shared[address + i] == data[i];
      if (races && !benign)
        throw Fault("race: shared byte " + std::to_string(address + i) +
                    (writes ? " is written" : " is read") + ", thread " + std::to_string(s.writer) +
                    " wrote it with no barrier between" + held(address, bytes, data));
    }
    if (writes) {
      if (options.races && !partial_barriers && s.read_epoch == epoch &&
          s.readers & ~(1u << w.index) && !(data && shared[address + i] == data[i]))
        throw Fault("race: shared byte " + std::to_string(address + i) +
                    " is written, another warp read it with no barrier between");
      s.writer = thread, s.write_epoch = epoch, s.write_warp_epoch = w.epoch, s.written = true;
    } else {
      if (s.read_epoch != epoch) s.readers = 0, s.read_epoch = epoch;
      s.readers |= 1u << w.index;
    }
  }
}

char* Machine::at(Warp& w, Space space, uint64_t address, int bytes, int lane, bool writes,
                  const char* data) {
  if (space == Space::kGeneric) {
    const uint64_t window = address >> 60;
    space = window == 1   ? Space::kShared
            : window == 2 ? Space::kParam
            : window == 3 ? Space::kLocal
                          : Space::kGlobal;
    if (window) address &= (1ull << 60) - 1;
  }
  if (address % bytes)
    throw Fault("address " + hex(address) + " is not aligned to " + std::to_string(bytes) +
                " bytes");
  if (space == Space::kShared) {
    if (address + bytes > shared.size())
      throw Fault("shared address " + std::to_string(address) + " is beyond " +
                  std::to_string(shared.size()));
    touch(w, address, bytes, lane, writes, data);
    return shared.data() + address;
  }
  if (space == Space::kParam) {
    if (writes || address + bytes > static_cast<uint64_t>(program.parameter_bytes))
      throw Fault("parameter address");
    return const_cast<char*>(parameters) + address;
  }
  if (space == Space::kLocal) {
    if (address + bytes > static_cast<uint64_t>(program.local_bytes)) throw Fault("local address");
    return w.local.data() + static_cast<size_t>(lane) * program.local_bytes + address;
  }
  auto after = std::upper_bound(ranges.begin(), ranges.end(), address,
                                [](uint64_t a, const Range& r) { return a < r.begin; });
  if (after == ranges.begin() || address + bytes > (after - 1)->end)
    throw Fault(std::string(writes ? "write" : "read") + " of " + std::to_string(bytes) +
                " bytes of global memory at " + hex(address) + ", outside of every tensor");
  if (writes && !(after - 1)->writable) throw Fault("write to a tensor that is only read");
  return reinterpret_cast<char*>(address);
}

void Machine::complete(Warp& w, Copy& copy) {
  char bytes[16] = {};
  std::memcpy(bytes, copy.early ? copy.data : reinterpret_cast<char*>(copy.from), copy.valid);
  for (int i = 0; i < copy.size; i++) shadow[copy.to + i].pending--;
  for (int i = 0; i < copy.size; i++) {
    Shadow& s = shadow[copy.to + i];
    s.writer = w.index * kLanes + copy.lane, s.write_epoch = epoch, s.write_warp_epoch = w.epoch,
    s.written = true;
  }
  std::memcpy(shared.data() + copy.to, bytes, copy.size);
}

// Runs the first group that can, for a number of instructions.
void Machine::step(Warp& w, int most) {
  while (most > 0 && !w.groups.empty() && w.barrier < 0) {
    size_t n = 0;
    while (n < w.groups.size() && w.groups[n].waits) n++;
    if (n == w.groups.size()) throw Fault("lanes wait for each other at different instructions");
    Group g = w.groups[n];
    const bool alone = w.groups.size() == 1;
    int next = g.pc;
    for (; most > 0; most--) {
      const Instruction& i = program.code[g.pc];
      Mask m = g.lanes;
      if (i.guard >= 0) {
        const auto* p = reinterpret_cast<const uint32_t*>(w.file.data() + i.guard);
        Mask set = 0;
        for (int l = 0; l < kLanes; l++) set |= static_cast<Mask>(p[l] != 0) << l;
        m &= i.guard_negated ? ~set : set;
      }
      executed++;
      if (i.branch) {
        const Mask stay = g.lanes & ~m;
        if (!m) {
          g.pc++;
        } else if (!stay) {
          g.pc = i.target;
        } else {  // the lanes part
          w.groups.erase(w.groups.begin() + n);
          w.groups.push_back({g.pc + 1, stay});
          w.groups.push_back({i.target, m});
          goto merge;
        }
        if (alone) continue;
        w.groups[n] = g;
        goto merge;
      }
      if (i.exits) {
        if (m == g.lanes) {
          w.groups.erase(w.groups.begin() + n);
        } else {
          w.groups[n] = {g.pc + 1, g.lanes & ~m};
        }
        goto merge;
      }
      if (i.meets && !alone) {
        w.groups[n] = g;
        w.groups[n].waits = true;
        goto merge;
      }
      w.groups[n].pc = g.pc;  // for messages
      if (m) program.runs[g.pc]++, i.run(*this, w, i, m);
      g.pc++;
      if (w.barrier >= 0) {
        w.groups[n] = g;
        return;
      }
      if (!alone) break;
    }
    w.groups[n] = g;
    (void)next;
  merge:
    std::sort(w.groups.begin(), w.groups.end(),
              [](const Group& a, const Group& b) { return a.pc < b.pc; });
    for (size_t k = 1; k < w.groups.size();) {
      if (w.groups[k].pc == w.groups[k - 1].pc) {
        w.groups[k - 1].lanes |= w.groups[k].lanes;
        w.groups[k - 1].waits = false;
        w.groups.erase(w.groups.begin() + k);
      } else {
        k++;
      }
    }
    if (w.groups.size() == 1) w.groups[0].waits = false;
    most--;
  }
}

// Lets warps past a barrier that all of its threads have reached.
void Machine::release() {
  for (int id = 0; id < 16; id++) {
    int arrived = 0, expected = 0, alive = 0;
    for (Warp& w : warps) {
      if (!w.groups.empty()) alive += kLanes;
      if (w.barrier == id) arrived += kLanes, expected = w.expected;
    }
    if (!arrived) continue;
    const bool all = expected == 0 || expected == threads;
    if (!all) partial_barriers = true;
    if (arrived < (all ? alive : expected)) continue;
    for (Warp& w : warps)
      if (w.barrier == id) w.barrier = -1, w.epoch++;
    if (all) epoch++;
  }
}

void Machine::run_block(uint32_t x, uint32_t y, uint32_t z) {
  block[0] = x, block[1] = y, block[2] = z;
  std::memset(shared.data(), 0xFF, shared.size());
  std::fill(shadow.begin(), shadow.end(), Shadow{});
  epoch = 1;
  const int count = (threads + kLanes - 1) / kLanes;
  warps.resize(count);
  for (int n = 0; n < count; n++) {
    Warp& w = warps[n];
    w.index = n, w.barrier = -1, w.epoch = 0;
    w.file = program.registers;
    w.copies.clear(), w.products.clear(), w.product_groups = 0;
    std::fill(w.committed, w.committed + kLanes, 0);
    const int lanes = std::min(kLanes, threads - n * kLanes);
    w.groups = {{0, lanes == kLanes ? kAll : (1u << lanes) - 1}};
    w.local.assign(static_cast<size_t>(kLanes) * program.local_bytes, char(0xFF));
    for (const auto& [name, offset] : program.special) {
      auto* r = reinterpret_cast<uint32_t*>(w.file.data() + offset);
      for (int l = 0; l < kLanes; l++) {
        const uint32_t t = n * kLanes + l;
        r[l] = name == "%tid.x"                         ? t
               : name == "%ctaid.x"                     ? x
               : name == "%ctaid.y"                     ? y
               : name == "%ctaid.z"                     ? z
               : name == "%ntid.x"                      ? threads
               : name == "%nctaid.x"                    ? grid[0]
               : name == "%nctaid.y"                    ? grid[1]
               : name == "%nctaid.z"                    ? grid[2]
               : name == "%laneid"                      ? l
               : name == "%warpid"                      ? n
               : name == "%ntid.y" || name == "%ntid.z" ? 1
                                                        : 0;
      }
    }
  }
  for (;;) {
    int ready[64], n = 0;
    for (int k = 0; k < count; k++)
      if (warps[k].barrier < 0 && !warps[k].groups.empty()) ready[n++] = k;
    if (!n) {
      bool done = true;
      for (Warp& w : warps) done &= w.groups.empty();
      if (done) return;
      throw Fault("warps wait at different barriers, or for one that has ended");
    }
    Warp& w = warps[ready[random() % n]];
    const int most = 1 << random() % 12;
    try {
      step(w, most);
    } catch (const Fault& fault) {
      size_t g = 0;
      while (g + 1 < w.groups.size() && w.groups[g].waits) g++;
      const Instruction& i = program.code[w.groups.empty() ? 0 : w.groups[g].pc];
      throw Fault(std::string(fault.what()) + "\n  block " + std::to_string(x) + ", warp " +
                  std::to_string(w.index) + ", PTX line " + std::to_string(i.line) + ": " +
                  program.lines[i.line - 1] +
                  (i.source >= 0 ? "\n  from " + program.sources[i.source] : ""));
    }
    release();
  }
}

void Machine::launch(const uint32_t (&size)[3], int block_threads, int dynamic_shared,
                     const void* values) {
  std::copy(size, size + 3, grid);
  threads = block_threads;
  if (program.threads && program.threads != threads)
    throw Fault("launched with " + std::to_string(threads) + " threads, compiled for " +
                std::to_string(program.threads));
  parameters = static_cast<const char*>(values);
  program.runs.resize(program.code.size());
  shared.assign(program.static_shared + dynamic_shared, 0);
  shadow.assign(shared.size(), Shadow{});
  for (const auto& c : program.constants)
    ranges.push_back({reinterpret_cast<uint64_t>(c.data()),
                      reinterpret_cast<uint64_t>(c.data()) + c.size(), false});
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<Range> joined;
  for (const Range& r : ranges) {
    if (!joined.empty() && r.begin < joined.back().end)  // views of one tensor
      joined.back().writable |= r.writable, joined.back().end = std::max(joined.back().end, r.end);
    else
      joined.push_back(r);
  }
  ranges = joined;
  std::vector<uint32_t> blocks(static_cast<size_t>(grid[0]) * grid[1] * grid[2]);
  for (size_t n = 0; n < blocks.size(); n++) blocks[n] = n;
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (uint32_t n : blocks) run_block(n % grid[0], n / grid[0] % grid[1], n / grid[0] / grid[1]);
}

}  // namespace attnfast::ptx
