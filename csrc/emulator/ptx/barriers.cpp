// Barriers of blocks and warps, mbarriers, setmaxnreg.
#include "cells.h"

namespace attnfast::ptx {

namespace {

// ---- bar.sync, bar.arrive, bar.warp.sync

uint32_t uniform(Warp& w, int operand, Mask m) {
  const auto* x = w.lanes<uint32_t>(operand);
  const uint32_t first = x[__builtin_ctz(m)];
  each_lane(m, [&](int l) {
    if (x[l] != first) throw Fault("an operand differs between the lanes");
  });
  return first;
}

void barrier(Warp& w, const Instruction& i, Mask m) {
  if (m != w.live()) throw Fault("a barrier without all lanes of the warp");
  const uint32_t id = uniform(w, i.operands[0], m);
  const uint32_t expected = i.operands[1] < 0 ? 0 : uniform(w, i.operands[1], m);
  w.block.arrive(w, static_cast<int>(id), static_cast<int>(expected), i.variant == 0);
}

void warp_barrier(Warp& w, const Instruction& i, Mask m) {
  const auto* members = w.lanes<uint32_t>(i.operands[0]);
  each_lane(m, [&](int l) {
    if (members[l] & ~m & w.live()) throw Fault("bar.warp.sync names lanes that are not there");
  });
  w.position.sync_lanes();
}

void decode_barrier(Decoder& d) {
  d.i.meets = true;
  d.pass({"cta"});
  if (d.take("warp")) {
    d.need("sync");
    d.need_count(1);
    d.from(0, 0, 4);
    d.i.run = warp_barrier;
    return;
  }
  d.i.variant = d.need_one({"sync", "arrive"});
  d.pass({"aligned"});
  d.need_count(d.i.variant ? 2 : 1, 2);
  d.from(0, 0, 4);
  d.i.operands[1] = -1;
  if (d.count() > 1) d.from(1, 1, 4);
  d.i.run = barrier;
}

// ---- mbarrier: slot 0 the address, 1 the result, 2 and 3 operands

uint32_t mbarrier_address(Warp& w, const Instruction& i, int l) {
  const uint64_t address =
      w.cell(i.operands[0], i.wide_address, l) + static_cast<uint64_t>(i.offset);
  return Warp::shared_address(address);
}

void init(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    const uint32_t address = mbarrier_address(w, i, l);
    w.block.mbarriers.init(address, w.lanes<uint32_t>(i.operands[2])[l], w.by(l));
    w.block.shared.claim(address, w.by(l));
  });
}

void invalidate(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    const uint32_t address = mbarrier_address(w, i, l);
    w.block.mbarriers.check(address, w.by(l));
    w.block.mbarriers.invalidate(address);
    w.block.shared.release(address);
  });
}

enum Arrival { kExpects = 1, kDrops = 2, kOnlyExpects = 4 };

void arrive(Warp& w, const Instruction& i, Mask m) {
  Mbarriers& mbarriers = w.block.mbarriers;
  // A clock for each lane would be more exact; those that arrive together publish together.
  const Clocks clocks = w.position.published(m, w.live());
  each_lane(m, [&](int l) {
    const uint32_t address = mbarrier_address(w, i, l);
    const uint32_t n = i.operands[2] < 0 ? 1 : w.lanes<uint32_t>(i.operands[2])[l];
    if (i.variant & kExpects) mbarriers.expect(address, n, w.by(l));
    if (i.variant & kOnlyExpects) return;
    const uint32_t arrivals = i.variant & kExpects ? 1 : n;
    const uint64_t phase = mbarriers.arrive(address, arrivals, clocks, w.by(l), i.variant & kDrops);
    if (i.operands[1] >= 0) w.lanes<uint64_t>(i.operands[1])[l] = phase;
  });
}

// A wait for a phase, of which slot 2 has the parity, or the state from before (variant 1).
void wait(Warp& w, const Instruction& i, Mask m) {
  Mbarriers& mbarriers = w.block.mbarriers;
  Mask over = 0;
  uint32_t lacking = 0;
  uint64_t lacking_phase = 0;
  each_lane(m, [&](int l) {
    const uint32_t address = mbarrier_address(w, i, l);
    mbarriers.check(address, w.by(l));
    uint64_t phase = w.cell(i.operands[2], i.wide_registers, l);
    if (i.variant == 0) phase = mbarriers.latest(address, phase & 1);
    if (mbarriers.over(address, phase)) {
      over |= 1u << l;
      mbarriers.acquire(address, w.position);
    } else {
      lacking = address, lacking_phase = phase;
    }
  });
  // It may take its time and say no, or wait.
  const bool patient = i.extends_sign && w.block.launch.random.below(8);
  if (over != m && patient) return w.wait_for(lacking, lacking_phase);
  if (over != m) w.yield();
  each_lane(m, [&](int l) { w.lanes<uint32_t>(i.operands[1])[l] = has(over, l); });
}

void take_mbarrier_words(Decoder& d) {
  d.pass({"release", "acquire", "relaxed"});
  d.pass_scope();
  d.pass({"shared", "shared::cta", "shared::cluster"});
  d.need("b64");
}

void decode_arrival(Decoder& d, int variant) {
  if (d.take("expect_tx")) variant |= kExpects;
  take_mbarrier_words(d);
  const bool result = !(variant & kOnlyExpects);
  d.need_count(1, 3);
  const bool has_state = result && d.text(0)[0] != '[';
  d.address(0, has_state);
  d.i.operands[1] = d.i.operands[2] = -1;
  if (has_state) d.into(1, 0, 8);
  if (d.count() > 1u + has_state) d.from(2, 1 + has_state, 4);
  if (d.i.operands[2] < 0 && variant & kExpects) d.fail("needs the bytes");
  d.i.variant = variant;
  d.i.run = arrive;
}

void decode_wait(Decoder& d, bool may_wait) {
  d.i.extends_sign = may_wait;
  d.i.variant = d.take("parity") ? 0 : 1;
  take_mbarrier_words(d);
  d.need_count(3, may_wait ? 4 : 3);  // the fourth is a time
  d.into(1, 0, 4), d.address(0, 1);
  d.i.wide_registers = d.i.variant == 1;
  d.from(2, 2, d.i.variant ? 8 : 4);
  if (d.count() > 3) d.read(d.text(3), 4);
  d.i.run = wait;
}

void decode_mbarrier(Decoder& d) {
  const int what =
      d.need_one({"init", "inval", "arrive", "arrive_drop", "expect_tx", "test_wait", "try_wait"});
  switch (what) {
    case 2:
      return decode_arrival(d, 0);
    case 3:
      return decode_arrival(d, kDrops);
    case 4:
      return decode_arrival(d, kExpects | kOnlyExpects);
    case 5:
    case 6:
      return decode_wait(d, what == 6);
    default:
      break;
  }
  take_mbarrier_words(d);
  d.need_count(what ? 1 : 2);
  d.address(0, 0);
  if (!what) d.from(2, 1, 4);
  d.i.run = what ? invalidate : init;
}

// ---- Registers of a warpgroup

void set_registers(Warp& w, const Instruction&, Mask m) {
  if (m != w.live()) throw Fault("setmaxnreg without all lanes of the warp");
}

void decode_set_registers(Decoder& d) {
  d.need_one({"inc", "dec"});
  d.need("sync"), d.need("aligned"), d.need("u32");
  d.need_count(1);
  const int64_t n = d.number(0);
  if (n < 24 || n > 256 || n % 8) d.fail("needs a multiple of 8 from 24 to 256");
  d.i.meets = true;
  d.i.run = set_registers;
}

}  // namespace

void add_barriers(Decoders& known) {
  known["bar"] = known["barrier"] = decode_barrier;
  known["mbarrier"] = decode_mbarrier;
  known["setmaxnreg"] = decode_set_registers;
}

}  // namespace attnfast::ptx
