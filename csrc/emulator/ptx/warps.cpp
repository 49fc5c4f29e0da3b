// What the lanes of a warp do together: shuffles, votes, reductions, elections.
#include <algorithm>

#include "cells.h"

namespace attnfast::ptx {

namespace {

// All lanes that a mask names have to be there.
void check_members(Warp& w, int operand, Mask m) {
  const auto* members = w.lanes<uint32_t>(operand);
  each_lane(m, [&](int l) {
    if (members[l] & ~m & w.live()) throw Fault("the mask names lanes that are not there");
    if (!has(members[l], l)) throw Fault("the mask leaves out a lane that executes it");
  });
}

enum Shuffle { kIndex, kButterfly, kUp, kDown };

void shuffle(Warp& w, const Instruction& i, Mask m) {
  check_members(w, i.operands[4], m);
  uint32_t out[kLanes] = {}, inside[kLanes] = {};
  auto *from = w.lanes<uint32_t>(i.operands[1]), *b = w.lanes<uint32_t>(i.operands[2]);
  auto* c = w.lanes<uint32_t>(i.operands[3]);
  each_lane(m, [&](int l) {
    const int by = b[l] & 31, segment = c[l] >> 8 & 31, clamp = c[l] & 31;
    const int highest = (l & segment) | (clamp & ~segment), lowest = l & segment;
    int j = lowest | (by & ~segment);
    if (i.variant == kButterfly) j = l ^ by;
    if (i.variant == kUp) j = l - by;
    if (i.variant == kDown) j = l + by;
    inside[l] = i.variant == kUp ? j >= highest : j <= highest;
    if (!inside[l]) j = l;
    if (!has(m, j)) throw Fault("shfl.sync reads a lane that takes no part");
    out[l] = from[j];
  });
  assign(w.lanes<uint32_t>(i.operands[0]), out, m);
  if (i.operands[5] >= 0) assign(w.lanes<uint32_t>(i.operands[5]), inside, m);
}

void decode_shuffle(Decoder& d) {
  d.need("sync"), d.need("b32");
  d.i.variant = d.need_one({"idx", "bfly", "up", "down"});
  d.need_count(5);
  d.into_pair(0, 5, 0, 4);
  for (int n = 1; n < 5; ++n) d.from(n, n, 4);
  d.i.meets = true;
  d.i.run = shuffle;
}

enum Vote { kAllVote, kAnyVote, kUniform, kBallot };

void vote(Warp& w, const Instruction& i, Mask m) {
  if (i.operands[2] >= 0) check_members(w, i.operands[2], m);
  const auto* p = w.lanes<uint32_t>(i.operands[1]);
  Mask set = 0;
  each_lane(m, [&](int l) { set |= Mask{(p[l] != 0) != i.extends_sign} << l; });
  uint32_t x = set;
  if (i.variant == kAllVote) x = set == m;
  if (i.variant == kAnyVote) x = set != 0;
  if (i.variant == kUniform) x = set == m || !set;
  each_lane(m, [&](int l) { w.lanes<uint32_t>(i.operands[0])[l] = x; });
}

void decode_vote(Decoder& d) {
  d.need("sync");
  d.i.variant = d.need_one({"all", "any", "uni", "ballot"});
  d.need(d.i.variant == kBallot ? "b32" : "pred");
  d.need_count(3);
  bool negated;
  d.into(0, 0, 4), d.i.operands[1] = d.read_predicate(1, &negated), d.from(2, 2, 4);
  d.i.extends_sign = negated;
  d.i.meets = true;
  d.i.run = vote;
}

void active(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) { w.lanes<uint32_t>(i.operands[0])[l] = m; });
}

void decode_active(Decoder& d) {
  d.need("b32");
  d.need_count(1);
  d.into(0, 0, 4);
  d.i.run = active;
}

enum Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };

uint32_t reduced(const Instruction& i, uint32_t x, uint32_t y) {
  const auto sx = static_cast<int32_t>(x), sy = static_cast<int32_t>(y);
  switch (i.variant) {
    case kAdd:
      return x + y;
    case kMin:
      return i.extends_sign ? static_cast<uint32_t>(std::min(sx, sy)) : std::min(x, y);
    case kMax:
      return i.extends_sign ? static_cast<uint32_t>(std::max(sx, sy)) : std::max(x, y);
    case kAnd:
      return x & y;
    case kOr:
      return x | y;
    default:
      return x ^ y;
  }
}

void reduce(Warp& w, const Instruction& i, Mask m) {
  check_members(w, i.operands[2], m);
  const auto* from = w.lanes<uint32_t>(i.operands[1]);
  const int first = __builtin_ctz(m);
  uint32_t x = from[first];
  each_lane(m & (m - 1), [&](int l) { x = reduced(i, x, from[l]); });
  each_lane(m, [&](int l) { w.lanes<uint32_t>(i.operands[0])[l] = x; });
}

void decode_reduce(Decoder& d) {
  const Type type = d.take_type();
  if (type.bits != 32 || !type.integer()) d.fail("is known of integers");
  d.need("sync");
  d.i.variant = d.need_one({"add", "min", "max", "and", "or", "xor"});
  d.i.extends_sign = type.kind == Type::kSigned;
  d.need_count(3);
  d.into(0, 0, 4), d.from(1, 1, 4), d.from(2, 2, 4);
  d.i.meets = true;
  d.i.run = reduce;
}

template <class T>
void match(Warp& w, const Instruction& i, Mask m) {
  check_members(w, i.operands[2], m);
  const auto* from = w.lanes<T>(i.operands[1]);
  uint32_t out[kLanes] = {}, all[kLanes] = {};
  each_lane(m, [&](int l) {
    each_lane(m, [&](int j) { out[l] |= Mask{from[j] == from[l]} << j; });
    all[l] = out[l] == m;
    if (i.variant == 1 && !all[l]) out[l] = 0;
  });
  assign(w.lanes<uint32_t>(i.operands[0]), out, m);
  if (i.operands[5] >= 0) assign(w.lanes<uint32_t>(i.operands[5]), all, m);
}

void decode_match(Decoder& d) {
  const Type type = d.take_type();
  d.i.variant = d.need_one({"any", "all"});
  d.need("sync");
  d.need_count(3);
  d.into_pair(0, 5, 0, 4), d.from(1, 1, type.bytes()), d.from(2, 2, 4);
  d.i.meets = true;
  d.i.run = type.bits == 64 ? match<uint64_t> : match<uint32_t>;
}

void elect(Warp& w, const Instruction& i, Mask m) {
  check_members(w, i.operands[2], m);
  // Any lane may be it, the same one every time; the machine's is one that the hardware's is not.
  int leader = kLanes - 1;
  while (!has(m, leader)) --leader;
  each_lane(m, [&](int l) {
    w.lanes<uint32_t>(i.operands[0])[l] = static_cast<uint32_t>(leader);
    w.lanes<uint32_t>(i.operands[1])[l] = l == leader;
  });
}

void decode_elect(Decoder& d) {
  d.need("sync");
  d.need_count(2);
  d.into_pair(0, 1, 0, 4), d.from(2, 1, 4);
  if (d.i.operands[1] < 0) d.fail("needs a predicate");
  d.i.meets = true;
  d.i.run = elect;
}

void trap(Warp&, const Instruction&, Mask) { throw Fault("trap"); }

void decode_trap(Decoder& d) {
  d.need_count(0);
  d.i.run = trap;
}

}  // namespace

void add_warp(Decoders& known) {
  known["shfl"] = decode_shuffle;
  known["vote"] = decode_vote;
  known["activemask"] = decode_active;
  known["redux"] = decode_reduce;
  known["match"] = decode_match;
  known["elect"] = decode_elect;
  known["trap"] = known["brkpt"] = decode_trap;
}

}  // namespace attnfast::ptx
