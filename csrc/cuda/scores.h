// Tiles of scores in registers, and every option applied to them: the one place where positions,
// masks, bias, ALiBi, softcap and dropout live.
//
// A tile is [kM][kN][4], 16 * kM queries by 8 * kN keys per warp (tile.h says which lane holds
// what). Scores are in units of log2; with a bias in natural units, since log2 e times a huge
// negative bias would overflow.
#pragma once
#include "head.h"
#include "philox.h"
#include "prims/prims.h"
#include "tile.h"

namespace attnfast::cuda {

// Query and key of element e of block (m, n) of a warp's tile that begins at (t0, s0).
ATTNFAST_DEVICE int query_of(int t0, int m, int e, int lane) {
  return t0 + m * 16 + e / 2 * 8 + lane / 4;
}
ATTNFAST_DEVICE int key_of(int s0, int n, int e, int lane) {
  return s0 + n * 8 + lane % 4 * 2 + e % 2;
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
      return static_cast<float>(load_global(static_cast<const double*>(x.data) + element));
  }
}

// The options that change scores, as one head sees them.
struct ScoreOptions {
  View mask, bias;  // at (b, h, 0, 0)
  float unit;       // 1 or log2 e: what natural scores are multiplied with
  float factor;     // what raw products are multiplied with first
  float softcap;    // in units; 0: none
  float slope;      // ALiBi's, in units; 0: none

  ATTNFAST_DEVICE ScoreOptions(const Problem& p, const Head& head) : mask(p.mask), bias(p.bias) {
    unit = p.bias.data ? 1.0f : kLog2E;
    factor = p.softcap > 0.0f ? p.scale / p.softcap : p.scale * unit;
    softcap = p.softcap * unit;
    slope = 0.0f;
    if (p.alibi_slopes) {
      slope = unit * load_global(p.alibi_slopes + head.b * p.alibi_stride_b + head.h);
    }
    mask_at = head.b * mask.b + head.h * mask.h;
    bias_at = head.b * bias.b + head.h * bias.h;
  }

  ATTNFAST_DEVICE float to_log2() const { return bias.data ? kLog2E : 1.0f; }
  ATTNFAST_DEVICE float to_natural() const { return bias.data ? 1.0f : kLn2; }
  // Whether keys may be left out that positions allow.
  ATTNFAST_DEVICE bool drops_keys() const { return mask.data || bias.data; }

  // Products q k^T to scores, -inf where a query may not attend. `edge`: some of the tile's keys
  // are out of reach of some of its queries.
  template <int kM, int kN>
  ATTNFAST_DEVICE void apply(float (&s)[kM][kN][4], const Head& head, int t0, int s0, int lane,
                             bool edge) const {
    const auto each = [&](auto f) {
      ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
        ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
          ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
            s[m][n][e] = f(s[m][n][e], query_of(t0, m, e, lane), key_of(s0, n, e, lane));
          }
        }
      }
    };
    each([&](float x, int, int) { return x * factor; });
    if (softcap > 0.0f) {
      each([&](float x, int, int) { return softcap * tanhf(x); });
    }
    if (slope != 0.0f) {
      each([&](float x, int t, int key) {
        return x - slope * fabsf(static_cast<float>(key - t - head.shift));
      });
    }
    if (bias.data) {
      each([&](float x, int t, int key) {
        if (t >= head.T || key >= head.S) return -kInfinity;
        const float addend = load_addend(bias, bias_at + t * bias.t + key * bias.d);
        return addend == -kInfinity ? addend : x + addend;
      });
    }
    if (mask.data) {
      each([&](float x, int t, int key) {
        if (t >= head.T || key >= head.S) return -kInfinity;
        const float addend = load_addend(mask, mask_at + t * mask.t + key * mask.d);
        return addend == -kInfinity ? addend : x;
      });
    }
    if (edge) mask_positions(s, head, t0, s0, lane);
  }

  // -inf where positions do not allow a query its key.
  template <int kM, int kN>
  static ATTNFAST_DEVICE void mask_positions(float (&s)[kM][kN][4], const Head& head, int t0,
                                             int s0, int lane) {
    ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
      ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
        ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
          const int t = query_of(t0, m, e, lane), key = key_of(s0, n, e, lane);
          if (key >= head.S || !head.in_reach(t, key)) s[m][n][e] = -kInfinity;
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

// Bits of the lane's columns, as drop_dead_rows takes them: set where some query of the warp's tile
// attends to the key.
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

// Zeroes the probabilities that dropout drops. Lanes of a quad share rows and hold different
// columns: each draws for one of four groups of eight keys, and they exchange the words.
template <int kM, int kN>
ATTNFAST_DEVICE void drop_probabilities(float (&p)[kM][kN][4], const Philox& philox, int t0, int s0,
                                        int lane) {
  static_assert(kN % 4 == 0);
  ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
    ATTNFAST_UNROLL for (int half = 0; half < 2; ++half) {
      const int t = query_of(t0, m, half * 2, lane);
      ATTNFAST_UNROLL for (int n = 0; n < kN; n += 4) {
        uint32_t words[4];
        philox.draw(static_cast<uint32_t>(s0 / 8 + n + lane % 4), static_cast<uint32_t>(t), words);
        transpose_in_quads(words, lane);  // word lane % 4 of groups n .. n + 3
        ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
          float (&pair)[4] = p[m][n + i];
          if ((words[i] & 0xFFFF) < philox.threshold) pair[half * 2] = 0.0f;
          if (words[i] >> 16 < philox.threshold) pair[half * 2 + 1] = 0.0f;
        }
      }
    }
  }
}

}  // namespace attnfast::cuda
