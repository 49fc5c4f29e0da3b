// How operations read and write the 32 lanes of registers.
#pragma once
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../rounding.h"
#include "decoder.h"
#include "machine.h"

namespace attnfast::ptx {

using emulator::bits_of_float;
using emulator::float_of_bits;

// Values of 16 bits and fewer lie in 4 bytes, extended by zeros.
template <class T>
using Cell = std::conditional_t<sizeof(T) == 4 || sizeof(T) == 8, T, uint32_t>;

template <class T>
Cell<T> to_cell(T x) {
  if constexpr (sizeof(T) == 2) return static_cast<uint16_t>(x);
  return x;
}

inline bool has(Mask lanes, int lane) { return lanes >> lane & 1; }

template <class F>
void each_lane(Mask lanes, F f) {
  for (int l = 0; l < kLanes; ++l) {
    if (has(lanes, l)) f(l);
  }
}

// d = out in these lanes.
template <class T>
void assign(T* d, const T* out, Mask lanes) {
  if (lanes == kAll) {
    std::memcpy(d, out, kLanes * sizeof(T));
  } else {
    each_lane(lanes, [&](int l) { d[l] = out[l]; });
  }
}

template <class F, class R, class... A, size_t... N>
void apply_to(Warp& w, const Instruction& i, Mask m, std::index_sequence<N...>) {
  const auto sources = std::make_tuple(w.lanes<Cell<A>>(i.operands[1 + N])...);
  Cell<R> out[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    out[l] = to_cell<R>(static_cast<R>(F{}(static_cast<A>(std::get<N>(sources)[l])...)));
  }
  assign(w.lanes<Cell<R>>(i.operands[0]), out, m);
}

// Executes R d = F{}(A a, ...), for all lanes and kept in those that take part.
template <class F, class R, class... A>
void apply(Warp& w, const Instruction& i, Mask m) {
  apply_to<F, R, A...>(w, i, m, std::index_sequence_for<A...>{});
}
template <class F, class T>
constexpr Execute unary = apply<F, T, T>;
template <class F, class T>
constexpr Execute binary = apply<F, T, T, T>;
template <class F, class T>
constexpr Execute ternary = apply<F, T, T, T, T>;

// Calls f with a value of the C++ type of an integer.
template <class F>
Execute with_integer(Decoder& d, const Type& type, F f) {
  const bool sign = type.kind == Type::kSigned;
  if (!type.integer()) d.fail("needs an integer type");
  if (type.bits == 64) return sign ? f(int64_t{}) : f(uint64_t{});
  if (type.bits == 32) return sign ? f(int32_t{}) : f(uint32_t{});
  if (type.bits == 16) return sign ? f(int16_t{}) : f(uint16_t{});
  d.fail("needs 16, 32 or 64 bits");
}

// Slots 0 to n for the result and n sources of one type.
inline void same_operands(Decoder& d, const Type& type, int sources) {
  d.need_count(sources + 1);
  d.into(0, 0, type.bytes());
  for (int n = 1; n <= sources; ++n) d.from(n, n, type.bytes());
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float from_half(uint16_t x, bool bf16) {
  return bf16 ? emulator::widen<false>(x) : emulator::widen<true>(x);
}
inline uint16_t to_half(float x, bool bf16) {
  return bf16 ? emulator::narrow<false>(x) : emulator::narrow<true>(x);
}

}  // namespace attnfast::ptx
