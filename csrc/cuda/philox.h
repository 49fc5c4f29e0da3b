// Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, 2011) as docs/math.md section 6 counts it.
#pragma once
#include "kernels.h"
#include "prims/prims.h"

namespace attnfast::cuda {

struct Philox {
  uint32_t key0, key1, stream, offset;
  uint32_t threshold;  // lanes below it are dropped

  ATTNFAST_DEVICE Philox(const Problem& p, const DeviceSeed& seed, int64_t b, int64_t h)
      : key0(0), key1(0), stream(static_cast<uint32_t>(b * p.H + h)), offset(0), threshold(0) {
    if (!(p.dropout_p > 0.0)) return;
    const auto number = static_cast<uint64_t>(load_global(seed.seed));
    key0 = static_cast<uint32_t>(number), key1 = static_cast<uint32_t>(number >> 32);
    offset = static_cast<uint32_t>(load_global(seed.seed + seed.stride));
    threshold = static_cast<uint32_t>(rint(p.dropout_p * 65536.0));
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

}  // namespace attnfast::cuda
