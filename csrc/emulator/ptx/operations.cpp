// What each opcode does to the 32 lanes of a warp.
#include "operations.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace attnfast::ptx {

namespace {

// The register file's cells: 16-bit values lie in 4 bytes.
template <class T>
using Cell = std::conditional_t<sizeof(T) == 8, T, std::conditional_t<sizeof(T) == 4, T, uint32_t>>;

template <class T>
T* lanes(Warp& w, int offset) {
  return reinterpret_cast<T*>(w.file.data() + offset);
}

template <class F>
void each(Mask m, F f) {
  if (m == kAll) {
    for (int l = 0; l < kLanes; l++) f(l);
  } else {
    for (int l = 0; l < kLanes; l++)
      if (m >> l & 1) f(l);
  }
}

template <class R, class T>
R kept(T x) {  // to a cell, without a sign
  if constexpr (sizeof(T) == 2 && std::is_integral_v<T>)
    return static_cast<uint16_t>(x);
  else
    return x;
}

template <class R, class A, class F>
void one(Machine&, Warp& w, const Instruction& i, Mask m) {
  auto* d = lanes<Cell<R>>(w, i.operands[0]);
  auto* a = lanes<Cell<A>>(w, i.operands[1]);
  each(m, [&](int l) { d[l] = kept<Cell<R>>(static_cast<R>(F{}(static_cast<A>(a[l])))); });
}
template <class R, class A, class B, class F>
void two(Machine&, Warp& w, const Instruction& i, Mask m) {
  auto* d = lanes<Cell<R>>(w, i.operands[0]);
  auto* a = lanes<Cell<A>>(w, i.operands[1]);
  auto* b = lanes<Cell<B>>(w, i.operands[2]);
  each(m, [&](int l) {
    d[l] = kept<Cell<R>>(static_cast<R>(F{}(static_cast<A>(a[l]), static_cast<B>(b[l]))));
  });
}
template <class R, class A, class B, class C, class F>
void three(Machine&, Warp& w, const Instruction& i, Mask m) {
  auto* d = lanes<Cell<R>>(w, i.operands[0]);
  auto* a = lanes<Cell<A>>(w, i.operands[1]);
  auto* b = lanes<Cell<B>>(w, i.operands[2]);
  auto* c = lanes<Cell<C>>(w, i.operands[3]);
  each(m, [&](int l) {
    d[l] = kept<Cell<R>>(
        static_cast<R>(F{}(static_cast<A>(a[l]), static_cast<B>(b[l]), static_cast<C>(c[l]))));
  });
}

float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

float from_bf16(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }
uint16_t to_bf16(float x, bool truncate = false) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7FFF;
  return (truncate ? bits : bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
float from_f16(uint16_t x) { return static_cast<float>(std::bit_cast<_Float16>(x)); }
uint16_t to_f16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
float to_tf32(uint32_t x) { return std::bit_cast<float>(x & ~0x1FFFu); }

// Calls f with a value of the type that a name like "s32" means.
template <class F>
Execute with_integer(const std::string& type, F f) {
  if (type == "s32") return f(int32_t{});
  if (type == "u32" || type == "b32") return f(uint32_t{});
  if (type == "s64") return f(int64_t{});
  if (type == "u64" || type == "b64") return f(uint64_t{});
  if (type == "s16") return f(int16_t{});
  if (type == "u16" || type == "b16") return f(uint16_t{});
  return nullptr;
}
template <class F>
Execute with_float(const std::string& type, F f) {
  if (type == "f32") return f(float{});
  if (type == "f64") return f(double{});
  return nullptr;
}
template <class F>
Execute with_any(const std::string& type, F f) {
  Execute found = with_integer(type, f);
  return found ? found : with_float(type, f);
}

template <class T, class F>
Execute unary(F) {
  return one<T, T, F>;
}
template <class T, class F>
Execute binary(F) {
  return two<T, T, T, F>;
}
template <class T, class F>
Execute ternary(F) {
  return three<T, T, T, T, F>;
}

int bytes_of(const std::string& t) {
  if (t == "pred") return 4;
  if (t == "bf16x2" || t == "f16x2" || t == "tf32") return 4;
  if (t == "bf16") return 2;
  return atoi(t.c_str() + t.find_first_of("0123456789")) / 8;
}

template <class T>
using Wide = std::conditional_t<
    std::is_same_v<T, int32_t>, int64_t,
    std::conditional_t<std::is_same_v<T, uint32_t>, uint64_t,
                       std::conditional_t<std::is_same_v<T, int16_t>, int32_t, uint32_t>>>;
template <class T>
T high_product(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<W>(a) * b >> 64);
  } else {
    return static_cast<T>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b) >> (8 * sizeof(T)));
  }
}

template <class T>
Execute arithmetic_integer(const std::string& op, const Opcode& o) {
  using U = std::make_unsigned_t<T>;
  if (op == "add") return binary<T>([](T a, T b) { return T(U(a) + U(b)); });
  if (op == "sub") return binary<T>([](T a, T b) { return T(U(a) - U(b)); });
  if (op == "mul" && o.has("lo"))
    return binary<T>([](T a, T b) { return T(uint64_t(a) * uint64_t(b)); });
  if (op == "mul" && o.has("hi")) return binary<T>([](T a, T b) { return high_product(a, b); });
  if (op == "mad" && o.has("lo"))
    return ternary<T>([](T a, T b, T c) { return T(uint64_t(a) * uint64_t(b) + uint64_t(c)); });
  if (op == "mad" && o.has("hi"))
    return ternary<T>([](T a, T b, T c) { return T(U(high_product(a, b)) + U(c)); });
  if constexpr (sizeof(T) < 8) {
    using W = Wide<T>;
    if (op == "mul" && o.has("wide")) {
      auto f = [](T a, T b) { return W(W(a) * W(b)); };
      return two<W, T, T, decltype(f)>;
    }
    if (op == "mad" && o.has("wide")) {
      auto f = [](T a, T b, W c) {
        return W(std::make_unsigned_t<W>(W(a) * W(b)) + std::make_unsigned_t<W>(c));
      };
      return three<W, T, T, W, decltype(f)>;
    }
  }
  if (op == "div")
    return binary<T>([](T a, T b) {
      return b == 0 ? T(-1)
             : b == T(-1)
                 ? T(U(0) - U(a)) * T(std::is_signed_v<T>) + T(!std::is_signed_v<T> && a == b)
                 : T(a / b);
    });
  if (op == "rem")
    return binary<T>([](T a, T b) {
      return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
    });
  if (op == "min" && o.has("relu"))
    return binary<T>([](T a, T b) { return std::max(std::min(a, b), T(0)); });
  if (op == "max" && o.has("relu"))
    return binary<T>([](T a, T b) { return std::max(std::max(a, b), T(0)); });
  if (op == "min") return binary<T>([](T a, T b) { return std::min(a, b); });
  if (op == "max") return binary<T>([](T a, T b) { return std::max(a, b); });
  if (op == "neg") return unary<T>([](T a) { return T(U(0) - U(a)); });
  if (op == "abs") return unary<T>([](T a) { return T(a < 0 ? U(0) - U(a) : U(a)); });
  if (op == "and") return binary<T>([](T a, T b) { return T(a & b); });
  if (op == "or") return binary<T>([](T a, T b) { return T(a | b); });
  if (op == "xor") return binary<T>([](T a, T b) { return T(a ^ b); });
  if (op == "not") return unary<T>([](T a) { return T(~a); });
  auto left = [](T a, uint32_t b) { return b >= 8 * sizeof(T) ? T(0) : T(U(a) << b); };
  auto right = [](T a, uint32_t b) { return T(b >= 8 * sizeof(T) ? (a < 0 ? -1 : 0) : a >> b); };
  if (op == "shl") return two<T, T, uint32_t, decltype(left)>;
  if (op == "shr") return two<T, T, uint32_t, decltype(right)>;
  auto extract = [](T a, uint32_t p, uint32_t n) {
    constexpr uint32_t bits = 8 * sizeof(T);
    p &= 255, n &= 255;
    if (!n) return T(0);
    const bool sign = std::is_signed_v<T> && (uint64_t(a) >> std::min(p + n - 1, bits - 1) & 1);
    U x = p >= bits ? U(0) : U(U(a) >> p);
    const uint32_t have = p >= bits ? 0 : std::min(n, bits - p);
    if (have < bits) x &= (U(1) << have) - 1;
    if (sign && have < bits) x |= U(~U(0)) << have;
    return T(x);
  };
  if (op == "bfe") return three<T, T, uint32_t, uint32_t, decltype(extract)>;
  auto count = [](T a) { return uint32_t(std::popcount(U(a))); };
  auto zeros = [](T a) { return uint32_t(std::countl_zero(U(a))); };
  if (op == "popc") return one<uint32_t, T, decltype(count)>;
  if (op == "clz") return one<uint32_t, T, decltype(zeros)>;
  if (op == "brev")
    return unary<T>([](T a) {
      U x = 0;
      for (unsigned n = 0; n < 8 * sizeof(T); n++) x |= (U(a) >> n & 1) << (8 * sizeof(T) - 1 - n);
      return T(x);
    });
  return nullptr;
}

template <class T, bool kFtz>
T ftz(T x) {
  if constexpr (kFtz && std::is_same_v<T, float>) return flushed(x);
  return x;
}

template <class T, bool Z>
Execute arithmetic_float(const std::string& op, const Opcode& o) {
  if (op == "add")
    return binary<T>([](T a, T b) { return ftz<T, Z>(ftz<T, Z>(a) + ftz<T, Z>(b)); });
  if (op == "sub")
    return binary<T>([](T a, T b) { return ftz<T, Z>(ftz<T, Z>(a) - ftz<T, Z>(b)); });
  if (op == "mul")
    return binary<T>([](T a, T b) { return ftz<T, Z>(ftz<T, Z>(a) * ftz<T, Z>(b)); });
  if (op == "fma" || op == "mad")
    return ternary<T>([](T a, T b, T c) {
      return ftz<T, Z>(std::fma(ftz<T, Z>(a), ftz<T, Z>(b), ftz<T, Z>(c)));
    });
  if (op == "div")
    return binary<T>([](T a, T b) { return ftz<T, Z>(ftz<T, Z>(a) / ftz<T, Z>(b)); });
  if (op == "min" && !o.has("NaN")) return binary<T>([](T a, T b) { return std::fmin(a, b); });
  if (op == "max" && !o.has("NaN"))
    return binary<T>([](T a, T b) { return a != a ? b : b != b ? a : a > b ? a : b; });
  if (op == "min")
    return binary<T>([](T a, T b) { return a != a || b != b ? T(NAN) : std::fmin(a, b); });
  if (op == "max")
    return binary<T>([](T a, T b) { return a != a || b != b ? T(NAN) : std::fmax(a, b); });
  if (op == "neg") return unary<T>([](T a) { return -a; });
  if (op == "abs") return unary<T>([](T a) { return std::fabs(a); });
  if (op == "copysign") return binary<T>([](T a, T b) { return std::copysign(b, a); });
  if (op == "rcp") return unary<T>([](T a) { return ftz<T, Z>(T(1) / ftz<T, Z>(a)); });
  if (op == "sqrt") return unary<T>([](T a) { return ftz<T, Z>(std::sqrt(ftz<T, Z>(a))); });
  if (op == "rsqrt") return unary<T>([](T a) { return ftz<T, Z>(T(1) / std::sqrt(ftz<T, Z>(a))); });
  if (op == "ex2") return unary<T>([](T a) { return ftz<T, Z>(std::exp2(ftz<T, Z>(a))); });
  if (op == "lg2") return unary<T>([](T a) { return ftz<T, Z>(std::log2(ftz<T, Z>(a))); });
  if (op == "tanh") return unary<T>([](T a) { return std::tanh(a); });
  if (op == "sin") return unary<T>([](T a) { return std::sin(a); });
  if (op == "cos") return unary<T>([](T a) { return std::cos(a); });
  return nullptr;
}

template <class T>
Execute comparison(const std::string& c) {
  auto make = [](auto f) -> Execute { return two<uint32_t, T, T, decltype(f)>; };
  if (c == "eq") return make([](T a, T b) { return uint32_t(a == b); });
  if (c == "ne") return make([](T a, T b) { return uint32_t(a != b && a == a && b == b); });
  if (c == "lt" || c == "lo") return make([](T a, T b) { return uint32_t(a < b); });
  if (c == "le" || c == "ls") return make([](T a, T b) { return uint32_t(a <= b); });
  if (c == "gt" || c == "hi") return make([](T a, T b) { return uint32_t(a > b); });
  if (c == "ge" || c == "hs") return make([](T a, T b) { return uint32_t(a >= b); });
  if (c == "equ") return make([](T a, T b) { return uint32_t(!(a < b) && !(a > b)); });
  if (c == "neu") return make([](T a, T b) { return uint32_t(!(a == b)); });
  if (c == "ltu") return make([](T a, T b) { return uint32_t(!(a >= b)); });
  if (c == "leu") return make([](T a, T b) { return uint32_t(!(a > b)); });
  if (c == "gtu") return make([](T a, T b) { return uint32_t(!(a <= b)); });
  if (c == "geu") return make([](T a, T b) { return uint32_t(!(a < b)); });
  if (c == "num") return make([](T a, T b) { return uint32_t(a == a && b == b); });
  if (c == "nan") return make([](T a, T b) { return uint32_t(a != a || b != b); });
  return nullptr;
}

// Conversions go by double or 64-bit integers; the common ones have code of their own.
enum Kind { kSigned, kUnsigned, kFloat16, kBFloat16, kFloat32, kFloat64, kTf32 };
Kind kind_of(const std::string& t) {
  if (t == "f16") return kFloat16;
  if (t == "bf16") return kBFloat16;
  if (t == "f32") return kFloat32;
  if (t == "f64") return kFloat64;
  if (t == "tf32") return kTf32;
  return t[0] == 's' ? kSigned : kUnsigned;
}
struct Conversion {
  Kind to, from;
  int to_bytes, from_bytes;
  bool to_wide, from_wide, saturates, flushes;
  char rounding;  // n, z, m, p: to integers; n, z: to floats
};
std::vector<Conversion> conversions;

void convert(Machine&, Warp& w, const Instruction& i, Mask m) {
  const Conversion& c = conversions[i.variant];
  each(m, [&](int l) {
    uint64_t bits =
        c.from_wide ? lanes<uint64_t>(w, i.operands[1])[l] : lanes<uint32_t>(w, i.operands[1])[l];
    bool is_float = true;
    double x = 0;
    int64_t n = 0;
    switch (c.from) {
      case kFloat16:
        x = from_f16(bits);
        break;
      case kBFloat16:
        x = from_bf16(bits);
        break;
      case kFloat32:
      case kTf32:
        x = std::bit_cast<float>(uint32_t(bits));
        break;
      case kFloat64:
        x = std::bit_cast<double>(bits);
        break;
      case kSigned:
        is_float = false;
        n = c.from_bytes == 1   ? int8_t(bits)
            : c.from_bytes == 2 ? int16_t(bits)
            : c.from_bytes == 4 ? int32_t(bits)
                                : int64_t(bits);
        break;
      case kUnsigned:
        is_float = false;
        n = c.from_bytes == 8 ? bits : bits & ((1ull << 8 * c.from_bytes) - 1);
        break;
    }
    if (is_float && c.flushes && std::fabs(x) < 1.17549435e-38) x = std::copysign(0.0, x);
    uint64_t out = 0;
    if (c.to == kSigned || c.to == kUnsigned) {
      if (is_float) {
        const double y = c.rounding == 'z'   ? std::trunc(x)
                         : c.rounding == 'm' ? std::floor(x)
                         : c.rounding == 'p' ? std::ceil(x)
                                             : std::nearbyint(x);
        if (c.to == kSigned) {
          const double top = std::ldexp(1.0, 8 * c.to_bytes - 1);
          const int64_t high = c.to_bytes == 8 ? INT64_MAX : (1ll << (8 * c.to_bytes - 1)) - 1;
          n = y != y ? 0 : y >= top ? high : y < -top ? -high - 1 : int64_t(y);
        } else {
          const double top = std::ldexp(1.0, 8 * c.to_bytes);
          n = y != y || y <= 0 ? 0
              : y >= top       ? (c.to_bytes == 8 ? -1 : (1ll << 8 * c.to_bytes) - 1)
                               : int64_t(uint64_t(y));
        }
      }
      out = n;  // truncated or extended to the register
      if (!c.to_wide)
        out = c.to_bytes == 2                        ? out & 0xFFFF
              : c.to_bytes == 1 && c.to == kUnsigned ? out & 0xFF
                                                     : out & 0xFFFFFFFF;
    } else {
      if (is_float && c.to == c.from && c.rounding && c.rounding != 'N')
        x = c.rounding == 'z'   ? std::trunc(x)
            : c.rounding == 'm' ? std::floor(x)
            : c.rounding == 'p' ? std::ceil(x)
                                : std::nearbyint(x);
      const double v = is_float ? x : c.from == kUnsigned ? double(uint64_t(n)) : double(n);
      const float f = is_float ? float(x) : c.from == kUnsigned ? float(uint64_t(n)) : float(n);
      const float g = c.saturates ? std::fmin(std::fmax(f, 0.0f), 1.0f) : f;
      switch (c.to) {
        case kFloat64:
          out = std::bit_cast<uint64_t>(v);
          break;
        case kFloat32:
          out = std::bit_cast<uint32_t>(c.flushes ? flushed(g) : g);
          break;
        case kTf32:
          out = (std::bit_cast<uint32_t>(g) + 0x1000u) & ~0x1FFFu;
          break;  // rna
        case kFloat16:
          out = to_f16(g);
          break;
        default:
          out = to_bf16(g, c.rounding == 'z');
          break;
      }
    }
    if (c.to_wide)
      lanes<uint64_t>(w, i.operands[0])[l] = out;
    else
      lanes<uint32_t>(w, i.operands[0])[l] = out;
  });
}

void pack_pair(Machine&, Warp& w, const Instruction& i, Mask m) {  // cvt.rn.bf16x2.f32 d, high, low
  auto* d = lanes<uint32_t>(w, i.operands[0]);
  auto* a = lanes<float>(w, i.operands[1]);
  auto* b = lanes<float>(w, i.operands[2]);
  const bool half = i.variant;
  each(m, [&](int l) {
    const uint32_t high = half ? to_f16(a[l]) : to_bf16(a[l]),
                   low = half ? to_f16(b[l]) : to_bf16(b[l]);
    d[l] = high << 16 | low;
  });
}

uint64_t cell(Warp& w, int offset, bool wide, int l) {
  return wide ? lanes<uint64_t>(w, offset)[l] : lanes<uint32_t>(w, offset)[l];
}

// mov.b32 d, {a, b} and {a, b}, d: variant is the number of parts, negative to unpack.
void pack(Machine&, Warp& w, const Instruction& i, Mask m) {
  const int n = std::abs(i.variant), bits = 8 * i.bytes / n;
  const uint64_t part = bits == 64 ? ~0ull : (1ull << bits) - 1;
  each(m, [&](int l) {
    if (i.variant > 0) {
      uint64_t x = 0;
      for (int k = 0; k < n; k++)
        x |= (cell(w, i.operands[1 + k], bits == 64, l) & part) << (bits * k);
      if (i.bytes == 8)
        lanes<uint64_t>(w, i.operands[0])[l] = x;
      else
        lanes<uint32_t>(w, i.operands[0])[l] = x;
    } else {
      const uint64_t x = cell(w, i.operands[0], i.bytes == 8, l);
      for (int k = 0; k < n; k++) lanes<uint32_t>(w, i.operands[1 + k])[l] = x >> (bits * k) & part;
    }
  });
}

void load(Machine& machine, Warp& w, const Instruction& i, Mask m) {
  const int total = i.count * i.bytes;
  each(m, [&](int l) {
    const uint64_t address =
        (i.operands[0] < 0 ? 0 : cell(w, i.operands[0], i.wide_address, l)) + i.offset;
    const char* p = machine.at(w, i.space, address, total, l, false, nullptr);
    for (int k = 0; k < i.count; k++, p += i.bytes) {
      uint64_t x = 0;
      std::memcpy(&x, p, i.bytes);
      if (i.extends_sign) x = static_cast<int64_t>(x << (64 - 8 * i.bytes)) >> (64 - 8 * i.bytes);
      if (i.wide_registers)
        lanes<uint64_t>(w, i.operands[1 + k])[l] = x;
      else
        lanes<uint32_t>(w, i.operands[1 + k])[l] = x;
    }
  });
}

void store(Machine& machine, Warp& w, const Instruction& i, Mask m) {
  const int total = i.count * i.bytes;
  each(m, [&](int l) {
    const uint64_t address =
        (i.operands[0] < 0 ? 0 : cell(w, i.operands[0], i.wide_address, l)) + i.offset;
    char data[32];
    for (int k = 0; k < i.count; k++) {
      const uint64_t x = cell(w, i.operands[1 + k], i.wide_registers, l);
      std::memcpy(data + k * i.bytes, &x, i.bytes);
    }
    std::memcpy(machine.at(w, i.space, address, total, l, true, data), data, total);
  });
}

enum Atomic { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompare };
template <class T>
void atomic(Machine& machine, Warp& w, const Instruction& i, Mask m) {
  each(m, [&](int l) {
    const uint64_t address = cell(w, i.operands[0], i.wide_address, l) + i.offset;
    char* p = machine.at(w, i.space, address, sizeof(T), l, i.space != Space::kShared, nullptr);
    T old, x = lanes<Cell<T>>(w, i.operands[2])[l], now{};
    std::memcpy(&old, p, sizeof(T));
    switch (i.variant) {
      case kAdd:
        now = old + x;
        break;
      case kMin:
        now = std::min(old, x);
        break;
      case kMax:
        now = std::max(old, x);
        break;
      case kExchange:
        now = x;
        break;
      case kCompare:
        now = old == x ? T(lanes<Cell<T>>(w, i.operands[3])[l]) : old;
        break;
      default:
        if constexpr (std::is_integral_v<T>)
          now = i.variant == kAnd ? old & x : i.variant == kOr ? old | x : old ^ x;
    }
    std::memcpy(p, &now, sizeof(T));
    if (i.operands[1] >= 0) lanes<Cell<T>>(w, i.operands[1])[l] = old;
  });
}

// Shared addresses, also where an instruction takes generic ones.
uint32_t shared_address(Warp& w, const Instruction& i, int operand, bool wide, int l) {
  return static_cast<uint32_t>(cell(w, i.operands[operand], wide, l) + i.offset);
}

void load_matrix(Machine& machine, Warp& w, const Instruction& i, Mask) {
  uint32_t out[4][kLanes];
  for (int k = 0; k < i.count; k++) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; r++) {
      const uint32_t address = shared_address(w, i, 0, i.wide_address, 8 * k + r);
      std::memcpy(rows[r], machine.at(w, Space::kShared, address, 16, -1, false, nullptr), 16);
    }
    for (int l = 0; l < kLanes; l++) {
      const int g = l / 4, t = l % 4 * 2;
      out[k][l] = i.variant ? rows[t][g] | rows[t + 1][g] << 16 : rows[g][t] | rows[g][t + 1] << 16;
    }
  }
  for (int k = 0; k < i.count; k++)
    std::memcpy(lanes<uint32_t>(w, i.operands[1 + k]), out[k], sizeof out[k]);
}

void store_matrix(Machine& machine, Warp& w, const Instruction& i, Mask) {
  for (int k = 0; k < i.count; k++) {
    uint16_t rows[8][8];
    for (int l = 0; l < kLanes; l++) {
      const int g = l / 4, t = l % 4 * 2;
      const uint32_t x = lanes<uint32_t>(w, i.operands[1 + k])[l];
      (i.variant ? rows[t][g] : rows[g][t]) = x;
      (i.variant ? rows[t + 1][g] : rows[g][t + 1]) = x >> 16;
    }
    for (int r = 0; r < 8; r++) {
      const uint32_t address = shared_address(w, i, 0, i.wide_address, 8 * k + r);
      const char* data = reinterpret_cast<const char*>(rows[r]);
      std::memcpy(machine.at(w, Space::kShared, address, 16, 8 * k + r, true, data), data, 16);
    }
  }
}

// mma.m16n8kK: operands d 0-3, a, b, c. Fragments as the PTX ISA draws them: lane l holds row
// l / 4 and columns of l % 4.
enum Element { kElementF16, kElementBf16, kElementTf32 };
template <int K, Element E>
void multiply(Machine&, Warp& w, const Instruction& i, Mask) {
  constexpr int per = E == kElementTf32 ? 1 : 2;  // elements of a register
  constexpr int na = 16 * K / kLanes / per, nb = 8 * K / kLanes / per;
  float a[16][K], b[K][8], c[16][8];
  auto put = [](uint32_t x, int part) {
    if constexpr (E == kElementTf32) return to_tf32(x);
    const uint16_t half = x >> (16 * part);
    return E == kElementF16 ? from_f16(half) : from_bf16(half);
  };
  for (int l = 0; l < kLanes; l++) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < na; r++)
      for (int part = 0; part < per; part++)
        a[g + r % 2 * 8][t * per + part + r / 2 * 4 * per] =
            put(lanes<uint32_t>(w, i.operands[4 + r])[l], part);
    for (int r = 0; r < nb; r++)
      for (int part = 0; part < per; part++)
        b[t * per + part + r * 4 * per][g] =
            put(lanes<uint32_t>(w, i.operands[4 + na + r])[l], part);
    for (int r = 0; r < 4; r++)
      c[g + r / 2 * 8][t * 2 + r % 2] = lanes<float>(w, i.operands[4 + na + nb + r])[l];
  }
  for (int row = 0; row < 16; row++) {
    float sum[8] = {};
    for (int k = 0; k < K; k++)
      for (int n = 0; n < 8; n++) sum[n] += a[row][k] * b[k][n];
    for (int n = 0; n < 8; n++) c[row][n] += sum[n];
  }
  for (int l = 0; l < kLanes; l++)
    for (int r = 0; r < 4; r++)
      lanes<float>(w, i.operands[r])[l] = c[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
}

void copy_async(Machine& machine, Warp& w, const Instruction& i, Mask m) {
  each(m, [&](int l) {
    const uint32_t to = cell(w, i.operands[0], i.variant & 1, l) + i.offset;
    const uint64_t from = cell(w, i.operands[1], true, l) + i.operands[3];
    Copy copy{l, w.committed[l], to, from, i.bytes, i.bytes, machine.random() % 2 == 0, {}};
    if (i.operands[2] >= 0)
      copy.valid = std::min<uint32_t>(lanes<uint32_t>(w, i.operands[2])[l], i.bytes);
    char* p = machine.at(w, Space::kShared, to, i.bytes, l, true, nullptr);
    if (copy.valid) {
      if (from % i.bytes)
        throw Fault("cp.async of " + std::to_string(i.bytes) +
                    " bytes from an address that is not aligned");
      const char* data = machine.at(w, Space::kGlobal, from, 1, l, false, nullptr);
      machine.at(w, Space::kGlobal, from + copy.valid - 1, 1, l, false, nullptr);
      if (copy.early) std::memcpy(copy.data, data, copy.valid);
    }
    std::memset(p, 0xFF, i.bytes);
    for (int k = 0; k < i.bytes; k++) machine.shadow[to + k].pending++;
    w.copies.push_back(copy);
  });
}
void commit(Machine&, Warp& w, const Instruction&, Mask m) {
  each(m, [&](int l) { w.committed[l]++; });
}
void wait_copies(Machine& machine, Warp& w, const Instruction& i, Mask m) {
  if (i.variant < 0) commit(machine, w, i, m);
  const long newest = std::max(i.variant, 0);
  auto done = [&](Copy& c) {
    const bool now = (m >> c.lane & 1) && c.group < w.committed[c.lane] - newest;
    if (now) machine.complete(w, c);
    return now;
  };
  w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), done), w.copies.end());
}

enum Shuffle { kIndex, kButterfly, kUp, kDown };
void shuffle(Machine&, Warp& w, const Instruction& i, Mask m) {
  uint32_t source[kLanes];
  std::memcpy(source, lanes<uint32_t>(w, i.operands[1]), sizeof source);
  each(m, [&](int l) {
    const uint32_t members = lanes<uint32_t>(w, i.operands[4])[l];
    if (members & ~m) throw Fault("shfl.sync names lanes that are not there");
    const int b = lanes<uint32_t>(w, i.operands[2])[l] & 31,
              c = lanes<uint32_t>(w, i.operands[3])[l];
    const int clamp = c & 31, segment = c >> 8 & 31;
    const int highest = (l & segment) | (clamp & ~segment), lowest = l & segment;
    int j = i.variant == kUp          ? l - b
            : i.variant == kDown      ? l + b
            : i.variant == kButterfly ? l ^ b
                                      : lowest | (b & ~segment);
    const bool inside = i.variant == kUp ? j >= highest : j <= highest;
    if (!inside) j = l;
    if (!(members >> j & 1)) throw Fault("shfl.sync reads a lane that takes no part");
    lanes<uint32_t>(w, i.operands[0])[l] = source[j];
    if (i.operands[5] >= 0) lanes<uint32_t>(w, i.operands[5])[l] = inside;
  });
}

enum Vote { kAllVote, kAnyVote, kUniform, kBallot };
void vote(Machine&, Warp& w, const Instruction& i, Mask m) {
  Mask set = 0;
  each(m, [&](int l) {
    set |= Mask(lanes<uint32_t>(w, i.operands[1])[l] != uint32_t(i.offset)) << l;
  });
  if (i.offset) {  // !p
    set = 0;
    each(m, [&](int l) { set |= Mask(lanes<uint32_t>(w, i.operands[1])[l] == 0) << l; });
  }
  const uint32_t x = i.variant == kBallot    ? set
                     : i.variant == kAllVote ? set == m
                     : i.variant == kAnyVote ? set != 0
                                             : set == m || !set;
  each(m, [&](int l) { lanes<uint32_t>(w, i.operands[0])[l] = x; });
}

void reduce(Machine&, Warp& w, const Instruction& i, Mask m) {
  uint32_t x = 0;
  bool first = true;
  each(m, [&](int l) {
    const uint32_t y = lanes<uint32_t>(w, i.operands[1])[l];
    if (first)
      x = y;
    else
      switch (i.variant) {
        case kAdd:
          x += y;
          break;
        case kMin:
          x = i.extends_sign ? std::min<int32_t>(x, y) : std::min(x, y);
          break;
        case kMax:
          x = i.extends_sign ? std::max<int32_t>(x, y) : std::max(x, y);
          break;
        case kAnd:
          x &= y;
          break;
        case kOr:
          x |= y;
          break;
        default:
          x ^= y;
      }
    first = false;
  });
  each(m, [&](int l) { lanes<uint32_t>(w, i.operands[0])[l] = x; });
}

void barrier(Machine&, Warp& w, const Instruction& i, Mask m) {
  if (m != w.live()) throw Fault("bar.sync without all lanes of the warp");
  w.barrier = lanes<uint32_t>(w, i.operands[0])[0];
  w.expected = i.operands[1] >= 0 ? lanes<uint32_t>(w, i.operands[1])[0] : 0;
}
void warp_barrier(Machine&, Warp& w, const Instruction& i, Mask m) {
  for (int l = 0; l < kLanes; l++)
    if ((m >> l & 1) && (lanes<uint32_t>(w, i.operands[0])[l] & ~m))
      throw Fault("bar.warp.sync names lanes that are not there");
  w.epoch++;
}
void nothing(Machine&, Warp&, const Instruction&, Mask) {}
void trap(Machine&, Warp&, const Instruction&, Mask) { throw Fault("trap"); }

// wgmma.mma_async.m64nNk16: each warp of the group makes its 16 rows.
struct WarpgroupShape {
  int n;
  bool a_in_registers, bf16, a_transposed, b_transposed;
  std::vector<int> d, a;  // operands
  int a_descriptor, b_descriptor, scale;
};
std::vector<WarpgroupShape> warpgroup_shapes;

// Where element (row, k) of a matrix of 2-byte elements lies. By rows of k (K-major) or, transposed,
// by columns; groups of 8 are `stride` bytes apart, and wider ones than the swizzle `leading`.
uint32_t element_address(uint64_t descriptor, bool transposed, int row, int k) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
                 stride = (descriptor >> 32 & 0x3FFF) << 4;
  const int mode = descriptor >> 62;
  if (descriptor >> 49 & 7) throw Fault("wgmma: a base offset");
  if (!mode) {
    const uint32_t a = transposed ? row % 8 * 2 + row / 8 * stride + k % 8 * 16 + k / 8 * leading
                                  : row % 8 * 16 + row / 8 * stride + k % 8 * 2 + k / 8 * leading;
    return start + a;
  }
  const int width = mode == 1 ? 128 : mode == 2 ? 64 : 32;  // bytes
  uint32_t a = start;
  if (transposed)
    a += row * 2 % width + row * 2 / width * leading + k % 8 * width + k / 8 * stride;
  else
    a += row % 8 * width + row / 8 * stride + k * 2;
  return a ^ ((a >> 7 & (width / 16 - 1)) << 4);
}

void warpgroup_multiply(Machine& machine, Warp& w, const Instruction& i, Mask m) {
  const WarpgroupShape& s = warpgroup_shapes[i.variant];
  if (m != kAll) throw Fault("wgmma without all lanes of the warp");
  Product p{&i,
            0,
            cell(w, s.b_descriptor, true, 0),
            lanes<uint32_t>(w, s.scale)[0] != 0,
            w.product_groups,
            {}};
  if (!s.a_in_registers) p.a = cell(w, s.a_descriptor, true, 0);
  bool first = true;
  for (const Product& before : w.products)
    first &= warpgroup_shapes[before.instruction->variant].d != s.d;
  if (first)
    for (int r : s.d) {
      auto* x = lanes<uint32_t>(w, r);
      p.saved.insert(p.saved.end(), x, x + kLanes);
      std::fill(x, x + kLanes, ~0u);
    }
  w.products.push_back(std::move(p));
  (void)machine;
}
void commit_products(Machine&, Warp& w, const Instruction&, Mask) { w.product_groups++; }
void wait_products(Machine& machine, Warp& w, const Instruction& i, Mask) {
  size_t done = 0;
  while (done < w.products.size() && w.products[done].group < w.product_groups - i.variant)
    machine.multiply(w, w.products[done++]);
  if (done && done < w.products.size() &&
      w.products[done].saved.empty()) {  // goes on with these accumulators
    for (int r : warpgroup_shapes[w.products[done].instruction->variant].d) {
      auto* x = lanes<uint32_t>(w, r);
      w.products[done].saved.insert(w.products[done].saved.end(), x, x + kLanes);
    }
  }
  w.products.erase(w.products.begin(), w.products.begin() + done);
}

void permute(Machine&, Warp& w, const Instruction& i, Mask m) {
  each(m, [&](int l) {
    const uint64_t x =
        lanes<uint32_t>(w, i.operands[1])[l] | uint64_t(lanes<uint32_t>(w, i.operands[2])[l]) << 32;
    const uint32_t s = lanes<uint32_t>(w, i.operands[3])[l];
    uint32_t d = 0;
    for (int k = 0; k < 4; k++) {
      const int n = s >> (4 * k) & 15;
      uint8_t byte = x >> (8 * (n & 7));
      if (n & 8) byte = byte & 128 ? 255 : 0;
      d |= uint32_t(byte) << (8 * k);
    }
    lanes<uint32_t>(w, i.operands[0])[l] = d;
  });
}
void logic(Machine&, Warp& w, const Instruction& i, Mask m) {
  each(m, [&](int l) {
    const uint32_t a = lanes<uint32_t>(w, i.operands[1])[l],
                   b = lanes<uint32_t>(w, i.operands[2])[l],
                   c = lanes<uint32_t>(w, i.operands[3])[l];
    const uint32_t table = lanes<uint32_t>(w, i.operands[4])[l];
    uint32_t d = 0;
    for (int n = 0; n < 8; n++)
      if (table >> n & 1) d |= (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
    lanes<uint32_t>(w, i.operands[0])[l] = d;
  });
}
void insert(Machine&, Warp& w, const Instruction& i, Mask m) {
  each(m, [&](int l) {
    const uint32_t a = lanes<uint32_t>(w, i.operands[1])[l],
                   b = lanes<uint32_t>(w, i.operands[2])[l];
    const uint32_t p = lanes<uint32_t>(w, i.operands[3])[l] & 255,
                   n = lanes<uint32_t>(w, i.operands[4])[l] & 255;
    const uint64_t field = p > 31 ? 0 : ((1ull << std::min(n, 32u)) - 1) << p;
    lanes<uint32_t>(w, i.operands[0])[l] = (b & ~field) | ((uint64_t(a) << (p & 63)) & field);
  });
}
template <bool kLeft, bool kClamp>
void funnel(Machine&, Warp& w, const Instruction& i, Mask m) {
  each(m, [&](int l) {
    const uint64_t x =
        lanes<uint32_t>(w, i.operands[1])[l] | uint64_t(lanes<uint32_t>(w, i.operands[2])[l]) << 32;
    uint32_t n = lanes<uint32_t>(w, i.operands[3])[l];
    n = kClamp ? std::min(n, 32u) : n & 31;
    lanes<uint32_t>(w, i.operands[0])[l] = kLeft ? (x << n) >> 32 : x >> n;
  });
}
template <class T>
void select(Machine&, Warp& w, const Instruction& i, Mask m) {
  auto* d = lanes<T>(w, i.operands[0]);
  auto *a = lanes<T>(w, i.operands[1]), *b = lanes<T>(w, i.operands[2]);
  auto* p = lanes<uint32_t>(w, i.operands[3]);
  each(m, [&](int l) { d[l] = p[l] ? a[l] : b[l]; });
}
// setp of f16 and bf16, scalar or packed with two predicates.
using Comparison = bool (*)(float, float);
struct HalfComparison {
  Comparison compare;
  bool bf16;
};
std::vector<HalfComparison> half_comparisons;
Comparison half_comparison(const std::string& c) {
  if (c == "eq") return [](float a, float b) { return a == b; };
  if (c == "ne") return [](float a, float b) { return a < b || a > b; };
  if (c == "lt") return [](float a, float b) { return a < b; };
  if (c == "le") return [](float a, float b) { return a <= b; };
  if (c == "gt") return [](float a, float b) { return a > b; };
  if (c == "ge") return [](float a, float b) { return a >= b; };
  if (c == "neu") return [](float a, float b) { return !(a == b); };
  if (c == "nan") return [](float a, float b) { return a != a || b != b; };
  return nullptr;
}
void compare_halves(Machine&, Warp& w, const Instruction& i, Mask m) {
  const HalfComparison& c = half_comparisons[i.variant];
  each(m, [&](int l) {
    const uint32_t a = lanes<uint32_t>(w, i.operands[2])[l],
                   b = lanes<uint32_t>(w, i.operands[3])[l];
    for (int part = 0; part < i.count; part++) {
      const uint16_t x = a >> (16 * part), y = b >> (16 * part);
      lanes<uint32_t>(w, i.operands[part])[l] =
          c.compare(c.bf16 ? from_bf16(x) : from_f16(x), c.bf16 ? from_bf16(y) : from_f16(y));
    }
  });
}

}  // namespace

void Machine::multiply(Warp& w, Product& p) {
  const WarpgroupShape& s = warpgroup_shapes[p.instruction->variant];
  auto element = [&](uint64_t descriptor, bool transposed, int row, int k) {
    uint16_t x;
    std::memcpy(&x,
                at(w, Space::kShared, element_address(descriptor, transposed, row, k), 2, -1, false,
                   nullptr),
                2);
    return s.bf16 ? from_bf16(x) : from_f16(x);
  };
  float a[16][16];
  std::vector<float> b(16 * s.n);
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++) {
      if (s.a_in_registers) {
        const uint32_t x = lanes<uint32_t>(w, s.a[row / 8 + k / 8 * 2])[row % 8 * 4 + k % 8 / 2];
        const uint16_t half = x >> (k % 2 * 16);
        a[row][k] = s.bf16 ? from_bf16(half) : from_f16(half);
      } else {
        a[row][k] = element(p.a, s.a_transposed, w.index % 4 * 16 + row, k);
      }
    }
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < s.n; n++) b[k * s.n + n] = element(p.b, s.b_transposed, n, k);
  for (size_t r = 0; r < s.d.size() && !p.saved.empty(); r++)
    std::memcpy(lanes<uint32_t>(w, s.d[r]), &p.saved[r * kLanes], kLanes * 4);
  for (size_t r = 0; r < s.d.size(); r++)
    for (int l = 0; l < kLanes; l++) {
      const int row = l / 4 + r / 2 % 2 * 8, n = r / 4 * 8 + l % 4 * 2 + r % 2;
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[k * s.n + n];
      float& d = lanes<float>(w, s.d[r])[l];
      d = p.accumulates ? d + sum : sum;
    }
}

void decode(const Opcode& o, const std::vector<Operand>& given, Instruction& i,
            const Decoder& decoder) {
  const std::string& op = o.words[0];
  const std::string& type = o.words.back();
  auto fail = [&](const std::string& why) { decoder.fail(o.name + ": " + why); };
  auto reg = [&](const std::string& text, int bytes) {  // of this width
    const Register r = decoder.look_up(text, bytes);
    if ((r.bytes == 8) != (bytes == 8)) fail("operand " + text + " has another width");
    return r.offset;
  };
  auto plain = [&](std::initializer_list<int> bytes) {
    if (given.size() != bytes.size()) fail("takes " + std::to_string(bytes.size()) + " operands");
    int n = 0;
    for (int b : bytes) {
      i.operands[n] = reg(given[n].text, b);
      n++;
    }
  };
  auto address = [&](const Operand& m, int slot) {
    if (!m.memory) fail("needs an address");
    i.offset = m.offset;
    const Register r = decoder.look_up(m.base, 8);
    i.operands[slot] = r.offset;
    i.wide_address = r.bytes == 8;
  };
  auto space = [&](const Operand& m) {
    if (o.has("global") || o.has("const")) return Space::kGlobal;
    if (o.has("shared") || o.has("shared::cta")) return Space::kShared;
    if (o.has("param")) return Space::kParam;
    if (o.has("local")) return Space::kLocal;
    (void)m;
    return Space::kGeneric;
  };

  if (op == "mov" && (given[0].parts.size() || given[1].parts.size())) {
    const bool packs = given[0].parts.empty();
    const auto& parts = given[packs ? 1 : 0].parts;
    i.bytes = bytes_of(type);
    i.variant = packs ? parts.size() : -static_cast<int>(parts.size());
    i.operands[0] = reg(given[packs ? 0 : 1].text, i.bytes);
    for (size_t k = 0; k < parts.size(); k++)
      i.operands[1 + k] = reg(parts[k], i.bytes / parts.size());
    i.run = pack;
    return;
  }
  if (op == "mov") {
    const int b = bytes_of(type);
    plain({b, b});
    if (type == "pred") {
      auto f = [](uint32_t a) { return uint32_t(a != 0); };
      i.run = one<uint32_t, uint32_t, decltype(f)>;
    } else if (b == 8) {
      i.run = unary<uint64_t>([](uint64_t a) { return a; });
    } else {
      i.run = unary<uint32_t>([](uint32_t a) { return a; });
    }
    return;
  }
  if (op == "ld" || op == "st" || op == "ldu") {
    const bool loads = op != "st";
    const Operand &memory = given[loads ? 1 : 0], &value = given[loads ? 0 : 1];
    i.space = space(memory);
    address(memory, 0);
    i.bytes = bytes_of(type);
    i.extends_sign = type[0] == 's' && loads;
    std::vector<std::string> parts =
        value.parts.empty() ? std::vector<std::string>{value.text} : value.parts;
    i.count = parts.size();
    for (const auto& word : o.words)
      if (word[0] == 'v' && word.size() == 2 && isdigit(word[1]) && word[1] - '0' != i.count)
        fail("vector of another size");
    for (int k = 0; k < i.count; k++) {
      const Register r = decoder.look_up(parts[k], i.bytes);
      i.wide_registers = r.bytes == 8;
      i.operands[1 + k] = r.offset;
    }
    i.run = loads ? load : store;
    return;
  }
  if (op == "atom" || op == "red") {
    const bool result = op == "atom";
    i.space = space(given[result]);
    address(given[result], 0);
    const int b = bytes_of(type);
    i.operands[1] = result ? reg(given[0].text, b) : -1;
    i.operands[2] = reg(given[1 + result].text, b);
    if (given.size() > 2u + result) i.operands[3] = reg(given[2 + result].text, b);
    const char* names[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas"};
    i.variant = -1;
    for (int k = 0; k < 8; k++)
      if (o.has(names[k])) i.variant = k;
    if (i.variant < 0) fail("not known");
    i.run = with_any(type, [](auto x) -> Execute { return atomic<decltype(x)>; });
    return;
  }
  if (op == "cvta") {
    const bool to = o.words[1] == "to";
    const std::string& name = o.words[to ? 2 : 1];
    const uint64_t window = name == "shared"  ? kSharedWindow
                            : name == "param" ? kParamWindow
                            : name == "local" ? kLocalWindow
                                              : 0;
    plain({8, 8});
    const int base = decoder
                         .look_up(std::to_string(to ? 0 - static_cast<int64_t>(window)
                                                    : static_cast<int64_t>(window)),
                                  8)
                         .offset;
    i.operands[2] = base;
    i.run = binary<uint64_t>([](uint64_t a, uint64_t b) { return a + b; });
    return;
  }
  if (op == "prefetch" || op == "prefetchu" || op == "membar" || op == "fence" || op == "discard" ||
      op == "griddepcontrol" || op == "nanosleep") {
    i.run = nothing;
    return;
  }
  if (op == "trap" || op == "brkpt") {
    i.run = trap;
    return;
  }
  if (op == "ldmatrix" || op == "stmatrix") {
    const bool loads = op == "ldmatrix";
    address(given[loads ? 1 : 0], 0);
    const Operand& value = given[loads ? 0 : 1];
    const std::vector<std::string> parts =
        value.parts.empty() ? std::vector<std::string>{value.text} : value.parts;
    i.count = parts.size();
    if (!o.has(("x" + std::to_string(i.count)).c_str()) || !o.has("m8n8") || type != "b16")
      fail("not known");
    i.variant = o.has("trans");
    for (int k = 0; k < i.count; k++) i.operands[1 + k] = reg(parts[k], 4);
    i.meets = true;
    i.run = loads ? load_matrix : store_matrix;
    return;
  }
  if (op == "mma") {
    int n = 0;
    for (const Operand& part : given)
      for (const auto& text : part.parts) i.operands[n++] = reg(text, 4);
    i.meets = true;
    if (o.words.size() != 10 || o.words[6] != "f32" || o.words[9] != "f32" || o.words[4] != "row" ||
        o.words[5] != "col")
      fail("not known");
    const std::string &shape = o.words[3], &element = o.words[7];
    struct Known {
      const char *shape, *element;
      Execute run;
      int operands;
    };
    for (const Known& k : {Known{"m16n8k16", "bf16", multiply<16, kElementBf16>, 14},
                           {"m16n8k16", "f16", multiply<16, kElementF16>, 14},
                           {"m16n8k8", "bf16", multiply<8, kElementBf16>, 11},
                           {"m16n8k8", "f16", multiply<8, kElementF16>, 11},
                           {"m16n8k8", "tf32", multiply<8, kElementTf32>, 14},
                           {"m16n8k4", "tf32", multiply<4, kElementTf32>, 11}})
      if (shape == k.shape && element == k.element && n == k.operands) i.run = k.run;
    if (!i.run) fail("not known");
    return;
  }
  if (op == "wgmma") {
    i.meets = true;
    if (o.has("fence")) {
      i.run = nothing;
    } else if (o.has("commit_group")) {
      i.run = commit_products;
    } else if (o.has("wait_group")) {
      i.variant = atoi(given[0].text.c_str());
      i.run = wait_products;
    } else {
      WarpgroupShape s{};
      const std::string& shape =
          o.words[4];  // wgmma mma_async sync aligned m64n64k16 f32 bf16 bf16
      s.n = atoi(shape.c_str() + 4);
      if (o.words.size() != 8 || o.words[5] != "f32" || shape.substr(shape.size() - 3) != "k16")
        fail("not known");
      s.bf16 = type == "bf16";
      for (const auto& text : given[0].parts) s.d.push_back(reg(text, 4));
      for (const auto& text : given[1].parts) s.a.push_back(reg(text, 4));
      s.a_in_registers = !s.a.empty();
      if (!s.a_in_registers) s.a_descriptor = reg(given[1].text, 8);
      s.b_descriptor = reg(given[2].text, 8);
      s.scale = reg(given[3].text, 4);
      if (static_cast<int>(s.d.size()) != s.n / 2 || given[4].text != "1" || given[5].text != "1")
        fail("not known");
      s.a_transposed = !s.a_in_registers && given[6].text == "1";
      s.b_transposed = given.back().text == "1";
      warpgroup_shapes.push_back(s);
      i.variant = warpgroup_shapes.size() - 1;
      i.run = warpgroup_multiply;
    }
    return;
  }
  if (op == "cp" && o.has("async")) {
    if (o.has("bulk") || o.has("mbarrier")) fail("not known");
    if (o.has("commit_group")) {
      i.run = commit;
    } else if (o.has("wait_group") || o.has("wait_all")) {
      i.variant = o.has("wait_all") ? -1 : atoi(given[0].text.c_str());
      i.run = wait_copies;
    } else {
      address(given[1], 1);
      i.operands[3] = given[1].offset;
      address(given[0], 0);
      i.variant = i.wide_address;
      i.bytes = strtol(given[2].text.c_str(), nullptr, 0);
      if (i.bytes != 4 && i.bytes != 8 && i.bytes != 16) fail("size");
      if (o.has("cg") && i.bytes != 16) fail("cg copies 16 bytes");
      i.operands[2] = given.size() > 3 ? reg(given[3].text, 4) : -1;
      i.run = copy_async;
    }
    return;
  }
  if (op == "shfl") {
    const size_t bar = given[0].text.find('|');
    const std::string first = given[0].text.substr(0, bar);
    i.operands[0] = reg(first, 4);
    i.operands[5] = bar == std::string::npos ? -1 : reg(given[0].text.substr(bar + 1), 4);
    for (int k = 1; k < 5; k++) i.operands[k] = reg(given[k].text, 4);
    i.variant = o.has("idx") ? kIndex : o.has("bfly") ? kButterfly : o.has("up") ? kUp : kDown;
    i.meets = true;
    i.run = shuffle;
    return;
  }
  if (op == "vote") {
    i.operands[0] = reg(given[0].text, 4);
    const bool negated = given[1].text[0] == '!';
    i.operands[1] = reg(given[1].text.substr(negated), 4);
    i.offset = negated;
    i.variant = o.has("ballot") ? kBallot
                : o.has("any")  ? kAnyVote
                : o.has("all")  ? kAllVote
                                : kUniform;
    i.meets = true;
    i.run = vote;
    return;
  }
  if (op == "redux") {
    plain({4, 4, 4});
    const char* names[] = {"add", "min", "max", "and", "or", "xor"};
    for (int k = 0; k < 6; k++)
      if (o.has(names[k])) i.variant = k;
    i.extends_sign = type == "s32";
    i.meets = true;
    i.run = reduce;
    return;
  }
  if (op == "bar" || op == "barrier") {
    i.meets = true;
    if (o.has("warp")) {
      i.operands[0] = reg(given[0].text, 4);
      i.run = warp_barrier;
      return;
    }
    if (!o.has("sync")) fail("not known");
    i.operands[0] = reg(given[0].text, 4);
    i.operands[1] = given.size() > 1 ? reg(given[1].text, 4) : -1;
    i.run = barrier;
    return;
  }
  if (op == "prmt") {
    if (o.words.size() != 2) fail("not known");
    plain({4, 4, 4, 4});
    i.run = permute;
    return;
  }
  if (op == "lop3") {
    plain({4, 4, 4, 4, 4});
    i.run = logic;
    return;
  }
  if (op == "bfi" && bytes_of(type) == 4) {
    plain({4, 4, 4, 4, 4});
    i.run = insert;
    return;
  }
  if (op == "shf") {
    plain({4, 4, 4, 4});
    const bool clamp = o.has("clamp");
    i.run = o.has("l") ? (clamp ? funnel<true, true> : funnel<true, false>)
            : clamp    ? funnel<false, true>
                       : funnel<false, false>;
    return;
  }
  if (op == "selp") {
    const int b = bytes_of(type);
    plain({b, b, b, 4});
    i.run = b == 8 ? select<uint64_t> : select<uint32_t>;
    return;
  }
  if (op == "setp" && (type == "bf16" || type == "f16" || type == "bf16x2" || type == "f16x2")) {
    const bool packed = type.back() == '2';
    const size_t bar = given[0].text.find('|');
    if (o.words.size() != 3 || packed != (bar != std::string::npos)) fail("not known");
    i.operands[0] = reg(given[0].text.substr(0, bar), 4);
    if (packed) i.operands[1] = reg(given[0].text.substr(bar + 1), 4);
    for (int k = 1; k < 3; k++) i.operands[1 + k] = reg(given[k].text, bytes_of(type));
    i.count = packed ? 2 : 1;
    half_comparisons.push_back({half_comparison(o.words[1]), type[0] == 'b'});
    if (!half_comparisons.back().compare) fail("not known");
    i.variant = half_comparisons.size() - 1;
    i.run = compare_halves;
    return;
  }
  if (op == "setp") {
    if (o.has("and") || o.has("or") || o.has("xor") || given[0].text.find('|') != std::string::npos)
      fail("not known");
    const int b = bytes_of(type);
    plain({4, b, b});
    i.run = with_any(type, [&](auto x) { return comparison<decltype(x)>(o.words[1]); });
    if (!i.run) fail("not known");
    return;
  }
  if (op == "cvt") {
    const std::string &from = type, &to = o.words[o.words.size() - 2];
    if (to == "bf16x2" || to == "f16x2") {
      if (from != "f32" || !o.has("rn")) fail("not known");
      plain({4, 4, 4});
      i.variant = to == "f16x2";
      i.run = pack_pair;
      return;
    }
    const Register a = decoder.look_up(given[1].text, bytes_of(from)),
                   d = decoder.look_up(given[0].text, 4);
    i.operands[0] = d.offset, i.operands[1] = a.offset;
    if (from == "bf16" && to == "f32") {
      auto f = [](uint16_t x) { return from_bf16(x); };
      i.run = one<float, uint16_t, decltype(f)>;
      return;
    }
    char rounding = 0;
    for (const auto& word : o.words) {
      if (word.size() == 3 && word[0] == 'r' && word[2] == 'i') rounding = word[1];
      if (word == "rz")
        rounding = kind_of(to) >= kFloat16 && kind_of(to) != kind_of(from) ? 'z' : rounding;
    }
    conversions.push_back({kind_of(to), kind_of(from), bytes_of(to), bytes_of(from), d.bytes == 8,
                           a.bytes == 8, o.has("sat"), o.has("ftz"), rounding});
    i.variant = conversions.size() - 1;
    i.run = convert;
    return;
  }
  if (type == "pred") {
    for (size_t k = 0; k < given.size(); k++) i.operands[k] = reg(given[k].text, 4);
    using P = uint32_t;
    if (op == "and") i.run = binary<P>([](P a, P b) { return P(a && b); });
    if (op == "or") i.run = binary<P>([](P a, P b) { return P(a || b); });
    if (op == "xor") i.run = binary<P>([](P a, P b) { return P(!a != !b); });
    if (op == "not") i.run = unary<P>([](P a) { return P(!a); });
    if (!i.run) fail("not known");
    return;
  }
  // Arithmetic: all operands of one type but shifts' amounts, fields' places and wide results.
  const int b = bytes_of(type);
  const bool wide = o.has("wide"), shift = op == "shl" || op == "shr", field = op == "bfe",
             counts = op == "popc" || op == "clz";
  if (o.has("cc") || o.words[0] == "addc" || o.has("sat")) fail("not known");
  for (size_t k = 0; k < given.size(); k++) {
    int bytes = b;
    if (wide && (k == 0 || k == 3)) bytes = 2 * b;
    if ((shift && k == 2) || (field && k >= 2) || (counts && k == 0)) bytes = 4;
    i.operands[k] = reg(given[k].text, bytes);
  }
  i.run = with_integer(type, [&](auto x) { return arithmetic_integer<decltype(x)>(op, o); });
  if (!i.run && type[0] == 'f')
    i.run = with_float(type, [&](auto x) {
      return o.has("ftz") ? arithmetic_float<decltype(x), true>(op, o)
                          : arithmetic_float<decltype(x), false>(op, o);
    });
  if (!i.run) fail("not known");
}

}  // namespace attnfast::ptx
