// What blocks hand to each other through global memory.
//
// A strong write hands on what lies behind its lane: with .release as of now, else as of its last
// fence. A strong read takes it: with .acquire at once, else with its next fence. So does an atomic
// operation, which hands on what was there before too.
#include "machine.h"

namespace attnfast::ptx {

bool Warp::waits_in_vain(Mask lanes) {
  const Poll now{pc, lanes, block.launch.global.changes};
  if (now.pc != poll_.pc || now.lanes != poll_.lanes || now.changes != poll_.changes) {
    poll_ = now;
    return false;
  }
  for (Group& g : groups) {
    if (g.pc == pc) g.waits = Wait::kChange, g.phase = now.changes;
  }
  stops_ = again_ = true;
  return true;
}

void Warp::take(uint64_t address, bool acquires) {
  const std::shared_ptr<const Others>& handed = block.launch.global.handed(address);
  if (!handed) return;
  if (acquires) {
    position.known.join_others(handed);
  } else {
    position.pending.push_back(handed);
  }
}

void Warp::pass(uint64_t address, Mask lane, bool releases, bool adds) {
  std::shared_ptr<const Others>& handed = block.launch.global.handed(address);
  if (!adds) handed.reset();
  if (!releases && !(position.fenced_lanes & lane)) return;
  Clocks mine = releases ? position.published(lane, live()) : position.fenced_off;
  const auto all = std::make_shared<Others>();
  if (mine.others) *all = *mine.others;
  mine.others.reset();
  (*all)[block.number].join(mine);
  Clocks both;
  both.others = all;
  both.join_others(handed);
  handed = both.others;
}

void Warp::fence(Mask lanes) {
  for (const auto& handed : position.pending) position.known.join_others(handed);
  position.pending.clear();
  position.fenced_off = position.published(lanes, live());
  position.fenced_lanes = lanes;
}

}  // namespace attnfast::ptx
