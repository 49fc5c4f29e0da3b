// Which probabilities dropout keeps: Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, 2011) as
// docs/math.md section 6 counts it.
#pragma once
#include "arguments.h"
#include "prims/prims.h"

namespace attnfast::cuda {

struct Philox {
  uint32_t key0, key1, stream, offset;
  uint32_t threshold;  // lanes below it are dropped; 0: none

  ATTNFAST_DEVICE Philox(const AttentionParams& p, const Dropout& dropout, int64_t b, int64_t h)
      : key0(0),
        key1(0),
        stream(static_cast<uint32_t>(b * p.H + h)),
        offset(0),
        threshold(dropout.threshold) {
    if (!threshold) return;
    const DeviceSeed& of = dropout.from;
    const auto number = static_cast<uint64_t>(load_global(of.seed));
    key0 = static_cast<uint32_t>(number), key1 = static_cast<uint32_t>(number >> 32);
    offset = static_cast<uint32_t>(load_global(of.seed + of.stride));
  }

  // The four words of a group of eight keys and a query.
  ATTNFAST_DEVICE void draw(uint32_t group, uint32_t t, uint32_t (&words)[4]) const {
    uint32_t c0 = group, c1 = t, c2 = stream, c3 = offset, k0 = key0, k1 = key1;
    ATTNFAST_UNROLL for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
      const uint32_t high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
  }
};

// words[j] of lane i of every four becomes words[i] of lane j.
ATTNFAST_DEVICE void transpose_in_quads(uint32_t (&words)[4], int lane) {
  ATTNFAST_UNROLL for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
    ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t received = shuffle_xor(upper ? words[i] : words[i | bit], bit);
      if (upper) {
        words[i] = received;
      } else {
        words[i | bit] = received;
      }
    }
  }
}

// Of the eight lanes that share columns, lane / 4 = 0 .. 7, each has the words of one query: out[i]
// becomes word mine / 2 of lane i's.
ATTNFAST_DEVICE void share_down_columns(const uint32_t (&words)[4], uint32_t (&out)[8], int mine) {
  const bool bit2 = mine & 4, bit1 = mine & 2, bit0 = mine & 1;
  uint32_t two[2][2];  // [bit 2 of the lane][bit 0 of the word]
  ATTNFAST_UNROLL for (int w = 0; w < 2; ++w) {
    const uint32_t own = bit2 ? words[2 + w] : words[w];
    const uint32_t other = shuffle_xor(bit2 ? words[w] : words[2 + w], 16);
    two[0][w] = bit2 ? other : own, two[1][w] = bit2 ? own : other;
  }
  ATTNFAST_UNROLL for (int i = 0; i < 2; ++i) {
    const uint32_t own = bit1 ? two[i][1] : two[i][0];
    const uint32_t other = shuffle_xor(bit1 ? two[i][0] : two[i][1], 8);
    const uint32_t four[2] = {bit1 ? other : own, bit1 ? own : other};
    ATTNFAST_UNROLL for (int j = 0; j < 2; ++j) {
      const uint32_t last = shuffle_xor(four[j], 4);
      out[i * 4 + j * 2] = bit0 ? last : four[j];
      out[i * 4 + j * 2 + 1] = bit0 ? four[j] : last;
    }
  }
}

// Bits 4 n + e of kept[m]: whether dropout keeps an element's probability. One draw serves eight
// keys of a query, so lanes draw for each other: the four that share rows, each for one of four
// groups of eight keys; transposed, the eight that share columns, each for one of eight queries.
template <bool kTransposed, int kM, int kN>
ATTNFAST_DEVICE void kept_by_dropout(uint32_t (&kept)[kM], const Philox& philox, int t0, int s0,
                                     int lane) {
  static_assert(kN <= 8);
  ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
    kept[m] = 0;
    ATTNFAST_UNROLL for (int half = 0; half < 2; ++half) {
      ATTNFAST_UNROLL for (int n = 0; n < kN; n += 4) {
        uint32_t words[4];
        if constexpr (kTransposed) {
          const int group = s0 / 8 + m * 2 + half, mine = lane / 4;
          const int t = t0 + (n + mine / 2) * 8 + lane % 4 * 2 + mine % 2;
          philox.draw(static_cast<uint32_t>(group), static_cast<uint32_t>(t), words);
          uint32_t queries[8];
          share_down_columns(words, queries, mine);  // word mine / 2 of all eight
          ATTNFAST_UNROLL for (int i = 0; i < 8; ++i) {
            const uint32_t drawn = mine % 2 ? queries[i] >> 16 : queries[i] & 0xFFFF;
            if (n + i / 2 >= kN) break;
            if (drawn >= philox.threshold) kept[m] |= 1u << ((n + i / 2) * 4 + half * 2 + i % 2);
          }
        } else {
          const int group = s0 / 8 + n + lane % 4, t = t0 + m * 16 + half * 8 + lane / 4;
          philox.draw(static_cast<uint32_t>(group), static_cast<uint32_t>(t), words);
          transpose_in_quads(words, lane);  // word lane % 4 of groups n .. n + 3
          ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
            if (n + i >= kN) break;
            const int bit = (n + i) * 4 + half * 2;
            if ((words[i] & 0xFFFF) >= philox.threshold) kept[m] |= 1u << bit;
            if (words[i] >> 16 >= philox.threshold) kept[m] |= 2u << bit;
          }
        }
      }
    }
  }
}

}  // namespace attnfast::cuda
