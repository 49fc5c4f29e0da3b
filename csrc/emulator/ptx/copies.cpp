// cp.async: copies of 4, 8 or 16 bytes that a thread waits for in groups.
#include <algorithm>

#include "cells.h"

namespace attnfast::ptx {

namespace {

// Slot 0: where to, 1: where from, 2: how many bytes of it, 3: a predicate to leave it out.
struct CopyOffsets : Detail {
  int64_t from = 0;
  bool to_wide = false, from_wide = true, negated = false;
};

void copy(Warp& w, const Instruction& i, Mask m) {
  const auto& offsets = static_cast<const CopyOffsets&>(*i.detail);
  each_lane(m, [&](int l) {
    ThreadCopy c{};
    c.lane = l, c.group = w.committed[l], c.size = c.valid = i.bytes, c.instruction = w.pc;
    c.to = Warp::shared_address(w.cell(i.operands[0], offsets.to_wide, l) +
                                static_cast<uint64_t>(i.offset));
    c.from = w.cell(i.operands[1], offsets.from_wide, l) + static_cast<uint64_t>(offsets.from);
    c.early = w.block.launch.random.below(2);
    if (i.operands[2] >= 0) {
      c.valid = static_cast<int>(w.lanes<uint32_t>(i.operands[2])[l]);
      if (c.valid > c.size) throw Fault("cp.async of more bytes than it copies");
    }
    if (i.operands[3] >= 0 && (w.lanes<uint32_t>(i.operands[3])[l] != 0) != offsets.negated) {
      c.valid = 0;
    }
    if (c.to % c.size || (c.valid && c.from % c.size)) {
      throw Fault("misaligned: cp.async of " + std::to_string(c.size) + " bytes from " +
                  std::to_string(c.from) + " to shared address " + std::to_string(c.to));
    }
    w.block.shared.begin_write(c.to, c.size, w.by(l));
    if (c.valid) {
      const char* data = w.block.launch.global.read(c.from, c.valid, w.by(l));
      if (c.early) std::memcpy(c.data, data, c.valid);
    }
    w.copies.push_back(c);
  });
}

void commit(Warp& w, const Instruction&, Mask m) {
  each_lane(m, [&](int l) { ++w.committed[l]; });
}

void land(Warp& w, const ThreadCopy& c) {
  char data[16] = {};
  if (c.valid && c.early) std::memcpy(data, c.data, c.valid);
  if (c.valid && !c.early) {
    std::memcpy(data,
                w.block.launch.global.read(c.from, c.valid, {w.position, c.lane, c.instruction}),
                c.valid);
  }
  std::memcpy(w.block.shared.at(c.to), data, c.size);
  w.block.shared.end_write(c.to, c.size, w.index, c.lane, w.position.clock, c.instruction);
}

// Variant: the groups that may stay under way; -1 for wait_all.
void wait(Warp& w, const Instruction& i, Mask m) {
  if (i.variant < 0) commit(w, i, m);
  const int64_t newest = std::max(i.variant, 0);
  const auto done = [&](const ThreadCopy& c) {
    const bool now = has(m, c.lane) && c.group < w.committed[c.lane] - newest;
    if (now) land(w, c);
    return now;
  };
  w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), done), w.copies.end());
}

void decode_copy(Decoder& d) {
  const bool level2 = d.need_one({"ca", "cg"}) == 1;
  if (!d.take("shared") && !d.take("shared::cta")) d.fail("copies to shared memory");
  d.need("global");
  bool hint = d.take("L2::cache_hint");
  d.take_prefix("L2::");
  d.need_count(3 + hint, 4 + hint);
  const size_t count = d.count() - hint;
  if (hint) d.read(d.text(count), 8);
  const auto offsets = std::make_shared<CopyOffsets>();
  offsets->from = d.second_address(1, 1, &offsets->from_wide);
  d.i.offset = d.second_address(0, 0, &offsets->to_wide);
  d.i.bytes = static_cast<int>(d.number(2));
  if (d.i.bytes != 4 && d.i.bytes != 8 && d.i.bytes != 16) d.fail("copies 4, 8 or 16 bytes");
  if (level2 && d.i.bytes != 16) d.fail("with .cg copies 16 bytes");
  d.i.operands[2] = d.i.operands[3] = -1;
  if (count > 3) {
    const Register r = d.read_any(d.text(3)[0] == '!' ? d.text(3).substr(1) : d.text(3), 4);
    offsets->negated = d.text(3)[0] == '!';
    d.i.operands[r.predicate ? 3 : 2] = r.offset;
  }
  d.i.detail = offsets;
  d.i.run = copy;
}

}  // namespace

void decode_thread_copy(Decoder& d) {
  if (d.take("commit_group")) {
    d.need_count(0);
    d.i.run = commit;
  } else if (d.take("wait_all")) {
    d.need_count(0);
    d.i.variant = -1;
    d.i.run = wait;
  } else if (d.take("wait_group")) {
    d.need_count(1);
    d.i.variant = static_cast<int>(d.number(0));
    d.i.run = wait;
  } else {
    decode_copy(d);
  }
}

}  // namespace attnfast::ptx
