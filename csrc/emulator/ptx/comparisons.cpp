// setp, set of a predicate, and selp, slct.
#include "cells.h"

namespace attnfast::ptx {

namespace {

constexpr const char* kNames[] = {"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                                  "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
enum Comparison {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kLo,
  kLs,
  kHi,
  kHs,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan
};

template <int kComparison>
struct Compare {
  template <class T>
  uint32_t operator()(T a, T b) const {
    const bool unordered = a != a || b != b;
    switch (kComparison) {
      case kEq:
        return a == b;
      case kNe:
        return a != b && !unordered;
      case kLt:
      case kLo:
        return a < b;
      case kLe:
      case kLs:
        return a <= b;
      case kGt:
      case kHi:
        return a > b;
      case kGe:
      case kHs:
        return a >= b;
      case kEqu:
        return a == b || unordered;
      case kNeu:
        return a != b;
      case kLtu:
        return a < b || unordered;
      case kLeu:
        return a <= b || unordered;
      case kGtu:
        return a > b || unordered;
      case kGeu:
        return a >= b || unordered;
      case kNum:
        return !unordered;
      default:
        return unordered;
    }
  }
};

// What is compared, into out; floats may be flushed first.
using Result = void (*)(Warp&, const Instruction&, uint32_t* out);
template <class T, class F, bool kFlushes>
void compared(Warp& w, const Instruction& i, uint32_t* out) {
  auto *a = w.lanes<Cell<T>>(i.operands[2]), *b = w.lanes<Cell<T>>(i.operands[3]);
  for (int l = 0; l < kLanes; ++l) {
    T x = static_cast<T>(a[l]), y = static_cast<T>(b[l]);
    if constexpr (kFlushes) x = flushed(x), y = flushed(y);
    out[l] = F{}(x, y);
  }
}
template <class F, bool kBf16, int kPart>
void compared_halves(Warp& w, const Instruction& i, uint32_t* out) {
  auto *a = w.lanes<uint32_t>(i.operands[2]), *b = w.lanes<uint32_t>(i.operands[3]);
  for (int l = 0; l < kLanes; ++l) {
    out[l] = F{}(from_half(static_cast<uint16_t>(a[l] >> 16 * kPart), kBf16),
                 from_half(static_cast<uint16_t>(b[l] >> 16 * kPart), kBf16));
  }
}

struct Combination : Detail {
  Result first = nullptr, second = nullptr;  // second: of the upper halves
  int with = -1;                             // 0 and, 1 or, 2 xor a predicate in slot 4
  bool negated = false;
};

// Slots 0 and 1: the result and its opposite, or the upper half's; 2 and 3: what is compared.
void set_predicates(Warp& w, const Instruction& i, Mask m) {
  const auto& c = static_cast<const Combination&>(*i.detail);
  uint32_t p[kLanes], q[kLanes];
  c.first(w, i, p);
  if (c.second) {
    c.second(w, i, q);
  } else {
    for (int l = 0; l < kLanes; ++l) q[l] = !p[l];
  }
  if (c.with >= 0) {
    const auto* r = w.lanes<uint32_t>(i.operands[4]);
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t x = (r[l] != 0) != c.negated;
      p[l] = c.with == 0 ? p[l] & x : c.with == 1 ? p[l] | x : p[l] ^ x;
      q[l] = c.with == 0 ? q[l] & x : c.with == 1 ? q[l] | x : q[l] ^ x;
    }
  }
  assign(w.lanes<uint32_t>(i.operands[0]), p, m);
  if (i.operands[1] >= 0) assign(w.lanes<uint32_t>(i.operands[1]), q, m);
}

template <class F>
Result result_of(Decoder& d, const Type& type, bool flushes, bool upper) {
  if (type.half()) {
    const bool bf16 = type.kind == Type::kBFloat;
    if (upper) return bf16 ? compared_halves<F, true, 1> : compared_halves<F, false, 1>;
    return bf16 ? compared_halves<F, true, 0> : compared_halves<F, false, 0>;
  }
  if (type.kind == Type::kFloat) {
    if (type.bits == 64) return compared<double, F, false>;
    return flushes ? compared<float, F, true> : compared<float, F, false>;
  }
  const bool sign = type.kind == Type::kSigned;
  if (!type.integer() || type.bits == 8) d.fail("is not known for this type");
  if (type.bits == 64) return sign ? compared<int64_t, F, false> : compared<uint64_t, F, false>;
  if (type.bits == 32) return sign ? compared<int32_t, F, false> : compared<uint32_t, F, false>;
  return sign ? compared<int16_t, F, false> : compared<uint16_t, F, false>;
}

template <size_t... N>
Result result_by(int comparison, Decoder& d, const Type& type, bool flushes, bool upper,
                 std::index_sequence<N...>) {
  Result found = nullptr;
  ((static_cast<int>(N) == comparison
        ? void(found = result_of<Compare<static_cast<int>(N)>>(d, type, flushes, upper))
        : void()),
   ...);
  return found;
}

void decode_setp(Decoder& d) {
  const Type type = d.take_type();
  int comparison = -1;
  for (int n = 0; n < 18 && comparison < 0; ++n) {
    if (d.take(kNames[n])) comparison = n;
  }
  if (comparison < 0) d.fail("needs a comparison");
  const bool flushes = d.take("ftz");
  const auto how = std::make_shared<Combination>();
  how->with = d.take_one({"and", "or", "xor"});
  const auto all = std::make_index_sequence<18>{};
  how->first = result_by(comparison, d, type, flushes, false, all);
  if (type.pair) how->second = result_by(comparison, d, type, flushes, true, all);
  d.need_count(how->with < 0 ? 3 : 4);
  d.into_pair(0, 1, 0, 4);
  d.from(2, 1, type.bytes()), d.from(3, 2, type.bytes());
  if (how->with >= 0) d.i.operands[4] = d.read_predicate(3, &how->negated);
  d.i.detail = how;
  d.i.run = set_predicates;
}

template <class T>
struct Select {
  T operator()(T a, T b, uint32_t p) const { return p ? a : b; }
};

void decode_selp(Decoder& d) {
  const Type type = d.take_type();
  const int bytes = type.bytes();
  d.need_count(4);
  d.into(0, 0, bytes), d.from(1, 1, bytes), d.from(2, 2, bytes), d.from(3, 3, 4);
  d.i.run = bytes == 8 ? apply<Select<uint64_t>, uint64_t, uint64_t, uint64_t, uint32_t>
                       : apply<Select<uint32_t>, uint32_t, uint32_t, uint32_t, uint32_t>;
}

}  // namespace

void add_comparisons(Decoders& known) {
  known["setp"] = decode_setp;
  known["selp"] = decode_selp;
}

}  // namespace attnfast::ptx
