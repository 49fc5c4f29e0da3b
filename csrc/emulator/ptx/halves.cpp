// Arithmetic on fp16 and bf16, one or two in a register.
#include <cmath>

#include "arithmetic.h"
#include "cells.h"

namespace attnfast::ptx {

namespace {

// To a float whose last bit tells that there is more, so that rounding once more is right.
float to_odd(double x) {
  const float f = emulator::toward_zero(x);
  if (std::isinf(f) || static_cast<double>(f) == x || f != f) return f;
  return float_of_bits(bits_of_float(f) | 1);
}

struct HalfKind : Detail {
  Operation operation = Operation::kAdd;
  bool bf16 = false, keeps_nan = false, relu = false, saturates = false, flushes = false;
};

float lesser(float a, float b) { return a < b || (a == b && std::signbit(a)) ? a : b; }

float combined(const HalfKind& k, float a, float b, float c) {
  switch (k.operation) {
    case Operation::kAdd:
      return to_odd(static_cast<double>(a) + b);
    case Operation::kSub:
      return to_odd(static_cast<double>(a) - b);
    case Operation::kMul:
      return a * b;
    case Operation::kFma:
      return to_odd(std::fma(static_cast<double>(a), b, c));
    case Operation::kNeg:
      return -a;
    case Operation::kAbs:
      return std::fabs(a);
    default:
      break;
  }
  if (a != a || b != b) return k.keeps_nan || (a != a && b != b) ? NAN : a != a ? b : a;
  return k.operation == Operation::kMin ? lesser(a, b) : -lesser(-a, -b);
}

void halves(Warp& w, const Instruction& i, Mask m) {
  const auto& k = static_cast<const HalfKind&>(*i.detail);
  const uint32_t* from[3] = {};
  const int sources = sources_of(k.operation);
  for (int n = 0; n < sources; ++n) from[n] = w.lanes<uint32_t>(i.operands[1 + n]);
  uint32_t out[kLanes] = {};
  each_lane(m, [&](int l) {
    for (int part = 0; part < i.count; ++part) {
      float x[3] = {};
      for (int n = 0; n < sources; ++n) {
        x[n] = from_half(static_cast<uint16_t>(from[n][l] >> 16 * part), k.bf16);
        if (k.flushes && std::fabs(x[n]) < 0x1p-14f) x[n] = std::copysign(0.0f, x[n]);
      }
      float y = combined(k, x[0], x[1], x[2]);
      if (k.relu) y = y > 0 || y != y ? y : 0;
      if (k.saturates) y = y > 0 ? std::fmin(y, 1.0f) : 0;
      if (k.flushes && std::fabs(y) < 0x1p-14f) y = std::copysign(0.0f, y);
      out[l] |= static_cast<uint32_t>(to_half(y, k.bf16)) << 16 * part;
    }
  });
  assign(w.lanes<uint32_t>(i.operands[0]), out, m);
}

}  // namespace

void decode_halves(Decoder& d, const Type& type, Operation operation) {
  const auto kind = std::make_shared<HalfKind>();
  kind->operation = operation, kind->bf16 = type.kind == Type::kBFloat;
  if (operation <= Operation::kFma) {
    d.pass({"rn"});
    kind->saturates = d.take("sat");
    kind->relu = operation == Operation::kFma && d.take("relu");
  }
  if (operation == Operation::kMin || operation == Operation::kMax) kind->keeps_nan = d.take("NaN");
  kind->flushes = !kind->bf16 && d.take("ftz");
  same_operands(d, type, sources_of(operation));
  d.i.count = type.pair ? 2 : 1;
  d.i.detail = kind;
  d.i.run = halves;
}

}  // namespace attnfast::ptx
