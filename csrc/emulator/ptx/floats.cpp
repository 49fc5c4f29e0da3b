// Arithmetic on fp32 and fp64.
#include <cfenv>
#include <cmath>

#include "arithmetic.h"
#include "cells.h"
#include "fast.h"

namespace attnfast::ptx {

namespace {

template <class T>
T canonical(T x) {  // the one NaN that arithmetic gives
  if constexpr (sizeof(T) == 4) return x == x ? x : float_of_bits(0x7FFFFFFF);
  return x;
}

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Multiply {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct Fused {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
// Minus zero is less than zero; a NaN is left aside, or not.
template <bool kLess, bool kNan>
struct Extreme {
  template <class T>
  T operator()(T a, T b) const {
    const bool first =
        kLess ? a < b || (a == b && std::signbit(a)) : a > b || (a == b && !std::signbit(a));
    const T chosen = first ? a : b;
    if (kNan) return a != a ? a : b != b ? b : chosen;
    return a != a ? b : b != b ? a : chosen;
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return -a;
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};
struct CopySign {
  template <class T>
  T operator()(T a, T b) const {
    return std::copysign(b, a);
  }
};

// An operation whose operands and result may be flushed to zero or kept within 0 and 1.
template <class F, bool kFlushes, bool kSaturates>
struct Around {
  template <class... T>
  float operator()(T... x) const {
    float y = canonical(F{}((kFlushes ? flushed(x) : x)...));
    if (kFlushes) y = flushed(y);
    if (kSaturates) y = y > 0 ? std::fmin(y, 1.0f) : 0.0f;
    return y;
  }
};

template <class F, class... A>
Execute float_execute(Decoder& d, const Type& type) {
  const bool flushes = d.take("ftz"), saturates = d.take("sat");
  if (type.bits == 64) {
    if (flushes || saturates) d.fail("fp64 is neither flushed nor saturated");
    return apply<F, double, std::conditional_t<true, double, A>...>;
  }
  if (flushes && saturates) return apply<Around<F, true, true>, float, A...>;
  if (flushes) return apply<Around<F, true, false>, float, A...>;
  if (saturates) return apply<Around<F, false, true>, float, A...>;
  return apply<Around<F, false, false>, float, A...>;
}

// fma in fp32, to nearest.
template <bool kFlushes>
void fused(Warp& w, const Instruction& i, Mask m) {
  float in[3][kLanes], out[kLanes];
  const float* from[3];
  for (int n = 0; n < 3; ++n) {
    from[n] = w.lanes<float>(i.operands[1 + n]);
    if (!kFlushes) continue;
    for (int l = 0; l < kLanes; ++l) in[n][l] = flushed(from[n][l]);
    from[n] = in[n];
  }
  fused_multiply_add(out, from[0], from[1], from[2]);
  for (float& x : out) x = canonical(kFlushes ? flushed(x) : x);
  assign(w.lanes<float>(i.operands[0]), out, m);
}

// a b + c, a + c or a b by another rounding: variant is fegetround's.
template <class T>
void directed(Warp& w, const Instruction& i, Mask m) {
  const int before = std::fegetround();
  std::fesetround(i.variant);
  each_lane(m, [&](int l) {
    volatile T a = w.lanes<T>(i.operands[1])[l], b = w.lanes<T>(i.operands[2])[l];
    volatile T c = w.lanes<T>(i.operands[3])[l], out = 0;
    if (i.count == 3) {
      out = std::fma(a, b, c);
    } else if (i.extends_sign) {  // a sum
      out = a + c;
    } else {
      out = a * b;
    }
    if (i.wide_address) out = static_cast<T>(flushed(static_cast<float>(out)));
    w.lanes<T>(i.operands[0])[l] = canonical<T>(out);
  });
  std::fesetround(before);
}

bool decode_directed(Decoder& d, const Type& type, Operation operation) {
  const int mode = d.take_one({"rz", "rm", "rp"});
  if (mode < 0) return false;
  if (operation == Operation::kSub) d.fail("is known to nearest only");
  const int modes[] = {FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  d.i.variant = modes[mode];
  d.i.wide_address = d.take("ftz");
  const int sources = sources_of(operation);
  same_operands(d, type, sources);
  d.i.count = sources, d.i.extends_sign = operation == Operation::kAdd;
  if (sources == 2) d.i.operands[3] = d.i.operands[2];
  d.i.run = type.bits == 64 ? directed<double> : directed<float>;
  return true;
}

void decode_fused(Decoder& d, const Type& type) {
  same_operands(d, type, 3);
  if (type.bits == 32) {
    const bool flushes = d.take("ftz");
    if (d.take("sat")) {
      d.i.run = flushes ? ternary<Around<Fused, true, true>, float>
                        : ternary<Around<Fused, false, true>, float>;
    } else {
      d.i.run = flushes ? fused<true> : fused<false>;
    }
    return;
  }
  d.i.run = ternary<Fused, double>;
}

template <bool kLess>
Execute extreme(Decoder& d, const Type& type) {
  return d.take("NaN") ? float_execute<Extreme<kLess, true>, float, float>(d, type)
                       : float_execute<Extreme<kLess, false>, float, float>(d, type);
}

void decode_copysign(Decoder& d) {
  const Type type = d.take_type();
  same_operands(d, type, 2);
  d.i.run = type.bits == 64 ? binary<CopySign, double> : binary<CopySign, float>;
}

}  // namespace

void decode_floats(Decoder& d, const Type& type, Operation operation) {
  if (type.bits != 32 && type.bits != 64) d.fail("is not known for this type");
  if (operation <= Operation::kFma && decode_directed(d, type, operation)) return;
  if (operation <= Operation::kFma) d.pass({"rn"});
  if (operation == Operation::kFma) return decode_fused(d, type);
  same_operands(d, type, sources_of(operation));
  switch (operation) {
    case Operation::kAdd:
      d.i.run = float_execute<Add, float, float>(d, type);
      break;
    case Operation::kSub:
      d.i.run = float_execute<Subtract, float, float>(d, type);
      break;
    case Operation::kMul:
      d.i.run = float_execute<Multiply, float, float>(d, type);
      break;
    case Operation::kMin:
      d.i.run = extreme<true>(d, type);
      break;
    case Operation::kMax:
      d.i.run = extreme<false>(d, type);
      break;
    case Operation::kNeg:
      d.i.run = float_execute<Negate, float>(d, type);
      break;
    default:
      d.i.run = float_execute<Absolute, float>(d, type);
      break;
  }
}

void add_floats(Decoders& known) { known["copysign"] = decode_copysign; }

}  // namespace attnfast::ptx
