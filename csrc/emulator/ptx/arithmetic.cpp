// Arithmetic on integers, and what add, mul and the like are for each type.
#include "arithmetic.h"

#include <algorithm>
#include <limits>

#include "cells.h"

namespace attnfast::ptx {

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
using Wider = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return T(Unsigned<T>(a) + Unsigned<T>(b));
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return T(Unsigned<T>(a) - Unsigned<T>(b));
  }
};
template <bool kAdds>
struct Saturated {
  int32_t operator()(int32_t a, int32_t b) const {
    const int64_t x = kAdds ? int64_t{a} + b : int64_t{a} - b;
    return static_cast<int32_t>(std::clamp<int64_t>(x, std::numeric_limits<int32_t>::min(),
                                                    std::numeric_limits<int32_t>::max()));
  }
};
struct MultiplyLow {
  template <class T>
  T operator()(T a, T b) const {
    return T(uint64_t(a) * uint64_t(b));
  }
};
struct MultiplyHigh {
  template <class T>
  T operator()(T a, T b) const {
    return T(Wider<T>(a) * Wider<T>(b) >> (8 * sizeof(T)));
  }
};
struct MultiplyWide {
  template <class T>
  Wider<T> operator()(T a, T b) const {
    return Wider<T>(Wider<T>(a) * Wider<T>(b));
  }
};
template <class F>
struct Then {  // F, and a sum
  template <class T, class W>
  W operator()(T a, T b, W c) const {
    return Add{}(W(F{}(a, b)), c);
  }
};
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return T(-1);
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return T(Unsigned<T>(0) - Unsigned<T>(a));
    }
    return T(a / b);
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return 0;
    }
    return T(a % b);
  }
};
struct Minimum {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Maximum {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
template <class F>
struct Positive {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(F{}(a, b), T(0));
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return T(Unsigned<T>(0) - Unsigned<T>(a));
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? Negate{}(a) : a;
  }
};
struct AddDifference {  // sad
  template <class T>
  T operator()(T a, T b, T c) const {
    return T(c + (a < b ? b - a : a - b));
  }
};

// add.cc, addc, mad.lo.cc and so on: the carry of each lane is in slot 5.
enum CarryVariant { kSetsCarry = 1, kTakesCarry = 2, kSubtracts = 4, kMultiplies = 8, kHigh = 16 };
template <class T>
void carry(Warp& w, const Instruction& i, Mask m) {
  auto *d = w.lanes<T>(i.operands[0]), *a = w.lanes<T>(i.operands[1]);
  auto *b = w.lanes<T>(i.operands[2]), *c = w.lanes<T>(i.operands[3]);
  auto* flags = w.lanes<uint32_t>(i.operands[5]);
  each_lane(m, [&](int l) {
    T x = a[l], y = b[l];
    if (i.variant & kMultiplies) {
      x = i.variant & kHigh ? MultiplyHigh{}(x, y) : MultiplyLow{}(x, y);
      y = c[l];
    }
    const T in = i.variant & kTakesCarry ? flags[l] & 1 : 0;
    const bool subtracts = i.variant & kSubtracts;
    const T sum = subtracts ? T(x - y - in) : T(x + y + in);
    const bool out = subtracts ? x < y || (in && x == y) : sum < x || (in && sum == x);
    if (i.variant & kSetsCarry) flags[l] = out;
    d[l] = sum;
  });
}

void decode_carry(Decoder& d, const Type& type, int variant, int sources) {
  if (type.bits != 32 && type.bits != 64) d.fail("carries are known of 32 and 64 bits");
  same_operands(d, type, sources);
  if (sources < 3) d.i.operands[3] = d.i.operands[2];
  d.i.operands[5] = d.written("%carry", 4);
  d.i.variant = variant;
  d.i.run = type.bits == 64 ? carry<uint64_t> : carry<uint32_t>;
}

template <Operation kOperation>
void decode_by_type(Decoder& d) {
  const Type type = d.take_type();
  if (type.integer()) return decode_integers(d, type, kOperation);
  if (type.half()) return decode_halves(d, type, kOperation);
  if (type.kind == Type::kFloat) return decode_floats(d, type, kOperation);
  d.fail("is not known for this type");
}

void decode_with_carry(Decoder& d) {  // addc, subc, madc
  int variant = kTakesCarry | (d.take("cc") ? kSetsCarry : 0);
  if (d.op() == "subc") variant |= kSubtracts;
  const bool multiplies = d.op() == "madc";
  if (multiplies) variant |= kMultiplies | (d.need_one({"lo", "hi"}) == 1 ? kHigh : 0);
  decode_carry(d, d.take_type(), variant, multiplies ? 3 : 2);
}

template <class F>
void decode_integer_binary(Decoder& d) {
  const Type type = d.take_type();
  same_operands(d, type, 2);
  d.i.run = with_integer(d, type, [](auto x) -> Execute { return binary<F, decltype(x)>; });
}

void decode_division(Decoder& d) {
  const Type type = d.take_type();
  if (type.kind == Type::kFloat) return decode_quotient(d, type);
  same_operands(d, type, 2);
  d.i.run = with_integer(d, type, [](auto x) -> Execute { return binary<Divide, decltype(x)>; });
}

void decode_sad(Decoder& d) {
  const Type type = d.take_type();
  same_operands(d, type, 3);
  d.i.run =
      with_integer(d, type, [](auto x) -> Execute { return ternary<AddDifference, decltype(x)>; });
}

template <class F, class G>
void decode_extreme(Decoder& d, const Type& type) {
  const bool relu = d.take("relu");
  same_operands(d, type, 2);
  d.i.run = with_integer(d, type, [&](auto x) -> Execute {
    return relu ? binary<G, decltype(x)> : binary<F, decltype(x)>;
  });
}

void decode_product(Decoder& d, const Type& type) {
  const int part = d.need_one({"lo", "hi", "wide"});
  if (part < 2) {
    same_operands(d, type, 2);
    d.i.run = with_integer(d, type, [&](auto x) -> Execute {
      return part ? binary<MultiplyHigh, decltype(x)> : binary<MultiplyLow, decltype(x)>;
    });
    return;
  }
  d.need_count(3);
  d.into(0, 0, 2 * type.bytes()), d.from(1, 1, type.bytes()), d.from(2, 2, type.bytes());
  d.i.run = with_integer(d, type, [&](auto x) -> Execute {
    using T = decltype(x);
    if constexpr (sizeof(T) == 8) {
      d.fail("is not known");
    } else {
      return apply<MultiplyWide, Wider<T>, T, T>;
    }
  });
}

void decode_product_and_sum(Decoder& d, const Type& type) {
  const int part = d.need_one({"lo", "hi", "wide"});
  if (d.take("cc")) {
    if (part == 2) d.fail("is not known");
    return decode_carry(d, type, kSetsCarry | kMultiplies | (part ? kHigh : 0), 3);
  }
  const int wide = part == 2 ? 2 * type.bytes() : type.bytes();
  d.need_count(4);
  d.into(0, 0, wide), d.from(1, 1, type.bytes()), d.from(2, 2, type.bytes()), d.from(3, 3, wide);
  d.i.run = with_integer(d, type, [&](auto x) -> Execute {
    using T = decltype(x);
    if (part == 0) return ternary<Then<MultiplyLow>, T>;
    if (part == 1) return ternary<Then<MultiplyHigh>, T>;
    if constexpr (sizeof(T) == 8) {
      d.fail("is not known");
    } else {
      return apply<Then<MultiplyWide>, Wider<T>, T, T, Wider<T>>;
    }
  });
}

void decode_sum(Decoder& d, const Type& type, bool adds) {
  if (d.take("cc")) return decode_carry(d, type, kSetsCarry | (adds ? 0 : kSubtracts), 2);
  const bool saturates = d.take("sat");
  same_operands(d, type, 2);
  if (saturates) {
    if (type.kind != Type::kSigned || type.bits != 32) d.fail("saturates s32 only");
    d.i.run = adds ? binary<Saturated<true>, int32_t> : binary<Saturated<false>, int32_t>;
    return;
  }
  d.i.run = with_integer(d, type, [&](auto x) -> Execute {
    return adds ? binary<Add, decltype(x)> : binary<Subtract, decltype(x)>;
  });
}

}  // namespace

int sources_of(Operation operation) {
  if (operation == Operation::kFma) return 3;
  return operation == Operation::kNeg || operation == Operation::kAbs ? 1 : 2;
}

void decode_integers(Decoder& d, const Type& type, Operation operation) {
  switch (operation) {
    case Operation::kAdd:
    case Operation::kSub:
      return decode_sum(d, type, operation == Operation::kAdd);
    case Operation::kMul:
      return decode_product(d, type);
    case Operation::kFma:
      if (d.op() == "fma") d.fail("needs a type of floats");
      return decode_product_and_sum(d, type);
    case Operation::kMin:
      return decode_extreme<Minimum, Positive<Minimum>>(d, type);
    case Operation::kMax:
      return decode_extreme<Maximum, Positive<Maximum>>(d, type);
    default:
      break;
  }
  same_operands(d, type, 1);
  const bool negates = operation == Operation::kNeg;
  d.i.run = with_integer(d, type, [&](auto x) -> Execute {
    return negates ? unary<Negate, decltype(x)> : unary<Absolute, decltype(x)>;
  });
}

void add_arithmetic(Decoders& known) {
  known["add"] = decode_by_type<Operation::kAdd>;
  known["sub"] = decode_by_type<Operation::kSub>;
  known["mul"] = decode_by_type<Operation::kMul>;
  known["mad"] = known["fma"] = decode_by_type<Operation::kFma>;
  known["min"] = decode_by_type<Operation::kMin>;
  known["max"] = decode_by_type<Operation::kMax>;
  known["neg"] = decode_by_type<Operation::kNeg>;
  known["abs"] = decode_by_type<Operation::kAbs>;
  known["addc"] = known["subc"] = known["madc"] = decode_with_carry;
  known["rem"] = decode_integer_binary<Remainder>;
  known["sad"] = decode_sad;
  known["div"] = decode_division;
}

}  // namespace attnfast::ptx
