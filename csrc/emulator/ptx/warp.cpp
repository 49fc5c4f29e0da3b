// What a warp executes next: guards, divergence, meeting points.
#include <algorithm>
#include <climits>

#include "machine.h"
#include "warpgroup.h"

namespace attnfast::ptx {

Warp::Warp(Block& of, int number) : block(of), index(number) {}
Warp::~Warp() = default;

void Warp::reset(int lanes) {
  const Program& program = block.launch.program;
  file_ = program.registers;
  local_.assign(static_cast<size_t>(kLanes) * program.local_bytes, char(0xFF));
  groups = {{0, lanes == kLanes ? kAll : (1u << lanes) - 1}};
  position = Position();
  position.block = block.number, position.warp = index;
  poll_ = Poll();
  barrier = -1, pc = 0;
  copies.clear(), stores.clear();
  std::fill(committed, committed + kLanes, 0);
  std::fill(committed_stores, committed_stores + kLanes, 0);
  products = std::make_unique<Products>();
  stops_ = again_ = false;
}

Mask Warp::live() const {
  Mask all = 0;
  for (const Group& g : groups) all |= g.lanes;
  return all;
}

bool Warp::waits_for_blocks() const {
  return std::any_of(groups.begin(), groups.end(),
                     [](const Group& g) { return g.waits == Wait::kChange; });
}

void Warp::wait_for(uint32_t mbarrier, uint64_t phase) {
  for (Group& g : groups) {
    if (g.pc != pc) continue;
    g.waits = Wait::kMbarrier, g.mbarrier = mbarrier, g.phase = phase;
  }
  stops_ = again_ = true;
}

// The first group that can run, or -1.
int Warp::runnable() {
  for (size_t n = 0; n < groups.size(); ++n) {
    Group& g = groups[n];
    const bool over = g.waits == Wait::kMbarrier ? block.mbarriers.over(g.mbarrier, g.phase)
                                                 : block.launch.global.changes != g.phase;
    if (g.waits != Wait::kLanes && over) g.waits = Wait::kNot;
    if (g.waits == Wait::kNot) return static_cast<int>(n);
  }
  return -1;
}

bool Warp::ready() {
  if (groups.empty() || barrier >= 0) return false;
  if (runnable() >= 0) return true;
  const bool parked = std::any_of(groups.begin(), groups.end(),
                                  [](const Group& g) { return g.waits != Wait::kLanes; });
  if (parked) return false;
  pc = groups[0].pc;
  throw Fault("lanes wait for one another at different instructions", groups.back().pc);
}

Mask Warp::guarded(const Instruction& i, Mask lanes_here) {
  const auto* p = lanes<uint32_t>(i.guard);
  Mask set = 0;
  for (int l = 0; l < kLanes; ++l) set |= static_cast<Mask>(p[l] != 0) << l;
  return lanes_here & (i.guard_negated ? ~set : set);
}

void Warp::run(int most) {
  stops_ = false;
  while (most > 0 && !groups.empty() && !stops_) {
    const int n = runnable();
    if (n < 0) return;
    run_group(n, most);
  }
}

// Until it branches away from the others, meets them, or the turn is over.
void Warp::run_group(size_t n, int& most) {
  const Program& program = block.launch.program;
  const Instruction* code = program.code.data();
  const bool alone = groups.size() == 1;
  const int limit = n + 1 < groups.size() ? groups[n + 1].pc : INT_MAX;
  const Mask here = groups[n].lanes;
  int at = groups[n].pc;
  while (most-- > 0 && at < limit) {
    const Instruction& i = code[at];
    const Mask taken = i.guard < 0 ? here : guarded(i, here);
    ++block.launch.executed;
    pc = at;
    if (i.flow != Flow::kNext) {
      groups[n].pc = at;
      if (taken) ++program.runs[at];
      if (!follow(n, i, taken)) return;
      at = groups[n].pc;
      continue;
    }
    if (i.meets && !alone) {
      groups[n].pc = at, groups[n].waits = Wait::kLanes;
      return merge();
    }
    if (taken) {
      ++program.runs[at];
      if (i.writes_fragment || products->in_flight()) products->check(program, at);
      groups[n].pc = at;
      i.run(*this, i, taken);
      if (again_) {
        again_ = false;
        return;
      }
    }
    ++at;
    if (stops_) break;
  }
  groups[n].pc = at;
  if (!alone) merge();
}

// Where control goes from a branch or an end. Returns whether the same lanes, alone, go on.
bool Warp::follow(size_t n, const Instruction& i, Mask taken) {
  const bool alone = groups.size() == 1;
  Group& g = groups[n];
  const Mask stay = g.lanes & ~taken;
  if (i.flow == Flow::kIndexedBranch && taken) {
    follow_table(n, i, taken);
    merge();
    return false;
  }
  if (i.flow == Flow::kExit && taken) {
    if (stay) {
      g = {g.pc + 1, stay};
    } else {
      groups.erase(groups.begin() + static_cast<long>(n));
    }
    merge();
    if (groups.empty()) end();
    return false;
  }
  if (!taken) {
    ++g.pc;
  } else if (!stay) {
    g.pc = i.target;
  } else {
    g = {g.pc + 1, stay};
    groups.push_back({i.target, taken});
  }
  if (alone && groups.size() == 1) return true;
  merge();
  return false;
}

void Warp::follow_table(size_t n, const Instruction& i, Mask taken) {
  const auto& targets = static_cast<const IndexedTargets&>(*i.detail).targets;
  const auto* which = lanes<uint32_t>(i.operands[1]);
  const Group before = groups[n];
  groups.erase(groups.begin() + static_cast<long>(n));
  if (before.lanes & ~taken) groups.push_back({before.pc + 1, before.lanes & ~taken});
  for (int l = 0; l < kLanes; ++l) {
    if (!(taken >> l & 1)) continue;
    if (which[l] >= targets.size()) throw Fault("brx.idx beyond its targets");
    groups.push_back({targets[which[l]], 1u << l});
  }
}

void Warp::merge() {
  std::stable_sort(groups.begin(), groups.end(),
                   [](const Group& a, const Group& b) { return a.pc < b.pc; });
  size_t kept = 0;
  for (size_t k = 1; k < groups.size(); ++k) {
    if (groups[k].pc == groups[kept].pc) {
      groups[kept].lanes |= groups[k].lanes;
      groups[kept].waits = Wait::kNot;
    } else {
      groups[++kept] = groups[k];
    }
  }
  if (!groups.empty()) groups.resize(kept + 1);
  // Alone, a group waits for no lanes any more.
  if (groups.size() == 1 && groups[0].waits == Wait::kLanes) groups[0].waits = Wait::kNot;
}

void Warp::end() {
  if (products->in_flight()) throw Fault("the warp ends with a wgmma that is not waited for");
  for (const auto& store : stores) {
    if (!store->done)
      throw Fault("the warp ends with a bulk copy that still reads shared memory",
                  store->instruction);
  }
}

uint32_t Warp::shared_address(uint64_t address) {
  if (address / kWindow == 1) address -= kSharedWindow;
  return address > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(address);
}

char* Warp::access(Space space, uint64_t address, int bytes, int lane, bool writes, bool strong,
                   const char* data) {
  if (space == Space::kGeneric) {
    const uint64_t window = address / kWindow;
    space = window == 1   ? Space::kShared
            : window == 2 ? Space::kParam
            : window == 3 ? Space::kLocal
                          : Space::kGlobal;
    if (window && window < 4) address %= kWindow;
  }
  if (address % bytes) {
    char text[32];
    snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
    throw Fault(std::string("misaligned: address ") + text + " is no multiple of " +
                std::to_string(bytes) + " bytes");
  }
  switch (space) {
    case Space::kShared: {
      const uint32_t a = shared_address(address);
      if (strong) {
        block.shared.update(a, bytes, by(lane), !writes || !data);  // atomics read too
      } else if (writes) {
        block.shared.write(a, bytes, by(lane), data);
      } else {
        block.shared.read(a, bytes, by(lane));
      }
      return block.shared.at(a);
    }
    case Space::kParam: {
      const auto size = static_cast<uint64_t>(block.launch.program.parameter_bytes);
      if (writes || address + bytes > size) throw Fault("access beyond the parameters");
      return const_cast<char*>(block.launch.parameters) + address;
    }
    case Space::kLocal: {
      const auto size = static_cast<uint64_t>(block.launch.program.local_bytes);
      if (address + bytes > size) throw Fault("access beyond local memory");
      return local_.data() + static_cast<size_t>(lane) * size + address;
    }
    default:
      break;
  }
  GlobalMemory& global = block.launch.global;
  if (writes) return global.write(address, bytes, by(lane), data, strong);
  return global.read(address, bytes, by(lane), strong);
}

}  // namespace attnfast::ptx
