// Tiles of scores in registers, and every option applied to them: the one place where positions,
// masks, bias, ALiBi and softcap live (but for decoding, attention_decode.cu).
//
// A warp's tile is [kM][kN][4]: 16 * kM queries by 8 * kN keys, or kTransposed, 16 * kM keys by 8 *
// kN queries (tile.h says which lane holds what). Scores are in the Units of arguments.h.
#pragma once
#include "arguments.h"
#include "head.h"
#include "prims/prims.h"

namespace attnfast::cuda {

// Which query and which key an element belongs to.
struct Position {
  int t, key;
};

// Of element e of block (m, n) of a warp's tile that begins at (t0, s0).
template <bool kTransposed>
ATTNFAST_DEVICE Position position_of(int t0, int s0, int m, int n, int e, int lane) {
  const int row = m * 16 + e / 2 * 8 + lane / 4, column = n * 8 + lane % 4 * 2 + e % 2;
  return kTransposed ? Position{t0 + column, s0 + row} : Position{t0 + row, s0 + column};
}

// Finite where x is.
ATTNFAST_DEVICE float narrowed(double x) {
  const auto y = static_cast<float>(x);
  if (fabsf(y) != kInfinity || fabs(x) == static_cast<double>(kInfinity)) return y;
  return y > 0.0f ? kLargest : -kLargest;
}

// An element of a mask or a bias; of a mask, 0 where true and -inf where false.
ATTNFAST_DEVICE float load_addend(const View& x, int64_t element) {
  switch (x.dtype) {
    case DType::kBool:
      return load_global(static_cast<const uint8_t*>(x.data) + element) ? 0.0f : -kInfinity;
    case DType::kFloat32:
      return load_global(static_cast<const float*>(x.data) + element);
    case DType::kBFloat16:
      return to_float(load_global(static_cast<const BFloat16*>(x.data) + element));
    case DType::kFloat16:
      return to_float(load_global(static_cast<const Float16*>(x.data) + element));
    default:
      return narrowed(load_global(static_cast<const double*>(x.data) + element));
  }
}

// The options that change scores, as one head sees them.
struct ScoreEdits {
  View mask, bias;  // at (b, h, 0, 0)
  Scaling units;
  float slope;  // ALiBi's, in units; 0: none

  template <class Arguments>
  ATTNFAST_DEVICE ScoreEdits(const Arguments& a, const Head& head)
      : mask(a.p.mask), bias(a.p.bias), units(a.units), slope(0.0f) {
    if (a.p.alibi_slopes) {
      slope = units.natural * load_global(a.p.alibi_slopes + head.b * a.p.alibi_stride_b + head.h);
    }
    mask_at = head.b * mask.b + head.h * mask.h;
    bias_at = head.b * bias.b + head.h * bias.h;
  }

  // Whether keys may be left out that positions allow.
  ATTNFAST_DEVICE bool drops_keys() const { return mask.data || bias.data; }

  // Products q k^T to scores, -inf where a query may not attend. `edge`: some of the tile's keys
  // are out of reach of some of its queries. `dcapped`, unless null, takes d capped / d uncapped,
  // which is 1 without a softcap.
  template <bool kTransposed, int kM, int kN>
  ATTNFAST_DEVICE void apply(float (&s)[kM][kN][4], const Head& head, int t0, int s0, int lane,
                             bool edge, float (*dcapped)[kN][4] = nullptr) const {
    const auto each = [&](auto f) {
      ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
        ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
          ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
            s[m][n][e] = f(s[m][n][e], position_of<kTransposed>(t0, s0, m, n, e, lane),
                           dcapped ? &dcapped[m][n][e] : nullptr);
          }
        }
      }
    };
    each([&](float x, Position, float* derivative) {
      if (derivative) *derivative = 1.0f;
      return x * units.factor;
    });
    if (units.softcap > 0.0f) {
      each([&](float x, Position, float* derivative) {
        const float tanh_x = tanhf(x * units.uncap);
        if (derivative) *derivative = 1.0f - tanh_x * tanh_x;
        return units.softcap * tanh_x;
      });
    }
    if (slope != 0.0f) {
      each([&](float x, Position at, float*) {
        return x - slope * fabsf(static_cast<float>(at.key - at.t - head.shift));
      });
    }
    if (bias.data) {
      each([&](float x, Position at, float*) {
        if (at.t >= head.T || at.key >= head.S) return -kInfinity;
        const float addend = load_addend(bias, bias_at + at.t * bias.t + at.key * bias.d);
        return addend == -kInfinity ? addend : fmaf(addend, units.natural, x);
      });
    }
    if (mask.data) {
      each([&](float x, Position at, float*) {
        if (at.t >= head.T || at.key >= head.S) return -kInfinity;
        const float addend = load_addend(mask, mask_at + at.t * mask.t + at.key * mask.d);
        return addend == -kInfinity ? addend : x;
      });
    }
    if (edge) mask_positions<kTransposed>(s, head, t0, s0, lane);
  }

  // `value` where positions do not allow a query its key.
  template <bool kTransposed, int kM, int kN>
  static ATTNFAST_DEVICE void mask_positions(float (&s)[kM][kN][4], const Head& head, int t0,
                                             int s0, int lane, float value = -kInfinity) {
    ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
      ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
        ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
          const Position at = position_of<kTransposed>(t0, s0, m, n, e, lane);
          if (at.key >= head.S || !head.in_reach(at.t, at.key)) s[m][n][e] = value;
        }
      }
    }
  }

 private:
  int64_t mask_at, bias_at;
};

// Whether some key of a tile is beyond the last or out of reach of some query.
ATTNFAST_DEVICE bool crosses_edge(const Head& head, int t0, int queries, int s0, int keys) {
  return s0 + keys > head.S || !head.in_reach(t0 + queries - 1, s0) ||
         !head.in_reach(t0, s0 + keys - 1);
}

// Bits of the lane's columns, as drop_dead_rows takes them: set where some row of the warp's tile
// has a score, that is where a key is attended to; kTransposed, where a query attends.
template <int kM, int kN>
ATTNFAST_DEVICE uint32_t live_columns(const float (&s)[kM][kN][4]) {
  static_assert(kN <= 16);
  uint32_t live = 0;
  ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
    ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
      ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
        if (s[m][n][e] != -kInfinity) live |= 1u << (n * 2 + e % 2);
      }
    }
  }
  ATTNFAST_UNROLL for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
    live |= shuffle_xor(live, lanes);
  }
  return live;
}

}  // namespace attnfast::cuda
