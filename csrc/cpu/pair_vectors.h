// Vectors of pairs: two bf16 in the bits of each lane, the even one in the lower half.
#pragma once
#include "simd.h"

namespace attnfast::cpu::ATTNFAST_ISA {

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || \
    defined(ATTNFAST_EMULATED_TILES)
constexpr bool kHasPairs = true;
// Intel's processors with AMX multiply pairs at less than half the rate of fp32 (vdpbf16ps: 13.7
// products a cycle, vfmadd: 30).
#if defined(__AMX_BF16__) || defined(ATTNFAST_EMULATED_TILES)
constexpr bool kFastPairs = false;
#else
constexpr bool kFastPairs = true;
#endif

ATTNFAST_INLINE Vec high_half(Vec x) { return bit_cast<Vec>(bit_cast<UVec>(x) & 0xffff0000u); }

// acc + a.even * b.even + a.odd * b.odd, the products exact.
ATTNFAST_INLINE Vec multiply_add_pairs(Vec a, Vec b, Vec acc) {
#if defined(ATTNFAST_EMULATED_TILES)
  const Vec a_even = bit_cast<Vec>(bit_cast<UVec>(a) << 16);
  const Vec b_even = bit_cast<Vec>(bit_cast<UVec>(b) << 16);
  return high_half(a) * high_half(b) + (a_even * b_even + acc);
#elif defined(ATTNFAST_SVE)
  return svbfdot_f32(acc, svreinterpret_bf16_f32(a), svreinterpret_bf16_f32(b));
#elif defined(ATTNFAST_NEON)
  return vbfdotq_f32(acc, bit_cast<bfloat16x8_t>(a), bit_cast<bfloat16x8_t>(b));
#else
  return _mm512_dpbf16_ps(acc, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
#endif
}

// Two fp32 vectors as pairs, cut to bf16 (exact where the numbers are bf16 already).
ATTNFAST_INLINE Vec pair_of_high_halves(Vec even, Vec odd) {
  return bit_cast<Vec>(bit_cast<UVec>(even) >> 16 | (bit_cast<UVec>(odd) & 0xffff0000u));
}

#if ATTNFAST_LANES == 16
// Two fp32 vectors as one row of bf16, `first` before `second`, cut likewise.
ATTNFAST_INLINE Vec row_of_high_halves(Vec first, Vec second) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 4)));
  const Halves a = bit_cast<Halves>(first), b = bit_cast<Halves>(second);
  return bit_cast<Vec>(
      __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,  //
                              33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63));
}
#else
Vec row_of_high_halves(Vec first, Vec second);  // of planes, which only tiles have
#endif

#if defined(ATTNFAST_EMULATED_TILES)
ATTNFAST_INLINE Vec rounded_to_bf16(Vec x) {
  const UVec bits = bit_cast<UVec>(x);
  return x == x ? bit_cast<Vec>(bits + 0x7fffu + ((bits >> 16) & 1u)) : x;
}
#endif

// Two fp32 vectors as one row of bf16, rounded to nearest even.
ATTNFAST_INLINE Vec row_of_bf16(Vec first, Vec second) {
#if defined(ATTNFAST_EMULATED_TILES)
  return row_of_high_halves(rounded_to_bf16(first), rounded_to_bf16(second));
#elif defined(ATTNFAST_SVE)
  return svreinterpret_f32_bf16(
      svuzp1_bf16(svcvt_bf16_f32_x(svptrue_b32(), first), svcvt_bf16_f32_x(svptrue_b32(), second)));
#elif defined(ATTNFAST_NEON)
  return bit_cast<Vec>(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(first), second));
#else
  return bit_cast<Vec>(_mm512_cvtne2ps_pbh(second, first));
#endif
}

// Likewise as pairs.
ATTNFAST_INLINE Vec pair_of(Vec even, Vec odd) {
#if defined(ATTNFAST_EMULATED_TILES)
  return pair_of_high_halves(rounded_to_bf16(even), rounded_to_bf16(odd));
#elif defined(ATTNFAST_SVE)
  const svbfloat16_t low = svcvt_bf16_f32_x(svptrue_b32(), even);
  return svreinterpret_f32_bf16(svcvtnt_bf16_f32_x(low, svptrue_b32(), odd));
#elif defined(ATTNFAST_NEON)
  const uint16x8_t low = bit_cast<uint16x8_t>(vcvtq_low_bf16_f32(even));
  return bit_cast<Vec>(vzip1q_u16(low, bit_cast<uint16x8_t>(vcvtq_low_bf16_f32(odd))));
#else
  const __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  const __m512i interleaved =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return bit_cast<Vec>(_mm512_permutexvar_epi16(interleaved, halves));
#endif
}

// The pairs of two rows of bf16, of the first the even ones.
ATTNFAST_INLINE Vec pairs_of_rows(const void* even, const void* odd) {
#if defined(ATTNFAST_EMULATED_TILES)
  const UVec low = __builtin_convertvector(*static_cast<const HalfBitsUnaligned*>(even), UVec);
  const UVec high = __builtin_convertvector(*static_cast<const HalfBitsUnaligned*>(odd), UVec);
  return bit_cast<Vec>(low | high << 16);
#elif defined(ATTNFAST_SVE)
  const UVec low = svld1uh_u32(svptrue_b32(), static_cast<const uint16_t*>(even));
  const UVec high = svld1uh_u32(svptrue_b32(), static_cast<const uint16_t*>(odd));
  return bit_cast<Vec>(low | high << 16);
#elif defined(ATTNFAST_NEON)
  const uint16x4_t low = vld1_u16(static_cast<const uint16_t*>(even));
  const uint16x4_t high = vld1_u16(static_cast<const uint16_t*>(odd));
  return bit_cast<Vec>(vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high)));
#else
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i rows = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(even))),
      _mm256_loadu_si256(static_cast<const __m256i*>(odd)), 1);
  return bit_cast<Vec>(_mm512_permutexvar_epi16(interleave, rows));
#endif
}
#else
constexpr bool kHasPairs = false, kFastPairs = false;

// Named by templates that are not used.
ATTNFAST_INLINE Vec multiply_add_pairs(Vec, Vec, Vec acc) { return acc; }
Vec high_half(Vec x);
Vec pair_of(Vec even, Vec odd);
Vec pair_of_high_halves(Vec even, Vec odd);
Vec pairs_of_rows(const void* even, const void* odd);
Vec row_of_bf16(Vec first, Vec second);
Vec row_of_high_halves(Vec first, Vec second);
#endif

}  // namespace attnfast::cpu::ATTNFAST_ISA
