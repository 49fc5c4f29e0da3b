// Functions that the hardware approximates: off by up to what the PTX ISA documents.
//
// How far off is a function of the operand's bits, so that lanes and warps that compute one value
// agree on every schedule, and of the seed's bits from the ninth on. A result that is exact is given
// exactly, as hardware's tables do.
#include <cmath>

#include "arithmetic.h"
#include "cells.h"

namespace attnfast::ptx {

namespace {

uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

double ulp(double x) {  // of fp32
  const int exponent = x == 0 ? -126 : std::max(std::ilogb(x), -126);
  return std::ldexp(1.0, exponent - 23);
}

// A float no farther than `bound` from x, by where `noise` points.
float within(double x, double bound, uint64_t noise) {
  const float nearest = static_cast<float>(x);
  if (!std::isfinite(nearest) || nearest == x) return nearest;
  const double slack = std::max(bound - ulp(x) / 2, 0.0);  // rounding takes the rest
  const double place = static_cast<double>(noise >> 11) * 0x1p-52 - 1;
  return static_cast<float>(x + 0.99 * place * slack);
}

// Each has the value and the most that the hardware's differs from it.
struct Exp2 {
  static double value(double x) { return std::exp2(x); }
  static double bound(double, double y) { return 2 * ulp(y); }
};
struct Log2 {
  static double value(double x) { return std::log2(x); }
  static double bound(double x, double y) {
    return x > 0.5 && x < 2 ? 0x1p-22 : std::fabs(y) * 0x1p-22;
  }
};
struct Reciprocal {
  static double value(double x) { return 1 / x; }
  static double bound(double, double y) { return ulp(y); }
};
struct SquareRoot {
  static double value(double x) { return std::sqrt(x); }
  static double bound(double, double y) { return y * 0x1p-23; }
};
struct ReciprocalRoot {
  static double value(double x) { return 1 / std::sqrt(x); }
  static double bound(double, double y) { return y * 0x1p-22 * 0.535886731268; }  // 2^-22.9
};
struct Sine {
  static double value(double x) { return std::sin(x); }
  static double bound(double x, double) {
    return std::fabs(x) <= 6.2831853071795862 ? 0x1p-20 * 0.70710678 : 0x1p-14 * 0.61557220;
  }
};
struct Cosine : Sine {
  static double value(double x) { return std::cos(x); }
};
struct Tanh {
  static double value(double x) { return std::tanh(x); }
  static double bound(double, double y) { return std::fabs(y) * 0x1p-11; }
};

uint64_t inaccuracy(const Options& options) { return options.seed >> 8; }

template <class F>
float approximated(float x, const Options& options) {
  const double y = F::value(x);
  if (options.exact) return static_cast<float>(y);
  return within(y, F::bound(x, y), mixed(bits_of_float(x) ^ inaccuracy(options) << 32));
}

template <class F, bool kFlushes>
void approximate(Warp& w, const Instruction& i, Mask m) {
  auto *d = w.lanes<float>(i.operands[0]), *a = w.lanes<float>(i.operands[1]);
  each_lane(m, [&](int l) {
    float y = approximated<F>(kFlushes ? flushed(a[l]) : a[l], w.block.launch.options);
    if (kFlushes) y = flushed(y);
    d[l] = y == y ? y : float_of_bits(0x7FFFFFFF);
  });
}

// The same on halves, one or two in a register: the error is smaller than their own rounding but
// for tanh, of which 2^-11 is most of it.
template <class F>
void approximate_halves(Warp& w, const Instruction& i, Mask m) {
  auto *d = w.lanes<uint32_t>(i.operands[0]), *a = w.lanes<uint32_t>(i.operands[1]);
  const bool bf16 = i.variant != 0;
  each_lane(m, [&](int l) {
    uint32_t out = 0;
    for (int part = 0; part < i.count; ++part) {
      const float x = from_half(static_cast<uint16_t>(a[l] >> 16 * part), bf16);
      const uint32_t y = to_half(approximated<F>(x, w.block.launch.options), bf16);
      out |= y << 16 * part;
    }
    d[l] = out;
  });
}

// div.approx and div.full: 2 ulp; the hardware multiplies by the reciprocal.
template <bool kFlushes>
void divide(Warp& w, const Instruction& i, Mask m) {
  auto *d = w.lanes<float>(i.operands[0]), *a = w.lanes<float>(i.operands[1]);
  auto* b = w.lanes<float>(i.operands[2]);
  const Options& options = w.block.launch.options;
  each_lane(m, [&](int l) {
    const float x = kFlushes ? flushed(a[l]) : a[l], y = kFlushes ? flushed(b[l]) : b[l];
    const double q = static_cast<double>(x) / y;
    const uint64_t noise = static_cast<uint64_t>(bits_of_float(x)) << 32 | bits_of_float(y);
    float z = options.exact ? static_cast<float>(q)
                            : within(q, 2 * ulp(q), mixed(noise ^ mixed(inaccuracy(options))));
    // div.approx reaches no divisors beyond 2^126.
    if (i.variant && std::fabs(y) > 0x1p126f && !std::isinf(y))
      z = std::isinf(x) ? NAN : std::copysign(0.0f, z);
    if (kFlushes) z = flushed(z);
    d[l] = z == z ? z : float_of_bits(0x7FFFFFFF);
  });
}

struct Divided {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
struct Root {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Inverse {
  template <class T>
  T operator()(T a) const {
    return 1 / a;
  }
};
// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 keep the upper word only.
template <class F>
struct Coarse {
  double operator()(double a) const {
    const double y = F::value(a);
    uint64_t bits;
    std::memcpy(&bits, &y, 8);
    bits &= ~0xFFFFFFFFull;
    double out;
    std::memcpy(&out, &bits, 8);
    return out;
  }
};
template <class F, int kSources>
struct Flushing {
  template <class... T>
  float operator()(T... x) const {
    return flushed(F{}(flushed(x)...));
  }
};

template <class F>
Execute rounded(Decoder& d, const Type& type) {  // .rn
  const bool flushes = d.take("ftz");
  if (type.bits == 64) return unary<F, double>;
  return flushes ? unary<Flushing<F, 1>, float> : unary<F, float>;
}

template <class F>
void decode_approximation(Decoder& d) {
  const Type type = d.take_type();
  d.need("approx");
  const bool flushes = d.take("ftz");
  same_operands(d, type, 1);
  if (type.half()) {
    d.i.count = type.pair ? 2 : 1, d.i.variant = type.kind == Type::kBFloat;
    d.i.run = approximate_halves<F>;
  } else if (type.bits == 64) {
    d.i.run = unary<Coarse<F>, double>;
  } else {
    d.i.run = flushes ? approximate<F, true> : approximate<F, false>;
  }
}

template <class F, class Exact>
void decode_approximation_or_rounded(Decoder& d) {
  if (!d.take("rn")) return decode_approximation<F>(d);
  const Type type = d.take_type();
  same_operands(d, type, 1);
  d.i.run = rounded<Exact>(d, type);
}

}  // namespace

void decode_quotient(Decoder& d, const Type& type) {
  const int how = d.need_one({"rn", "full", "approx"});
  const bool flushes = d.take("ftz");
  same_operands(d, type, 2);
  d.i.variant = how == 2;
  if (how > 0) {
    if (type.bits != 32) d.fail("is known of fp32");
    d.i.run = flushes ? divide<true> : divide<false>;
  } else if (type.bits == 64) {
    d.i.run = binary<Divided, double>;
  } else {
    d.i.run = flushes ? binary<Flushing<Divided, 2>, float> : binary<Divided, float>;
  }
}

void add_approximations(Decoders& known) {
  known["ex2"] = decode_approximation<Exp2>;
  known["lg2"] = decode_approximation<Log2>;
  known["sin"] = decode_approximation<Sine>;
  known["cos"] = decode_approximation<Cosine>;
  known["tanh"] = decode_approximation<Tanh>;
  known["rsqrt"] = decode_approximation<ReciprocalRoot>;
  known["rcp"] = decode_approximation_or_rounded<Reciprocal, Inverse>;
  known["sqrt"] = decode_approximation_or_rounded<SquareRoot, Root>;
}

}  // namespace attnfast::ptx
