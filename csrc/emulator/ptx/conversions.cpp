// cvt: between integers and floats of any size, alone or packed in pairs.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>

#include "cells.h"

namespace attnfast::ptx {

namespace {

enum class Rounding { kNone, kNearest, kZero, kDown, kUp, kAway };

struct Conversion : Detail {
  Type to, from;
  bool to_wide = false, from_wide = false;
  bool saturates = false, flushes = false, relu = false, finite = false;
  bool to_integral = false;  // .rni and so on
  Rounding rounding = Rounding::kNone;
};

double integral(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::kZero:
      return std::trunc(x);
    case Rounding::kDown:
      return std::floor(x);
    case Rounding::kUp:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

uint16_t half_of(float x, bool bf16, Rounding rounding, bool finite) {
  uint16_t h = to_half(x, bf16);
  if (x != x) return h;
  if (rounding == Rounding::kZero && std::fabs(from_half(h, bf16)) > std::fabs(x)) --h;
  const uint16_t infinity = bf16 ? 0x7F80 : 0x7C00;
  if (finite && (h & 0x7FFF) == infinity) --h;
  return h;
}

uint32_t tf32_of(float x, Rounding rounding, bool finite) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7FFFFFFF;
  if ((bits & 0x7FFFFFFF) == 0x7F800000) return finite ? (bits & 0x80000000) | 0x7F7FE000 : bits;
  uint32_t more = 0;
  if (rounding == Rounding::kAway) more = 0x1000;
  if (rounding == Rounding::kNearest) more = 0xFFF + (bits >> 13 & 1);
  return (bits + more) & ~0x1FFFu;
}

uint64_t bits_of_double(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

double double_of(const Type& type, uint64_t bits) {
  if (type.half()) return from_half(static_cast<uint16_t>(bits), type.kind == Type::kBFloat);
  if (type.bits == 32) return float_of_bits(static_cast<uint32_t>(bits));
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

// The value of an integer's bits, extended to 64.
uint64_t extended(const Type& type, uint64_t bits) {
  const int unused = 64 - type.bits;
  if (type.kind == Type::kSigned) {
    return static_cast<uint64_t>(static_cast<int64_t>(bits << unused) >> unused);
  }
  return bits << unused >> unused;
}

uint64_t integer_of(double x, const Type& to, Rounding rounding) {
  const double y = integral(x, rounding);
  if (y != y) return 0;
  if (to.kind == Type::kSigned) {
    const double top = std::ldexp(1.0, to.bits - 1);
    const auto most = static_cast<int64_t>((uint64_t{1} << (to.bits - 1)) - 1);
    return static_cast<uint64_t>(y >= top ? most : y < -top ? -most - 1 : static_cast<int64_t>(y));
  }
  if (y <= 0) return 0;
  const uint64_t most = ~uint64_t{0} >> (64 - to.bits);
  return y >= std::ldexp(1.0, to.bits) ? most : static_cast<uint64_t>(y);
}

uint64_t clamped(uint64_t value, bool was_signed, const Type& to) {
  const bool negative = was_signed && static_cast<int64_t>(value) < 0;
  if (to.kind != Type::kSigned) {
    return negative ? 0 : std::min(value, ~uint64_t{0} >> (64 - to.bits));
  }
  const auto most = static_cast<int64_t>((uint64_t{1} << (to.bits - 1)) - 1);
  if (negative) return static_cast<uint64_t>(std::max(static_cast<int64_t>(value), -most - 1));
  return std::min(value, static_cast<uint64_t>(most));
}

// As a float of the result's type.
uint64_t float_bits(const Conversion& c, bool from_integer, double x, uint64_t n) {
  if (c.to.bits == 64) {
    if (!from_integer) return bits_of_double(x);
    volatile double y = c.from.kind == Type::kSigned ? static_cast<double>(static_cast<int64_t>(n))
                                                     : static_cast<double>(n);
    return bits_of_double(y);
  }
  volatile float f = 0;
  if (!from_integer) {
    volatile double whole = x;
    f = static_cast<float>(whole);
    // On the way to a half, what is lost shows in the last bit.
    if (c.to.half() && static_cast<double>(f) != x && x == x && !std::isinf(f)) {
      f = float_of_bits(bits_of_float(emulator::toward_zero(x)) | 1);
    }
  } else if (c.from.kind == Type::kSigned) {
    f = static_cast<float>(static_cast<int64_t>(n));
  } else {
    f = static_cast<float>(n);
  }
  float y = f;
  if (c.saturates) y = y > 0 ? std::fmin(y, 1.0f) : 0.0f;
  if (c.relu && y < 0) y = 0;
  if (c.flushes) y = flushed(y);
  if (c.to.kind == Type::kTf32) return tf32_of(y, c.rounding, c.finite);
  if (c.to.half()) return half_of(y, c.to.kind == Type::kBFloat, c.rounding, c.finite);
  return bits_of_float(y == y ? y : float_of_bits(0x7FFFFFFF));
}

uint64_t converted(const Conversion& c, uint64_t bits) {
  const bool from_integer = c.from.integer();
  double x = 0;
  uint64_t n = 0;
  if (from_integer) {
    n = extended(c.from, bits);
  } else {
    x = double_of(c.from, bits);
    if (c.flushes && std::fabs(x) < 0x1p-126) x = std::copysign(0.0, x);
  }
  if (c.to.integer()) {
    if (!from_integer) return extended(c.to, integer_of(x, c.to, c.rounding));
    return extended(c.to, c.saturates ? clamped(n, c.from.kind == Type::kSigned, c.to) : n);
  }
  if (!from_integer && c.to_integral) x = integral(x, c.rounding);
  return float_bits(c, from_integer, x, n);
}

int host_rounding(const Conversion& c) {
  const bool narrow = c.to.half() || c.to.kind == Type::kTf32 || c.to_integral;
  if (c.to.integer() || narrow) return FE_TONEAREST;
  if (c.rounding == Rounding::kZero) return FE_TOWARDZERO;
  if (c.rounding == Rounding::kDown) return FE_DOWNWARD;
  return c.rounding == Rounding::kUp ? FE_UPWARD : FE_TONEAREST;
}

void convert(Warp& w, const Instruction& i, Mask m) {
  const auto& c = static_cast<const Conversion&>(*i.detail);
  if (i.variant != FE_TONEAREST) std::fesetround(i.variant);
  each_lane(m, [&](int l) {
    const uint64_t out = converted(c, w.cell(i.operands[1], c.from_wide, l));
    if (c.to_wide) {
      w.lanes<uint64_t>(i.operands[0])[l] = out;
    } else {
      w.lanes<uint32_t>(i.operands[0])[l] =
          static_cast<uint32_t>(c.to.bits == 16 ? out & 0xFFFF : out);
    }
  });
  if (i.variant != FE_TONEAREST) std::fesetround(FE_TONEAREST);
}

// cvt.rn.bf16x2.f32 d, high, low.
void pack_pair(Warp& w, const Instruction& i, Mask m) {
  const auto& c = static_cast<const Conversion&>(*i.detail);
  auto *high = w.lanes<float>(i.operands[1]), *low = w.lanes<float>(i.operands[2]);
  uint32_t out[kLanes];
  const auto one = [&](float x) -> uint32_t {
    if (c.relu && x < 0) x = 0;
    return half_of(x, c.to.kind == Type::kBFloat, c.rounding, c.finite);
  };
  for (int l = 0; l < kLanes; ++l) out[l] = one(high[l]) << 16 | one(low[l]);
  assign(w.lanes<uint32_t>(i.operands[0]), out, m);
}

// The common ones.
struct Cast {
  template <class T>
  T operator()(T x) const {
    return x;
  }
};
struct FromBf16 {
  float operator()(uint16_t x) const { return emulator::widen<false>(x); }
};

template <class A>
Execute cast_to(const Type& to) {
  const bool sign = to.kind == Type::kSigned;
  if (to.bits == 64) return sign ? apply<Cast, int64_t, A> : apply<Cast, uint64_t, A>;
  if (to.bits == 32) return apply<Cast, uint32_t, A>;
  return to.bits == 16 ? apply<Cast, uint16_t, A> : nullptr;
}

Execute quick(const Conversion& c) {
  if (c.from.kind == Type::kBFloat && c.to.kind == Type::kFloat && c.to.bits == 32 &&
      !c.saturates && !c.relu) {
    return apply<FromBf16, float, uint16_t>;
  }
  if (!c.from.integer() || c.saturates || c.from_wide != (c.from.bits == 64)) return nullptr;
  if (c.to_wide != (c.to.bits == 64)) return nullptr;
  const bool sign = c.from.kind == Type::kSigned;
  if (c.to.kind == Type::kFloat && c.to.bits == 32 && c.rounding == Rounding::kNearest &&
      c.from.bits == 32) {
    return sign ? apply<Cast, float, int32_t> : apply<Cast, float, uint32_t>;
  }
  if (!c.to.integer()) return nullptr;
  if (c.from.bits == 64) return sign ? cast_to<int64_t>(c.to) : cast_to<uint64_t>(c.to);
  if (c.from.bits == 32) return sign ? cast_to<int32_t>(c.to) : cast_to<uint32_t>(c.to);
  if (c.from.bits == 16) return sign ? cast_to<int16_t>(c.to) : cast_to<uint16_t>(c.to);
  return nullptr;
}

void take_rounding(Decoder& d, Conversion& c) {
  const Rounding modes[] = {Rounding::kNearest, Rounding::kZero, Rounding::kDown, Rounding::kUp};
  const int to_float = d.take_one({"rn", "rz", "rm", "rp"});
  const int to_integer = d.take_one({"rni", "rzi", "rmi", "rpi"});
  if (to_float >= 0) c.rounding = modes[to_float];
  if (to_integer >= 0) c.rounding = modes[to_integer], c.to_integral = true;
  if (d.take("rna")) c.rounding = Rounding::kAway;
  const bool narrow = c.to.half() || c.to.kind == Type::kTf32;
  if (narrow && (c.rounding == Rounding::kDown || c.rounding == Rounding::kUp)) {
    d.fail("this rounding is not known");
  }
  const bool float_to_integer = !c.from.integer() && c.to.integer();
  if (float_to_integer && to_integer < 0) d.fail("needs a rounding to an integer");
}

void decode_cvt(Decoder& d) {
  const auto c = std::make_shared<Conversion>();
  c->from = d.take_type(), c->to = d.take_type();
  if (c->from.pair || c->from.kind == Type::kPredicate || c->to.kind == Type::kPredicate) {
    d.fail("is not known");
  }
  take_rounding(d, *c);
  c->flushes = d.take("ftz"), c->saturates = d.take("sat");
  c->relu = d.take("relu"), c->finite = d.take("satfinite");
  d.i.detail = c;
  if (c->to.pair) {
    if (c->from.kind != Type::kFloat || c->from.bits != 32) d.fail("is not known");
    same_operands(d, {Type::kBits, 32, false}, 2);
    d.i.run = pack_pair;
    return;
  }
  d.need_count(2);
  const Register to = d.written_any(d.text(0), c->to.bytes());
  const Register from = d.read_any(d.text(1), c->from.bytes());
  c->to_wide = to.bytes == 8, c->from_wide = from.bytes == 8;
  d.i.operands[0] = to.offset, d.i.operands[1] = from.offset;
  d.i.variant = host_rounding(*c);
  const Execute found = quick(*c);
  d.i.run = found ? found : convert;
}

}  // namespace

void add_conversions(Decoders& known) { known["cvt"] = decode_cvt; }

}  // namespace attnfast::ptx
