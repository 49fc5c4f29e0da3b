// Vector clocks of the warps of a block: what each knows to lie behind it.
//
// An access happens before another if barriers lead from one to the other (FastTrack, Flanagan and
// Freund 2009). Every warp counts its own synchronisations; so does every mbarrier that
// asynchronous copies report to. Beside a whole warp's accesses a clock may hold those of some
// lanes, which is what one lane's arrival publishes.
//
// Of the lanes of one warp only bar.warp.sync, or a barrier of the block, orders the accesses: a
// shuffle, a vote or an mma waits for all lanes, but is no fence, and lanes that happen to run
// together may part. What ldmatrix and wgmma read, however, they read for every lane at once, so it
// lies before whatever any of them does next. What other lanes have written they see only after a
// barrier.
//
// What lies behind in other blocks is what fences, or the order of strong accesses, have led here:
// see handover.cpp. It comes in clocks of the same kind, one for each block.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "program.h"

namespace attnfast::ptx {

constexpr int kSlots = 32;  // of mbarriers, which share them if there are more
constexpr int kAgents = kMaxWarps + kSlots;
constexpr int kMany = -1;      // in place of a lane: several of them
constexpr int kTogether = -2;  // all of them, by one instruction that reads

struct Clocks;
using Others = std::map<int, Clocks>;  // by block

struct Clocks {
  uint32_t seen[kAgents] = {};
  uint32_t lanes_clock[kMaxWarps] = {};  // up to here, of `lanes` only
  Mask lanes[kMaxWarps] = {};
  // Writes up to here have been shown to the asynchronous proxy, by a fence.
  uint32_t fenced[kMaxWarps] = {};
  std::shared_ptr<const Others> others;  // null: nothing has come from other blocks

  void join(const Clocks& other) {
    for (int a = 0; a < kAgents; ++a) seen[a] = std::max(seen[a], other.seen[a]);
    for (int w = 0; w < kMaxWarps; ++w) {
      fenced[w] = std::max(fenced[w], other.fenced[w]);
      lanes_clock[w] = std::max(lanes_clock[w], other.lanes_clock[w]);
      lanes[w] |= other.lanes[w];
    }
    join_others(other.others);
  }
  void join_others(const std::shared_ptr<const Others>& more);

  // Whether an access of an agent at that time lies behind.
  bool behind(int agent, int lane, uint32_t clock) const {
    if (clock <= seen[agent]) return true;
    if (agent >= kMaxWarps || clock > lanes_clock[agent]) return false;
    if (lane == kTogether) return lanes[agent] != 0;
    return lane == kMany ? lanes[agent] == kAll : lanes[agent] >> lane & 1;
  }
};

inline void Clocks::join_others(const std::shared_ptr<const Others>& more) {
  if (!more || others == more) return;
  if (!others) {
    others = more;
    return;
  }
  auto both = std::make_shared<Others>(*others);
  for (const auto& [block, clocks] : *more) (*both)[block].join(clocks);
  others = both;
}

// What a warp's accesses are told apart by.
struct Position {
  int block = 0, warp = 0;
  uint32_t clock = 1;  // of its accesses from now on
  Clocks known;        // known.seen[warp]: up to where its own lanes are ordered
  // What these lanes' strong writes hand to other blocks, since a fence; what their strong reads
  // have been handed, for the next fence.
  Clocks fenced_off;
  Mask fenced_lanes = 0;
  std::vector<std::shared_ptr<const Others>> pending;

  // Whether an access of a warp of any block lies behind.
  bool behind(int other_block, int agent, int lane, uint32_t at) const {
    if (other_block == block) return known.behind(agent, lane, at);
    if (!known.others) return false;
    const auto found = known.others->find(other_block);
    return found != known.others->end() && found->second.behind(agent, lane, at);
  }

  // All lanes have met.
  void sync_lanes() { known.seen[warp] = clock++; }
  // What others learn from an arrival of these lanes.
  Clocks published(Mask lanes, Mask live) {
    Clocks c = known;
    if (lanes == live) {
      c.seen[warp] = clock;
    } else {
      c.lanes_clock[warp] = clock, c.lanes[warp] = lanes;
    }
    ++clock;
    return c;
  }
  // What lies behind is shown to the asynchronous proxy, other warps' writes too.
  void fence_async() {
    for (int w = 0; w < kMaxWarps; ++w) {
      known.fenced[w] = std::max({known.fenced[w], known.seen[w], known.lanes_clock[w]});
    }
    known.fenced[warp] = clock++;
  }
};

// Who accesses: a lane of a warp, kMany or kTogether; at which instruction.
struct Access {
  const Position& who;
  int lane;
  int instruction;
};

}  // namespace attnfast::ptx
