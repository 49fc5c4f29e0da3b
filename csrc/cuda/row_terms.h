// What of ds depends on the query alone: computed once, then read by every backward kernel
// (docs/math.md, section 4).
//   row_term = -delta + dlse + dH (log l - H)    delta = rowsum(do o), plus rowsum(p Z dw)
#pragma once
#include "arguments.h"
#include "head.h"

namespace attnfast::cuda {

// Of one query: its norm as forward left it, the row term, and dH for scores in units.
struct RowTerms {
  float m = 0.0f, log2_l = kInfinity;  // those of a query without keys
  float row_term = 0.0f, dentropy = 0.0f;
};

// s - m where it is multiplied with p: it ends where p is 0, before dH times it is infinite.
ATTNFAST_DEVICE float depth_of(float x, float m, const Scaling& units) {
  return fmaxf(x - m, units.deepest);
}

// Where a head's queries have their row terms, in as many planes as there are: without a gradient of
// the entropy no dentropy.
struct TermPlanes {
  float* m;
  int64_t plane;
  int planes;

  ATTNFAST_DEVICE TermPlanes(const BackwardArguments& a, int64_t b, int64_t h)
      : m(a.terms + (b * a.p.H + h) * a.padded),
        plane(a.p.B * a.p.H * a.padded),
        planes(a.p.grad_entropy ? 4 : 3) {}

  ATTNFAST_DEVICE float* row_term(int64_t t) const { return m + 2 * plane + t; }
  ATTNFAST_DEVICE RowTerms load(int64_t t) const {
    return {load_global(m + t), load_global(m + plane + t), load_global(row_term(t)),
            planes > 3 ? load_global(m + 3 * plane + t) : 0.0f};
  }
};

// The dot product of eight elements of do and of o.
template <class Element>
ATTNFAST_DEVICE float dot_of_chunk(const Words4& x, const Words4& y) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
  ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
    const auto low = [](uint32_t w) { return to_float(Element{static_cast<uint16_t>(w)}); };
    const auto high = [](uint32_t w) { return to_float(Element{static_cast<uint16_t>(w >> 16)}); };
    sum += low(xs[i]) * low(ys[i]) + high(xs[i]) * high(ys[i]);
  }
  return sum;
}

// Query t's row terms, by eight lanes together: `lane` of eight. The same bits in every kernel.
constexpr int kLanesPerRow = 8;

template <class Element>
ATTNFAST_DEVICE RowTerms row_terms(const BackwardArguments& a, const Head& head, int t, int lane) {
  const BackwardParams& p = a.p;
  const int D_v = static_cast<int>(p.D_v);
  float delta = 0.0f;
  for (int column = lane * 8; t < head.T && column < D_v; column += kLanesPerRow * 8) {
    const auto* o = head.rows_of<Element>(p.out, head.h, head.q_begin) + t * p.out.t;
    const auto* d_o = head.rows_of<Element>(p.grad_out, head.h, head.q_begin) + t * p.grad_out.t;
    if (a.out_aligned && a.grad_out_aligned) {
      delta += dot_of_chunk<Element>(load_global(reinterpret_cast<const Words4*>(o + column)),
                                     load_global(reinterpret_cast<const Words4*>(d_o + column)));
    } else {
      delta += dot_of_chunk<Element>(gather_chunk(o, column, D_v), gather_chunk(d_o, column, D_v));
    }
  }
  for (int lanes = 1; lanes < kLanesPerRow; lanes *= 2) delta += shuffle_xor(delta, lanes);
  RowTerms terms;
  if (t >= head.T) return terms;
  const int64_t at = head.row_number(p, t);
  const float log2_l = load_global(p.norm + p.norm_plane + at);
  if (log2_l == kInfinity) return terms;
  terms.m = load_global(p.norm + at), terms.log2_l = log2_l;
  // Nothing but the sink: o is zero, whatever do is.
  if (delta != delta && p.sinks && log2_l == 0.0f &&
      terms.m == load_global(p.sinks + head.h) * a.units.natural) {
    delta = 0.0f;
  }
  terms.row_term = -delta + (p.grad_lse ? load_global(p.grad_lse + at) : 0.0f);
  if (p.grad_entropy) {
    const float dentropy = load_global(p.grad_entropy + at);
    terms.row_term += dentropy * (log2_l * kLn2 - load_global(p.entropy + at));
    terms.dentropy = dentropy * a.units.to_natural;
  }
  return terms;
}

// The row terms of a lane's own queries, row 2 * m + half of the warp's.
template <int kRowTiles>
struct OwnTerms {
  RowTerms of[2 * kRowTiles];

  ATTNFAST_DEVICE OwnTerms(const TermPlanes& rows, int t0, int T, int lane) {
    ATTNFAST_UNROLL for (int r = 0; r < 2 * kRowTiles; ++r) {
      const int t = t0 + r * 8 + lane / 4;
      if (t < T) of[r] = rows.load(t);
    }
  }
  ATTNFAST_DEVICE void of_columns(int) {}
  ATTNFAST_DEVICE RowTerms operator()(int m, int e) const { return of[2 * m + e / 2]; }
};

// The same of plain calls, from shared memory, anew each time: kept, they take registers.
template <int kTermBytes>
struct SharedTerms {
  uint32_t rows;  // the warp's first
  int lane;
  RowTerms of[2] = {};

  ATTNFAST_DEVICE void of_columns(int) {
    ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
      const uint32_t at = rows + (r * 8 + lane / 4) * 4;
      of[r] = {load_shared<float>(at), load_shared<float>(at + kTermBytes),
               load_shared<float>(at + 2 * kTermBytes), 0.0f};
    }
  }
  ATTNFAST_DEVICE RowTerms operator()(int, int e) const { return of[e / 2]; }
};

// The row terms of a lane's columns, from shared memory.
template <int kTermBytes>
struct MovingTerms {
  uint32_t rows;
  int lane;
  bool has_dentropy;
  RowTerms of[2] = {};

  ATTNFAST_DEVICE void of_columns(int n) {
    const uint32_t at = rows + (n * 4 + lane % 4) * 8;
    const auto m = load_shared<Floats2>(at), log2_l = load_shared<Floats2>(at + kTermBytes);
    const auto row_term = load_shared<Floats2>(at + 2 * kTermBytes);
    Floats2 dentropy{0.0f, 0.0f};
    if (has_dentropy) dentropy = load_shared<Floats2>(at + 3 * kTermBytes);
    of[0] = {m.x, log2_l.x, row_term.x, dentropy.x};
    of[1] = {m.y, log2_l.y, row_term.y, dentropy.y};
  }
  ATTNFAST_DEVICE RowTerms operator()(int, int e) const { return of[e % 2]; }
};

}  // namespace attnfast::cuda
