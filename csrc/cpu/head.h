// One (batch entry or sequence, head): where its rows lie, which keys a query may attend to by
// position, and the units of its scores.
//
// Queries lie in vector lanes; a column is kColumn consecutive queries of one head.
#pragma once
#include "elements.h"
#include "math.h"
#include "pairs.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr float kMaxFloat = 3.4028234663852886e38f;

ATTNFAST_INLINE float clamp_finite(float x) {
  return x > kMaxFloat ? kMaxFloat : x < -kMaxFloat ? -kMaxFloat : x;
}

// How products become scores: times `factor`, then the cap. Whatever the scale and the cap are, no
// intermediate overflows where the score does not. Units are log2, or natural with a bias or where
// log2 e times a score might overflow.
struct Scaling : Units {
  static constexpr float kHuge = 0x1p60f;

  float softcap;  // in units; 0: none
  bool after;     // the products are multiplied, and clamped, since q would overflow
  bool divides;   // tanh(score / softcap), since 1 / softcap would under- or overflow
  float late;     // the factor, where it comes `after`

  template <class Params>
  explicit Scaling(const Params& p) {
    const float size = __builtin_fabsf(p.scale);
    choose(p.bias.data || size > kHuge || p.softcap > kHuge ? 1.0f : kLog2E);
    softcap = p.softcap * natural;
    divides = p.softcap > 0.0f && (p.softcap > kHuge || size > kHuge * p.softcap);
    factor = p.softcap > 0.0f && !divides ? p.scale / p.softcap : p.scale * natural;
    late = factor;
    after = __builtin_fabsf(factor) > kHuge;
    if (after) factor = 1.0f;
  }

  // Whether scores stay products: on pairs, where nothing edits them.
  template <class Element>
  bool keeps_products(bool edits_scores) const {
    return kPlanesOf<Element> == 1 && !edits_scores && factor > 1.0f / kHuge;
  }

  // Scores of n vectors from their products; dcapped: null, or d capped / d uncapped.
  void finish(Index n, float* s, float* dcapped) const {
    if (after) {
      for (Index i = 0; i < n * kLanes; i += kLanes) {
        const Vec x = load(s + i) * late, most = broadcast(kMaxFloat);
        store(s + i, x > most ? most : x < -most ? -most : x);
      }
    }
    if (softcap == 0.0f) return;
    for (Index i = 0; i < n * kLanes; i += kLanes) {
      const Vec x = load(s + i), y = divides ? x / softcap : x, u = tanh(y);
      store(s + i, divides ? abs(y) < 0x1p-12f ? x : u * softcap : u * softcap);
      if (dcapped) store(dcapped + i, 1.0f - u * u);
    }
  }
};

// One (batch entry or sequence, head): where its rows lie and which keys a query may attend to.
template <class Element>
struct Head {
  const AttentionParams& problem;
  Index b, h;
  Index T, S;                  // of this sequence
  Index q_begin, k_begin;      // first row of this sequence (varlen), else 0
  Index shift;                 // t' = t + shift
  Index left, right;           // of the window; -1: unbounded
  Index live_begin, live_end;  // keys outside are padding for every query
  const Element *q, *k, *v;
  const char *mask, *bias;  // at (b, h, 0, 0)
  Scaling units;  // their factor is folded into q when it is transposed, or into products on pairs
  float slope;    // ALiBi's, in units; 0: none
  float sink;     // in units; -inf: none

  Head(const AttentionParams& p, Index b_, Index h_) : problem(p), b(b_), h(h_), units(p) {
    q_begin = p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0;
    k_begin = p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0;
    T = p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - q_begin : p.T;
    S = p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - k_begin : p.S;
    shift = p.align_offset + (p.align_per_batch ? p.align_per_batch[b] : 0);
    if (p.align_bottom_right) shift += S - T;
    left = p.windows ? p.windows[2 * h] : p.window_left;
    right = p.windows ? p.windows[2 * h + 1] : p.window_right;
    const Index h_kv = h / (p.H / p.H_kv);
    q = static_cast<const Element*>(p.q.data) + b * p.q.b + h * p.q.h + q_begin * p.q.t;
    k = static_cast<const Element*>(p.k.data) + b * p.k.b + h_kv * p.k.h + k_begin * p.k.t;
    v = static_cast<const Element*>(p.v.data) + b * p.v.b + h_kv * p.v.h + k_begin * p.v.t;
    mask = at_head(p.mask);
    bias = at_head(p.bias);
    slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride_b + h] * units.natural : 0.0f;
    if (units.template keeps_products<Element>(edits_scores())) units.keep_products();
    sink = p.sinks ? p.sinks[h] : -kInfinity;
    if (sink > -kInfinity) sink = clamp_finite(sink / units.to_natural);
    live_begin = 0, live_end = S;
    if (mask && p.mask.t == 0) {  // key padding: nothing to do for the keys at either end
      while (live_end > 0 && !mask[(live_end - 1) * p.mask.d]) --live_end;
      while (live_begin < live_end && !mask[live_begin * p.mask.d]) ++live_begin;
    }
  }

  const char* at_head(const View& view) const {
    if (!view.data) return nullptr;
    return static_cast<const char*>(view.data) + (b * view.b + h * view.h) * size_of(view.dtype);
  }

  static Index size_of(DType dtype) {
    switch (dtype) {
      case DType::kBool:
        return 1;
      case DType::kFloat32:
        return 4;
      case DType::kFloat64:
        return 8;
      default:
        return 2;
    }
  }

  // The keys that query t may attend to by position: key_begin(t) <= s < key_end(t).
  Index key_begin(Index t) const {
    return left < 0 ? live_begin : min_of(max_of(t + shift - left, live_begin), live_end);
  }
  Index key_end(Index t) const {
    Index last = live_end - 1;
    if (problem.causal) last = min_of(last, t + shift);
    if (right >= 0) last = min_of(last, t + shift + right);
    return max_of(last + 1, live_begin);
  }

  // Whether scores are changed after the products, but by position.
  bool edits_scores() const {
    return problem.softcap > 0.0f || units.after || slope != 0.0f || mask != nullptr ||
           bias != nullptr;
  }
};

// Keys begin .. end - 1 of a row of a block mask's blocks, or all keys.
struct Segment {
  Index begin, end;
  const int32_t* bits = nullptr;  // of one block: [size][words]; null: all keys are attended
  Index words = 0;                // of a row
};

struct Column {
  Index t0, rows;                 // the queries t0 .. t0 + rows - 1; lanes past them are idle
  Index begin, end;               // keys that at least one lane may attend to, by position
  Index inner_begin, inner_end;   // keys that every lane may attend to
  const int32_t* bits = nullptr;  // of a block mask: [rows][words], bit 0 is key block_key; or null
  Index words = 0, block_key = 0;

  template <class Element>
  Column(const Head<Element>& head, Index t, Index n, const Segment& segment) : t0(t), rows(n) {
    begin = max_of(head.key_begin(t0), segment.begin);
    end = min_of(head.key_end(t0 + rows - 1), segment.end);
    inner_begin = head.key_begin(t0 + rows - 1), inner_end = head.key_end(t0);
    if (begin >= end) begin = end = inner_begin = inner_end = 0;
    if (segment.bits) {
      words = segment.words, block_key = segment.begin;
      bits = segment.bits + t0 % (words * 32) * words;
    }
  }
};

// Query positions t' of one vector of lanes.
ATTNFAST_INLINE IVec positions(const Column& column, Index shift, Index lane) {
  return lane_numbers() + static_cast<int32_t>(column.t0 + shift + lane);
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
