// Tiles of scores in registers, and every option applied to them: the one place where positions,
// ALiBi and softcap live, and with masks.h masks and biases (but for decoding, attention_decode.cu).
//
// A warp's tile is [kM][kN][4]: 16 * kM queries by 8 * kN keys, or kTransposed, 16 * kM keys by 8 *
// kN queries (tile.h says which lane holds what). Scores are in the Units of arguments.h.
#pragma once
#include "arguments.h"
#include "head.h"
#include "masks.h"
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

  // Products q k^T to scores, -inf where a query may not attend. `edge`: some of the tile's keys
  // are out of reach of some of its queries. `dcapped`, unless null, takes d capped / d uncapped,
  // which is 1 without a softcap. Returns whether a mask or a bias leaves some key out.
  template <bool kTransposed, int kM, int kN>
  ATTNFAST_DEVICE bool apply(float (&s)[kM][kN][4], const Head& head, int t0, int s0, int lane,
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
    if (dcapped || units.factor != 1.0f) {
      each([&](float x, Position, float* derivative) {
        if (derivative) *derivative = 1.0f;
        return x * units.factor;
      });
    }
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
    bool leaves_out = false;
    if (bias.data) {
      with_number(bias.dtype, [&](auto number) {
        const Biasing<decltype(number)> biasing{units.natural};
        leaves_out |= join<kTransposed>(s, biasing, bias, bias_at, head, t0, s0, lane);
      });
    }
    if (mask.data) {
      leaves_out |= join<kTransposed>(s, Masking(), mask, mask_at, head, t0, s0, lane);
    }
    if (edge) mask_positions<kTransposed>(s, head, t0, s0, lane);
    return leaves_out;
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

// The tiles of keys of which crosses_edge is false for these queries, by their first keys.
struct InnerKeys {
  int begin, end;

  ATTNFAST_DEVICE InnerKeys(const Head& head, int t0, int queries, int keys)
      : begin(0), end(head.S - keys + 1) {
    if (head.low != INT32_MIN) begin = saturate(int64_t{t0} + queries - 1 + head.low);
    if (head.high != INT32_MAX) {
      end = saturate(min_of<int64_t>(end, int64_t{t0} + head.high - keys + 2));
    }
  }
  ATTNFAST_DEVICE bool has(int s0) const { return s0 >= begin && s0 < end; }
};

// The tiles of queries of which crosses_edge is false for these keys, by their first queries.
struct InnerQueries {
  int begin, end;

  ATTNFAST_DEVICE InnerQueries(const Head& head, int s0, int keys, int queries)
      : begin(INT32_MIN), end(INT32_MAX) {
    if (head.high != INT32_MAX) begin = saturate(int64_t{s0} + keys - 1 - head.high);
    if (head.low != INT32_MIN) end = saturate(int64_t{s0} - head.low - queries + 2);
    if (s0 + keys > head.S) end = INT32_MIN;
  }
  ATTNFAST_DEVICE bool has(int t0) const { return t0 >= begin && t0 < end; }
};

// Bits of the lane's columns, as drop_dead_rows takes them: set where some row of the warp's tile
// has a score, that is where a key is attended to; kTransposed, where a query attends.
template <int kM, int kN>
ATTNFAST_DEVICE uint32_t live_columns(const float (&s)[kM][kN][4]) {
  static_assert(kN <= 16);
  uint32_t live = kN < 16 ? ~0u << 2 * kN % 32 : 0;  // of no column
  ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
    ATTNFAST_UNROLL for (int e = 0; e < 2; ++e) {
      bool some = false;
      ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
        some |= s[m][n][e] != -kInfinity || s[m][n][e + 2] != -kInfinity;
      }
      if (some) live |= 1u << (n * 2 + e);
    }
  }
  ATTNFAST_UNROLL for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
    live |= shuffle_xor(live, lanes);
  }
  return live;
}

}  // namespace attnfast::cuda
