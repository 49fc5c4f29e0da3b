// Logic, shifts, fields, permutations of bytes, and counts of bits.
#include <algorithm>

#include "cells.h"

namespace attnfast::ptx {

namespace {

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return ~a;
  }
};
struct NotPredicate {
  uint32_t operator()(uint32_t a) const { return !a; }
};
struct ShiftLeft {
  template <class T>
  T operator()(T a, uint32_t b) const {
    return b >= 8 * sizeof(T) ? T(0) : T(static_cast<std::make_unsigned_t<T>>(a) << b);
  }
};
struct ShiftRight {
  template <class T>
  T operator()(T a, uint32_t b) const {
    return b >= 8 * sizeof(T) ? T(a < 0 ? -1 : 0) : T(a >> b);
  }
};
struct CountOnes {
  template <class T>
  uint32_t operator()(T a) const {
    return __builtin_popcountll(a);
  }
};
struct CountZeros {
  template <class T>
  uint32_t operator()(T a) const {
    return a ? __builtin_clzll(a) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
  }
};
struct Reverse {
  template <class T>
  T operator()(T a) const {
    T x = 0;
    for (unsigned n = 0; n < 8 * sizeof(T); ++n) x = T(x << 1 | (a >> n & 1));
    return x;
  }
};
// The highest bit that differs from the sign; -1 if there is none.
template <bool kAmount>
struct FindTop {
  template <class T>
  uint32_t operator()(T a) const {
    using U = std::make_unsigned_t<T>;
    const U x = static_cast<U>(a < 0 ? ~a : a);
    if (!x) return ~0u;
    const uint32_t top = 63 - __builtin_clzll(x);
    return kAmount ? 8 * sizeof(T) - 1 - top : top;
  }
};
struct Extract {
  template <class T>
  T operator()(T a, uint32_t place, uint32_t bits) const {
    using U = std::make_unsigned_t<T>;
    constexpr uint32_t width = 8 * sizeof(T);
    place &= 255, bits &= 255;
    if (!bits) return 0;
    const bool sign = std::is_signed_v<T> && (a >> std::min(place + bits - 1, width - 1) & 1);
    const uint32_t have = place >= width ? 0 : std::min(bits, width - place);
    U x = place >= width ? U(0) : U(U(a) >> place);
    if (have < width) {
      x &= (U(1) << have) - 1;
      if (sign) x |= U(~U(0)) << have;
    }
    return T(x);
  }
};
template <class T>
struct Insert {
  T operator()(T a, T b, uint32_t place, uint32_t bits) const {
    constexpr uint32_t width = 8 * sizeof(T);
    place &= 255, bits = std::min(bits & 255, width);
    if (place >= width || !bits) return b;
    const T field = (bits == width ? T(~T(0)) : T((T(1) << bits) - 1)) << place;
    return (b & ~field) | ((a << place) & field);
  }
};
template <bool kLeft, bool kClamp>
struct Funnel {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t n) const {
    const uint64_t x = a | static_cast<uint64_t>(b) << 32;
    n = kClamp ? std::min(n, 32u) : n & 31;
    return static_cast<uint32_t>(kLeft ? (x << n) >> 32 : x >> n);
  }
};
struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t selector) const {
    const uint64_t x = a | static_cast<uint64_t>(b) << 32;
    uint32_t d = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t n = selector >> (4 * k) & 15;
      uint8_t byte = static_cast<uint8_t>(x >> (8 * (n & 7)));
      if (n & 8) byte = byte & 128 ? 255 : 0;  // its sign
      d |= static_cast<uint32_t>(byte) << (8 * k);
    }
    return d;
  }
};
struct Logic {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c, uint32_t table) const {
    uint32_t d = 0;
    for (int n = 0; n < 8; ++n) {
      const uint32_t term = (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
      d |= table >> n & 1 ? term : 0;
    }
    return d;
  }
};

template <class F>
void decode_logic(Decoder& d) {
  Type type = d.take_type();
  if (type.kind == Type::kPredicate) type = {Type::kBits, 32, false};
  same_operands(d, type, 2);
  d.i.run = with_integer(d, type, [](auto x) -> Execute { return binary<F, decltype(x)>; });
}

void decode_not(Decoder& d) {
  const Type type = d.take_type();
  same_operands(d, type, 1);
  d.i.run = type.kind == Type::kPredicate
                ? unary<NotPredicate, uint32_t>
                : with_integer(d, type, [](auto x) -> Execute { return unary<Not, decltype(x)>; });
}

template <class F>
void decode_shift(Decoder& d) {
  const Type type = d.take_type();
  d.need_count(3);
  d.into(0, 0, type.bytes()), d.from(1, 1, type.bytes()), d.from(2, 2, 4);
  d.i.run = with_integer(
      d, type, [](auto x) -> Execute { return apply<F, decltype(x), decltype(x), uint32_t>; });
}

template <class F>
void decode_count(Decoder& d) {
  const Type type = d.take_type();
  d.need_count(2);
  d.into(0, 0, 4), d.from(1, 1, type.bytes());
  d.i.run = type.bits == 64 ? apply<F, uint32_t, uint64_t> : apply<F, uint32_t, uint32_t>;
}

void decode_find_top(Decoder& d) {
  const bool amount = d.take("shiftamt");
  const Type type = d.take_type();
  d.need_count(2);
  d.into(0, 0, 4), d.from(1, 1, type.bytes());
  d.i.run = with_integer(d, type, [&](auto x) -> Execute {
    using T = decltype(x);
    return amount ? apply<FindTop<true>, uint32_t, T> : apply<FindTop<false>, uint32_t, T>;
  });
}

void decode_reverse(Decoder& d) {
  const Type type = d.take_type();
  same_operands(d, type, 1);
  d.i.run = type.bits == 64 ? unary<Reverse, uint64_t> : unary<Reverse, uint32_t>;
}

void decode_extract(Decoder& d) {
  const Type type = d.take_type();
  d.need_count(4);
  d.into(0, 0, type.bytes()), d.from(1, 1, type.bytes()), d.from(2, 2, 4), d.from(3, 3, 4);
  d.i.run = with_integer(d, type, [](auto x) -> Execute {
    return apply<Extract, decltype(x), decltype(x), uint32_t, uint32_t>;
  });
}

void decode_insert(Decoder& d) {
  const Type type = d.take_type();
  const int bytes = type.bytes();
  d.need_count(5);
  d.into(0, 0, bytes), d.from(1, 1, bytes), d.from(2, 2, bytes), d.from(3, 3, 4), d.from(4, 4, 4);
  d.i.run = bytes == 8 ? apply<Insert<uint64_t>, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>
                       : apply<Insert<uint32_t>, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>;
}

void decode_funnel(Decoder& d) {
  const bool left = d.need_one({"l", "r"}) == 0, clamp = d.need_one({"clamp", "wrap"}) == 0;
  const Type type = d.take_type();
  same_operands(d, type, 3);
  using U = uint32_t;
  d.i.run = left ? (clamp ? ternary<Funnel<true, true>, U> : ternary<Funnel<true, false>, U>)
                 : (clamp ? ternary<Funnel<false, true>, U> : ternary<Funnel<false, false>, U>);
}

void decode_permute(Decoder& d) {
  same_operands(d, d.take_type(), 3);
  d.i.run = ternary<Permute, uint32_t>;
}

void decode_lop3(Decoder& d) {
  same_operands(d, d.take_type(), 4);
  d.i.run = apply<Logic, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>;
}

}  // namespace

void add_bits(Decoders& known) {
  known["and"] = decode_logic<And>;
  known["or"] = decode_logic<Or>;
  known["xor"] = decode_logic<Xor>;
  known["not"] = decode_not;
  known["shl"] = decode_shift<ShiftLeft>;
  known["shr"] = decode_shift<ShiftRight>;
  known["popc"] = decode_count<CountOnes>;
  known["clz"] = decode_count<CountZeros>;
  known["bfind"] = decode_find_top;
  known["brev"] = decode_reverse;
  known["bfe"] = decode_extract;
  known["bfi"] = decode_insert;
  known["shf"] = decode_funnel;
  known["prmt"] = decode_permute;
  known["lop3"] = decode_lop3;
}

}  // namespace attnfast::ptx
