// Vectors of floats for one instruction set, from the compiler's vector extensions.
//
// Every attention_*.cpp is compiled once per instruction set with ATTNFAST_ISA set to its name; all
// code then lives in attnfast::cpu::<name>, so that no two sets ever share a symbol. Arithmetic,
// comparisons and `mask ? a : b` are the compiler's own; intrinsics appear only where those fall
// short.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_SVE)
#include <arm_sve.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../params.h"

#if !(__clang_major__ >= 14 || __GNUC__ >= 12)
#error "attnfast's CPU kernels need g++ 12 or clang 14, or newer"
#endif
#ifndef ATTNFAST_ISA
#error "compile with -DATTNFAST_ISA=portable|avx2|avx512|avx512_bf16|amx|neon|neon_bf16|..."
#endif

#define ATTNFAST_INLINE inline __attribute__((always_inline))
#define ATTNFAST_NOINLINE __attribute__((noinline))
#define ATTNFAST_UNROLL _Pragma("GCC unroll 32")

namespace attnfast::cpu::ATTNFAST_ISA {

using Index = int64_t;

#if defined(__AVX512F__) || defined(ATTNFAST_16_LANES)
#define ATTNFAST_LANES 16
constexpr int kTileRows = 12;  // rows of the register tile: 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
#define ATTNFAST_LANES 8
constexpr int kTileRows = 6;  // 6 x 2 accumulators of 16 registers
#elif defined(__ARM_FEATURE_SVE)
static_assert(__ARM_FEATURE_SVE_BITS == 256, "compile with -msve-vector-bits=256");
#define ATTNFAST_SVE
#define ATTNFAST_LANES 8
constexpr int kTileRows = 10;  // as NEON's
#elif defined(__aarch64__)
#define ATTNFAST_NEON
#define ATTNFAST_LANES 4
constexpr int kTileRows = 10;  // 10 x 2 of 32: with more, g++ 12 spills
#else
#define ATTNFAST_LANES 4
constexpr int kTileRows = 6;
#endif
constexpr int kLanes = ATTNFAST_LANES;
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
#elif defined(ATTNFAST_SVE)
  return svdup_n_f32(x);
#elif defined(ATTNFAST_NEON)
  return vdupq_n_f32(x);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
#endif
}

ATTNFAST_INLINE Vec zeros() { return Vec{}; }

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
#elif defined(ATTNFAST_NEON)
  return vmaxvq_u32(bit_cast<uint32x4_t>(mask)) != 0;
#else
  int32_t seen = 0;
  for (int i = 0; i < kLanes; ++i) seen |= mask[i];
  return seen != 0;
#endif
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
#elif defined(ATTNFAST_NEON)
  const uint32x4_t x = bit_cast<uint32x4_t>(a);
  const uint32x4_t first = bit_cast<uint32x4_t>(vmull_n_u32(vget_low_u32(x), b));
  const uint32x4_t second = bit_cast<uint32x4_t>(vmull_high_n_u32(x, b));
  *high = bit_cast<UVec>(vuzp2q_u32(first, second));
  *low = bit_cast<UVec>(vuzp1q_u32(first, second));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
#endif
}

template <int... I>
ATTNFAST_INLINE Vec shuffle(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, I...);
}

// Joins all lanes by halves, so that each step waits for log2(kLanes) others and not for kLanes.
template <int kStep, class Join, int... I>
ATTNFAST_INLINE Vec join_lanes(Vec x, Join join, std::integer_sequence<int, I...> lanes) {
  x = join(x, shuffle<(I ^ kStep)...>(x, x));
  if constexpr (kStep > 1) {
    return join_lanes<kStep / 2>(x, join, lanes);
  } else {
    return x;
  }
}

ATTNFAST_INLINE float sum_lanes(Vec x) {
  return join_lanes<kLanes / 2>(
      x, [](Vec a, Vec b) { return a + b; }, std::make_integer_sequence<int, kLanes>())[0];
}

// The largest of numbers, none of them NaN.
ATTNFAST_INLINE float max_lanes(Vec x) {
  return join_lanes<kLanes / 2>(
      x, [](Vec a, Vec b) { return max(a, b); }, std::make_integer_sequence<int, kLanes>())[0];
}

// Transposes the kLanes x kLanes tile whose rows are r[0], r[1], ...
ATTNFAST_INLINE void transpose_tile(Vec* r) {
  Vec t[kLanes];
#if ATTNFAST_LANES == 16
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
#elif ATTNFAST_LANES == 8
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
