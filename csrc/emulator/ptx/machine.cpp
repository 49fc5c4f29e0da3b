// Scheduling: warps in any order, asynchronous loads at any time, a few blocks at a time.
//
// Blocks begin in any order, as CUDA promises none. So who waits for another block has to know that
// it has begun, as by a ticket, or may wait for ever.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "warpgroup.h"

namespace attnfast::ptx {

namespace {

constexpr int64_t kTooLong = int64_t{1} << 32;  // instructions of one block
constexpr uint32_t kMostResident = 4;           // blocks
constexpr int kMostVain = 1000;                 // reads again by warps that wait for other blocks

}  // namespace

void Launch::run(const uint32_t (&size)[3], int block_threads, int dynamic, const void* values) {
  std::copy(size, size + 3, grid);
  threads = block_threads, dynamic_shared = dynamic;
  parameters = static_cast<const char*>(values);
  shared_bytes = program.static_shared + dynamic;
  const int most = program.most_threads ? program.most_threads : kMaxWarps * kLanes;
  if ((program.threads && program.threads != threads) || threads < 1 || threads > most) {
    throw Fault("launched with " + std::to_string(threads) + " threads, compiled for " +
                std::to_string(program.threads ? program.threads : most));
  }
  for (const auto& c : program.constants) {
    const auto begin = reinterpret_cast<uint64_t>(c.data());
    global.allow(begin, begin + c.size(), false);
  }
  global.arrange(options.checks);
  std::vector<uint32_t> order(static_cast<size_t>(grid[0]) * grid[1] * grid[2]);
  for (size_t n = 0; n < order.size(); ++n) {
    order[n] = static_cast<uint32_t>(n);
    std::swap(order[n], order[random.below(static_cast<uint32_t>(n + 1))]);
  }
  run_blocks(order);
}

void Launch::run_blocks(const std::vector<uint32_t>& order) {
  std::vector<std::unique_ptr<Block>> running;
  size_t begun = 0;
  const size_t most = 1 + random.below(kMostResident);
  for (; begun < std::min(most, order.size()); ++begun) {
    running.push_back(std::make_unique<Block>(*this, (threads + kLanes - 1) / kLanes));
    running.back()->begin(order[begun]);
  }
  size_t n = 0, standing = 0;  // how many stood, one after the other
  int vain = 0;
  for (uint64_t seen = 0; !running.empty();) {
    const Block::Turn turn = running[n]->turn();
    standing = turn == Block::Turn::kStands ? standing + 1 : 0;
    if (turn == Block::Turn::kEnded) {
      if (begun < order.size()) {
        running[n]->begin(order[begun++]);
      } else {
        running.erase(running.begin() + static_cast<long>(n));
        if (running.empty()) return;
      }
    }
    if (seen != global.changes) seen = global.changes, vain = 0;
    if (standing == running.size()) {
      if (++vain > kMostVain) {
        std::string text = "deadlock of blocks";
        for (const auto& b : running) text += b->waiting();
        throw Fault(text);
      }
      seen = ++global.changes, standing = 0;
    }
    if (standing) {
      n = (n + 1) % running.size();
    } else if (turn == Block::Turn::kEnded || !random.below(8)) {
      n = random.below(static_cast<uint32_t>(running.size()));
    }
  }
}

Block::Block(Launch& of, int count) : launch(of) {
  for (int n = 0; n < count; ++n) warps.push_back(std::make_unique<Warp>(*this, n));
}

void Block::reset() {
  const int count = static_cast<int>(warps.size());
  shared.reset(launch.shared_bytes, count, launch.options.checks);
  mbarriers.reset();
  loads_.clear(), unacquired_maps.clear();
  warpgroup_order.assign((count + 3) / 4, {});
  std::fill(std::begin(barriers_), std::end(barriers_), Barrier());
  for (const auto& w : warps) {
    w->reset(std::min(kLanes, launch.threads - w->index * kLanes));
    fill_special(*w);
  }
  pace_ = static_cast<Pace>(launch.random.below(3));
  // A warp that lags behind all others, or runs ahead, finds barriers that are missing.
  held_ = favoured_ = -1;
  const uint32_t temper = launch.random.below(4);
  if (temper == 0) held_ = static_cast<int>(launch.random.below(count));
  if (temper == 1) favoured_ = static_cast<int>(launch.random.below(count));
}

void Block::fill_special(Warp& warp) {
  for (const Special& s : launch.program.specials) {
    auto* r = warp.lanes<uint32_t>(s.offset);
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t bit = 1u << l;
      const std::map<std::string, uint32_t> values = {
          {"%tid.x", warp.index * kLanes + l},
          {"%ntid.x", launch.threads},
          {"%ntid.y", 1},
          {"%ntid.z", 1},
          {"%ctaid.x", index[0]},
          {"%ctaid.y", index[1]},
          {"%ctaid.z", index[2]},
          {"%nctaid.x", launch.grid[0]},
          {"%nctaid.y", launch.grid[1]},
          {"%nctaid.z", launch.grid[2]},
          {"%laneid", l},
          {"%warpid", warp.index},
          {"%lanemask_eq", bit},
          {"%lanemask_lt", bit - 1},
          {"%lanemask_le", bit | (bit - 1)},
          {"%lanemask_gt", ~(bit | (bit - 1))},
          {"%lanemask_ge", ~(bit - 1)},
          {"%cluster_nctarank", 1},
          {"%dynamic_smem_size", launch.dynamic_shared}};
      const auto found = values.find(s.name);  // %tid.y, %tid.z, %cluster_ctarank: zero
      r[l] = found == values.end() ? 0 : found->second;
    }
  }
}

void Block::begin(uint32_t which) {
  number = static_cast<int>(which);
  index[0] = which % launch.grid[0], index[1] = which / launch.grid[0] % launch.grid[1];
  index[2] = which / launch.grid[0] / launch.grid[1];
  executed_ = 0;
  reset();
}

Block::Turn Block::turn() {
  ready_.clear();
  for (const auto& w : warps) {
    try {
      if (w->ready()) ready_.push_back(w.get());
    } catch (const Fault& fault) {
      fail(*w, fault);
    }
  }
  if (ready_.empty()) {
    if (land_one()) return Turn::kRan;
    if (!alive()) return Turn::kEnded;
    const bool stands = std::any_of(warps.begin(), warps.end(),
                                    [](const auto& w) { return w->waits_for_blocks(); });
    if (stands) return Turn::kStands;
    throw Fault("deadlock in" + waiting());
  }
  if (pace_ == Pace::kAnyTime && !loads_.empty() && launch.random.below(4) == 0) land_one();
  Warp& w = choose(ready_);
  try {
    executed_ -= launch.executed;
    w.run(1 << launch.random.below(12));
    executed_ += launch.executed;
    if (w.ended()) release_barriers();
    if (executed_ > kTooLong) throw Fault("the block does not come to an end");
  } catch (const Fault& fault) {
    fail(w, fault);
  }
  return Turn::kRan;
}

Warp& Block::choose(const std::vector<Warp*>& ready) {
  // Now and then the others all the same: who is held or favoured may wait for them in a loop.
  const bool fair = launch.random.below(16) == 0;
  for (Warp* w : ready) {
    if (w->index == favoured_ && !fair) return *w;
  }
  const auto count = static_cast<uint32_t>(ready.size());
  Warp* chosen = ready[launch.random.below(count)];
  while (count > 1 && !fair && chosen->index == held_) chosen = ready[launch.random.below(count)];
  return *chosen;
}

void Block::arrive(Warp& warp, int id, int expected, bool waits) {
  if (id < 0 || id > 15) throw Fault("there are barriers 0 to 15, this is " + std::to_string(id));
  if (expected % kLanes) throw Fault("a barrier of " + std::to_string(expected) + " threads");
  if (expected == kLanes * static_cast<int>(warps.size())) expected = 0;
  Barrier& b = barriers_[id];
  if (b.arrived && b.expected != expected) {
    throw Fault("a barrier that others reached with another count", b.instruction);
  }
  b.expected = expected, b.arrived += kLanes, b.instruction = warp.pc;
  b.joined.join(warp.position.published(kAll, kAll));
  // Its own lanes have met.
  warp.position.known.seen[warp.index] = warp.position.clock - 1;
  if (waits) warp.barrier = id, warp.yield();
  release_barriers();
}

int Block::alive() const {
  return kLanes * static_cast<int>(std::count_if(warps.begin(), warps.end(),
                                                 [](const auto& w) { return !w->ended(); }));
}

void Block::release_barriers() {
  for (int id = 0; id < 16; ++id) {
    Barrier& b = barriers_[id];
    if (!b.arrived || b.arrived < (b.expected ? b.expected : alive())) continue;
    for (const auto& w : warps) {
      if (w->barrier != id) continue;
      w->barrier = -1;
      w->position.known.join(b.joined);
    }
    b = Barrier();
  }
}

void Block::start(std::unique_ptr<BulkCopy> load) {
  loads_.push_back(std::move(load));
  if (pace_ == Pace::kAtOnce) land_one();
}

bool Block::land_one() {
  if (loads_.empty()) return false;
  const size_t n = launch.random.below(static_cast<uint32_t>(loads_.size()));
  const std::unique_ptr<BulkCopy> load = std::move(loads_[n]);
  loads_.erase(loads_.begin() + static_cast<long>(n));
  land(*load);
  return true;
}

void Block::land(BulkCopy& load) try {
  const uint32_t clock = mbarriers.tick(load.mbarrier);
  const int agent = mbarriers.agent(load.mbarrier);
  const Access by{load.warp->position, load.lane, load.instruction};
  for (const BulkCopy::Run& r : load.runs) {
    char* to = shared.at(r.shared);
    if (r.inside) {
      std::memcpy(to, launch.global.read(r.global, r.bytes, by), r.bytes);
    } else {
      std::memset(to, 0, r.bytes);
    }
    shared.end_write(r.shared, r.bytes, agent, kMany, clock, load.instruction);
  }
  mbarriers.complete(load.mbarrier, load.bytes, clock);
} catch (const Fault& fault) {
  throw Fault(std::string(fault.what()) + "\n  block " + std::to_string(number) + ", a copy of " +
              place(load.instruction));
}

std::string Block::waiting() const {
  const Program& program = launch.program;
  std::string text = " block " + std::to_string(number);
  for (const auto& w : warps) {
    if (w->ended()) continue;
    text += "\n  warp " + std::to_string(w->index);
    if (w->barrier >= 0) {
      const Barrier& b = barriers_[w->barrier];
      text += " waits at barrier " + std::to_string(w->barrier) + ", where " +
              std::to_string(b.arrived) + " of " +
              std::to_string(b.expected ? b.expected : alive()) + " threads are";
    }
    for (const Group& g : w->groups) {
      if (g.waits == Wait::kMbarrier) text += " waits for the " + mbarriers.describe(g.mbarrier);
      if (g.waits == Wait::kChange) text += " waits for other blocks";
    }
    const int at = std::max(w->groups[0].pc - (w->barrier >= 0 ? 1 : 0), 0);
    text += ", PTX line " + std::to_string(program.code[at].line);
  }
  return text;
}

std::string Block::place(int instruction) const {
  const Program& program = launch.program;
  const Instruction& i = program.code[instruction];
  return "PTX line " + std::to_string(i.line) + ": " + program.lines[i.line - 1] +
         (i.source < 0 ? "" : "  (" + program.sources[i.source] + ")");
}

void Block::fail(const Warp& warp, const Fault& fault) const {
  std::string text = fault.what();
  text += "\n  block " + std::to_string(number) + ", warp " + std::to_string(warp.index) + ", " +
          place(warp.pc);
  if (fault.before >= 0) text += "\n  before: " + place(fault.before);
  throw Fault(text);
}

}  // namespace attnfast::ptx
