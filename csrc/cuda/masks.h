// Masks and biases, and what they do to a warp's tile of scores (scores.h says which lane holds
// what).
#pragma once
#include "../params.h"
#include "head.h"
#include "prims/prims.h"

namespace attnfast::cuda {

// Finite where x is.
ATTNFAST_DEVICE float narrowed(double x) {
  const auto y = static_cast<float>(x);
  if (fabsf(y) != kInfinity || fabs(x) == static_cast<double>(kInfinity)) return y;
  return y > 0.0f ? kLargest : -kLargest;
}

// Calls run(Number()) with the type of a bias's elements.
template <class Run>
ATTNFAST_DEVICE void with_number(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float());
    case DType::kBFloat16:
      return run(BFloat16());
    case DType::kFloat16:
      return run(Float16());
    default:
      return run(double());
  }
}

ATTNFAST_DEVICE float addend_of(float x) { return x; }
ATTNFAST_DEVICE float addend_of(double x) { return narrowed(x); }
ATTNFAST_DEVICE float addend_of(BFloat16 x) { return to_float(x); }
ATTNFAST_DEVICE float addend_of(Float16 x) { return to_float(x); }

// An element of a bias, or of the weights' gradient.
ATTNFAST_DEVICE float load_addend(const View& x, int64_t element) {
  float addend;
  with_number(x.dtype, [&](auto number) {
    addend = addend_of(load_global(static_cast<const decltype(number)*>(x.data) + element));
  });
  return addend;
}

// Two neighbours of a bias; halves stay in one word.
template <class Number, bool kHalves = sizeof(Number) == 2>
struct alignas(2 * sizeof(Number)) Addends {
  Number x, y;

  static ATTNFAST_DEVICE Addends of(Number x, Number y) { return {x, y}; }
  ATTNFAST_DEVICE float operator[](int e) const { return addend_of(e ? y : x); }
};
template <class Half>
struct Addends<Half, true> {
  uint32_t bits;

  static ATTNFAST_DEVICE Addends of(Half x, Half y) {
    return {x.bits | static_cast<uint32_t>(y.bits) << 16};
  }
  ATTNFAST_DEVICE float operator[](int e) const {
    return addend_of(Half{static_cast<uint16_t>(bits >> 16 * e)});
  }
};

// Two neighbours of a mask, a byte each.
struct Attends {
  uint16_t bits;

  static ATTNFAST_DEVICE Attends of(uint8_t x, uint8_t y) {
    return {static_cast<uint16_t>(x | y << 8)};
  }
  ATTNFAST_DEVICE bool operator[](int e) const { return bits >> 8 * e & 0xFF; }
};

// What a mask does to a score. It is shown a row's elements first: where none leaves a key out, its
// scores need not be asked.
struct Masking {
  using Number = uint8_t;
  using Pair = Attends;
  uint32_t all = ~0u;

  ATTNFAST_DEVICE void show(Pair x) { all &= x.bits; }
  ATTNFAST_DEVICE bool leaves_out() const { return (all & 0x0101) != 0x0101; }
  static ATTNFAST_DEVICE bool leaves_out(Pair x, int e) { return !x[e]; }
  ATTNFAST_DEVICE float with(float score, Pair, int) const { return score; }
};

// What a bias does.
template <class Element>
struct Biasing {
  using Number = Element;
  using Pair = Addends<Element>;
  float natural;  // as in Units
  float lowest = kInfinity;

  ATTNFAST_DEVICE void show(const Pair& x) { lowest = fminf(lowest, fminf(x[0], x[1])); }
  ATTNFAST_DEVICE bool leaves_out() const { return lowest == -kInfinity; }
  static ATTNFAST_DEVICE bool leaves_out(const Pair& x, int e) { return x[e] == -kInfinity; }
  ATTNFAST_DEVICE float with(float score, const Pair& x, int e) const {
    return fmaf(x[e], natural, score);
  }
};

// Each score of a warp's tile with its element of a mask or a bias, which begins at `first` for the
// head; -inf where there is no such query or key. All of a row's elements are under way before the
// first is waited for. Returns whether the tile has a key left out.
template <bool kTransposed, class Join, int kM, int kN>
ATTNFAST_DEVICE bool join(float (&s)[kM][kN][4], const Join& none_shown, const View& x,
                          int64_t first, const Head& head, int t0, int s0, int lane) {
  using Number = typename Join::Number;
  using Pair = typename Join::Pair;
  constexpr int kQueries = kTransposed ? kN * 8 : kM * 16, kKeys = kTransposed ? kM * 16 : kN * 8;
  const auto* tile = static_cast<const Number*>(x.data) + first + t0 * x.t + s0 * x.d;
  const int64_t along = kTransposed ? x.t : x.d, down = kTransposed ? x.d : x.t;
  const bool inside = t0 + kQueries <= head.T && s0 + kKeys <= head.S;
  const int rows = kTransposed ? head.S - s0 : head.T - t0;
  const int columns = kTransposed ? head.T - t0 : head.S - s0;
  const auto places = reinterpret_cast<uintptr_t>(tile) | down * sizeof(Number);
  const bool pairs = !kTransposed && inside && along == 1 && places % sizeof(Pair) == 0;
  bool some = false;
  ATTNFAST_UNROLL for (int r = 0; r < 2 * kM; ++r) {
    const int row = r * 8 + lane / 4, column = lane % 4 * 2;
    Pair pair[kN];
    const auto load = [&](int64_t step, auto place) {
      const Number* of_row = tile + place(row, rows) * down;
      ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
        const int left = place(column + n * 8, columns), right = place(column + n * 8 + 1, columns);
        pair[n] = Pair::of(load_global(of_row + left * step), load_global(of_row + right * step));
      }
    };
    if (pairs) {
      const Number* of_row = tile + row * down + column;
      ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
        pair[n] = load_global(reinterpret_cast<const Pair*>(of_row + n * 8));
      }
    } else if (inside && (kTransposed || along == 1)) {
      load(kTransposed ? along : 1, [](int i, int) { return i; });
    } else {
      load(along, [](int i, int n) { return min_of(i, n - 1); });
    }
    Join joining = none_shown;
    ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) joining.show(pair[n]);
    const bool leaves_out = any_lane(joining.leaves_out());
    some |= leaves_out;
    const auto each = [&](auto f) {
      ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
        ATTNFAST_UNROLL for (int e = 0; e < 2; ++e) f(s[r / 2][n][r % 2 * 2 + e], n, e);
      }
    };
    each([&](float& score, int n, int e) { score = joining.with(score, pair[n], e); });
    if (!leaves_out && inside) continue;
    each([&](float& score, int n, int e) {
      const bool exists = row < rows && column + n * 8 + e < columns;
      if (!exists || Join::leaves_out(pair[n], e)) score = -kInfinity;
    });
  }
  return some;
}

}  // namespace attnfast::cuda
