// exp2, log2 and tanh of vectors, and Philox: short polynomials fitted for these kernels.
#pragma once
#include "simd.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// 2 ** x for x < 127.5; exactly 0 below -126 and at -inf, exactly 1 at 0; NaN stays NaN.
// Relative error 2e-9 before rounding (minimax, degree 6, on [-0.5, 0.5]).
// With AVX-512 results below 2 ** -126 are subnormal instead of 0.
ATTNFAST_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  const Vec r = _mm512_reduce_ps(x, 0);  // x minus the nearest integer; 0 for an infinite x
  Vec p = r * 1.5345812e-4f + 1.3399931e-3f;
  p = p * r + 9.618489e-3f;
  p = p * r + 5.5503286e-2f;
  p = p * r + 2.4022646e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return _mm512_scalef_ps(p, x - r);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
  const Vec shifted = x + kRound;
  const Vec r = x - (shifted - kRound);
  Vec p = r * 1.5345812e-4f + 1.3399931e-3f;
  p = p * r + 9.618489e-3f;
  p = p * r + 5.5503286e-2f;
  p = p * r + 2.4022646e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  const UVec exponent = (bit_cast<UVec>(shifted) << 23) + (127u << 23);
  p = p * bit_cast<Vec>(exponent);
  return x < -126.0f ? zeros() : p;
#endif
}

// log2 of positive normal numbers; log2(0) = -inf, inf and NaN stay. Relative error of log2(1 + f)
// 4e-9 before rounding (minimax, degree 9, f in [sqrt(1/2) - 1, sqrt(2) - 1]).
ATTNFAST_INLINE Vec log2(Vec x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const UVec bits = bit_cast<UVec>(x);
  const UVec offset = bits - kSqrtHalf;
  const IVec exponent = bit_cast<IVec>(offset) >> 23;
  const Vec f = bit_cast<Vec>((offset & 0x007fffffu) + kSqrtHalf) - 1.0f;
  Vec p = f * -1.0994954e-1f + 1.8617496e-1f;
  p = p * f + -1.9106275e-1f;
  p = p * f + 2.0460062e-1f;
  p = p * f + -2.3961741e-1f;
  p = p * f + 2.8856739e-1f;
  p = p * f + -3.6069664e-1f;
  p = p * f + 4.8089823e-1f;
  p = p * f + -7.2134733e-1f;
  p = p * f + 1.4426950f;
  const Vec y = p * f + __builtin_convertvector(exponent, Vec);
  const Vec special = x == 0.0f ? broadcast(-kInfinity) : x;  // 0, inf, NaN
  return ((x > 0.0f) & (x < kInfinity)) ? y : special;
}

// tanh through expm1(2x): small arguments keep their relative precision.
ATTNFAST_INLINE Vec tanh(Vec x) {
  const Vec limit = broadcast(9.1f);  // tanh(9.1) rounds to 1
  const Vec magnitude = abs(x) > limit ? limit : abs(x);
  constexpr float kRound = 12582912.0f;
  const Vec y = magnitude * 2.0f;
  const Vec shifted = y * kLog2E + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (y - n * 0.693145751953125f) - n * 1.428606765330187e-6f;  // ln 2 in two parts
  Vec p = r * 1.3888873e-3f + 8.3690695e-3f;
  p = p * r + 4.1667137e-2f;
  p = p * r + 1.6666506e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r;  // expm1(r)
  const Vec power = bit_cast<Vec>((bit_cast<UVec>(shifted) << 23) + (127u << 23));
  const Vec expm1 = power * p + (power - 1.0f);
  const Vec t = expm1 / (expm1 + 2.0f);
  const Vec is_nan = x != x ? x : t;
  return bit_cast<Vec>(bit_cast<UVec>(is_nan) | (bit_cast<UVec>(x) & 0x80000000u));
}

// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four words
// per counter and lane. Here the second counter word differs by lane.
ATTNFAST_INLINE void philox(uint32_t c0, UVec c1, uint32_t c2, uint32_t c3, uint64_t key,
                            UVec* words) {
  UVec x0 = UVec{} + c0, x1 = c1, x2 = UVec{} + c2, x3 = UVec{} + c3;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  ATTNFAST_UNROLL for (int round = 0; round < 10; ++round) {
    UVec high0, low0, high2, low2;
    multiply_wide(x0, 0xD2511F53u, &high0, &low0);
    multiply_wide(x2, 0xCD9E8D57u, &high2, &low2);
    x0 = high2 ^ x1 ^ k0;
    x1 = low2;
    x2 = high0 ^ x3 ^ k1;
    x3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = x0, words[1] = x1, words[2] = x2, words[3] = x3;
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
