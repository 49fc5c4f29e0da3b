// Vectors of floats for one instruction set, from the compiler's vector extensions.
//
// Every attention_*.cpp is compiled once per instruction set with ATTNFAST_ISA set to its name; all
// code then lives in attnfast::cpu::<name>, so that no two sets ever share a symbol. Arithmetic,
// comparisons and `mask ? a : b` are the compiler's own; intrinsics appear only where those fall
// short.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../params.h"

#if !(__clang_major__ >= 14 || __GNUC__ >= 12)
#error "attnfast's CPU kernels need g++ 12 or clang 14, or newer"
#endif
#ifndef ATTNFAST_ISA
#error "compile with -DATTNFAST_ISA=portable|avx2|avx512|avx512_bf16|amx|lanes16|tiles16"
#endif

#define ATTNFAST_INLINE inline __attribute__((always_inline))
#define ATTNFAST_NOINLINE __attribute__((noinline))
#define ATTNFAST_UNROLL _Pragma("GCC unroll 32")

namespace attnfast::cpu::ATTNFAST_ISA {

using Index = int64_t;

#if defined(__AVX512F__) || defined(ATTNFAST_16_LANES)
constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // rows of the register tile: 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 6;
#endif
constexpr int kTileVecs = 2;                 // vectors side by side in the register tile
constexpr int kColumn = kTileVecs * kLanes;  // queries that one column of a block holds

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HalfBitsUnaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

constexpr float kInfinity = __builtin_inff();

ATTNFAST_INLINE Index min_of(Index a, Index b) { return a < b ? a : b; }
ATTNFAST_INLINE Index max_of(Index a, Index b) { return a > b ? a : b; }
ATTNFAST_INLINE Index round_up(Index n, Index multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

ATTNFAST_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
ATTNFAST_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecUnaligned*>(p) = x; }

template <class To, class From>
ATTNFAST_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

ATTNFAST_INLINE Vec broadcast(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__) && !defined(ATTNFAST_16_LANES)
  return _mm256_set1_ps(x);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
#endif
}

ATTNFAST_INLINE Vec zeros() { return Vec{}; }

// Vectors of pairs: two bf16 in the bits of each lane, the even one in the lower half.
#if defined(__AVX512BF16__) || defined(ATTNFAST_EMULATED_TILES)
constexpr bool kHasPairs = true;

ATTNFAST_INLINE Vec high_half(Vec x) { return bit_cast<Vec>(bit_cast<UVec>(x) & 0xffff0000u); }

// acc + a.even * b.even + a.odd * b.odd, the products exact.
ATTNFAST_INLINE Vec multiply_add_pairs(Vec a, Vec b, Vec acc) {
#if defined(ATTNFAST_EMULATED_TILES)
  const Vec a_even = bit_cast<Vec>(bit_cast<UVec>(a) << 16);
  const Vec b_even = bit_cast<Vec>(bit_cast<UVec>(b) << 16);
  return high_half(a) * high_half(b) + (a_even * b_even + acc);
#else
  return _mm512_dpbf16_ps(acc, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
#endif
}

// Two fp32 vectors as pairs, cut to bf16 (exact where the numbers are bf16 already).
ATTNFAST_INLINE Vec pair_of_high_halves(Vec even, Vec odd) {
  return bit_cast<Vec>(bit_cast<UVec>(even) >> 16 | (bit_cast<UVec>(odd) & 0xffff0000u));
}

// Two fp32 vectors as one row of bf16, `first` before `second`, cut likewise.
ATTNFAST_INLINE Vec row_of_high_halves(Vec first, Vec second) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 4)));
  const Halves a = bit_cast<Halves>(first), b = bit_cast<Halves>(second);
  return bit_cast<Vec>(
      __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,  //
                              33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63));
}

#if defined(ATTNFAST_EMULATED_TILES)
ATTNFAST_INLINE Vec rounded_to_bf16(Vec x) {
  const UVec bits = bit_cast<UVec>(x);
  return x == x ? bit_cast<Vec>(bits + 0x7fffu + ((bits >> 16) & 1u)) : x;
}
#endif

// The same, rounded to nearest even.
ATTNFAST_INLINE Vec row_of_bf16(Vec first, Vec second) {
#if defined(ATTNFAST_EMULATED_TILES)
  return row_of_high_halves(rounded_to_bf16(first), rounded_to_bf16(second));
#else
  return bit_cast<Vec>(_mm512_cvtne2ps_pbh(second, first));
#endif
}

ATTNFAST_INLINE Vec pair_of(Vec even, Vec odd) {
#if defined(ATTNFAST_EMULATED_TILES)
  return pair_of_high_halves(rounded_to_bf16(even), rounded_to_bf16(odd));
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
constexpr bool kHasPairs = false;

// Named by templates that are not used.
ATTNFAST_INLINE Vec multiply_add_pairs(Vec, Vec, Vec acc) { return acc; }
Vec high_half(Vec x);
Vec pair_of(Vec even, Vec odd);
Vec pair_of_high_halves(Vec even, Vec odd);
Vec pairs_of_rows(const void* even, const void* odd);
Vec row_of_bf16(Vec first, Vec second);
Vec row_of_high_halves(Vec first, Vec second);
#endif

ATTNFAST_INLINE IVec broadcast_int(int32_t x) { return IVec{} + x; }

ATTNFAST_INLINE IVec lane_numbers() {
  IVec v{};
  ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// The larger of each pair; a NaN in `a` is passed over, one in `b` is kept.
ATTNFAST_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__) && !defined(ATTNFAST_16_LANES)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

ATTNFAST_INLINE Vec abs(Vec x) { return bit_cast<Vec>(bit_cast<UVec>(x) & 0x7fffffffu); }

ATTNFAST_INLINE bool any(IVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__) && !defined(ATTNFAST_16_LANES)
  return _mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask)) == 0;
#else
  int32_t seen = 0;
  for (int i = 0; i < kLanes; ++i) seen |= mask[i];
  return seen != 0;
#endif
}

ATTNFAST_INLINE float sum_lanes(Vec x) {
  float s = 0.0f;
  ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) s += x[i];
  return s;
}

ATTNFAST_INLINE float max_lanes(Vec x) {
  float m = x[0];
  ATTNFAST_UNROLL for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// The full 64-bit products of two vectors of 32-bit words, split in their halves.
ATTNFAST_INLINE void multiply_wide(UVec a, uint32_t b, UVec* high, UVec* low) {
#if defined(__AVX512F__)
  const __m512i x = bit_cast<__m512i>(a), m = _mm512_set1_epi32(static_cast<int32_t>(b));
  const __m512i even = _mm512_mul_epu32(x, m);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), m);
  *high = bit_cast<UVec>(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd));
  *low = bit_cast<UVec>(_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__) && !defined(ATTNFAST_16_LANES)
  const __m256i x = bit_cast<__m256i>(a), m = _mm256_set1_epi32(static_cast<int32_t>(b));
  const __m256i even = _mm256_mul_epu32(x, m);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m);
  *high = bit_cast<UVec>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
  *low = bit_cast<UVec>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Transposes the kLanes x kLanes tile whose rows are r[0], r[1], ...
template <int... I>
ATTNFAST_INLINE Vec shuffle(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, I...);
}

ATTNFAST_INLINE void transpose_tile(Vec* r) {
  Vec t[kLanes];
#if defined(__AVX512F__) || defined(ATTNFAST_16_LANES)
  ATTNFAST_UNROLL for (int i = 0; i < 8; ++i) {
    t[2 * i] =
        shuffle<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] =
        shuffle<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(r[2 * i], r[2 * i + 1]);
  }
  ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
    ATTNFAST_UNROLL for (int j = 0; j < 2; ++j) {
      const Vec a = t[4 * i + j], b = t[4 * i + 2 + j];
      r[4 * i + 2 * j] = shuffle<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b);
      r[4 * i + 2 * j + 1] =
          shuffle<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
    }
  }
  ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
    ATTNFAST_UNROLL for (int half = 0; half < 16; half += 8) {
      const Vec a = r[half + i], b = r[half + 4 + i];
      t[half + i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(a, b);
      t[half + 4 + i] = shuffle<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(a, b);
    }
  }
  ATTNFAST_UNROLL for (int i = 0; i < 8; ++i) {
    r[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(t[i], t[8 + i]);
    r[8 + i] = shuffle<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(t[i], t[8 + i]);
  }
#elif defined(__AVX2__)
  ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
    t[2 * i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(r[2 * i], r[2 * i + 1]);
  }
  ATTNFAST_UNROLL for (int i = 0; i < 2; ++i) {
    ATTNFAST_UNROLL for (int j = 0; j < 2; ++j) {
      const Vec a = t[4 * i + j], b = t[4 * i + 2 + j];
      r[4 * i + 2 * j] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(a, b);
      r[4 * i + 2 * j + 1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(a, b);
    }
  }
  ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(r[i], r[4 + i]);
    t[4 + i] = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(r[i], r[4 + i]);
  }
  ATTNFAST_UNROLL for (int i = 0; i < 8; ++i) r[i] = t[i];
#else
  t[0] = shuffle<0, 4, 1, 5>(r[0], r[1]);
  t[1] = shuffle<2, 6, 3, 7>(r[0], r[1]);
  t[2] = shuffle<0, 4, 1, 5>(r[2], r[3]);
  t[3] = shuffle<2, 6, 3, 7>(r[2], r[3]);
  r[0] = shuffle<0, 1, 4, 5>(t[0], t[2]);
  r[1] = shuffle<2, 3, 6, 7>(t[0], t[2]);
  r[2] = shuffle<0, 1, 4, 5>(t[1], t[3]);
  r[3] = shuffle<2, 3, 6, 7>(t[1], t[3]);
#endif
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
