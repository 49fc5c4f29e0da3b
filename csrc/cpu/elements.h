// Elements in memory (fp32, bf16, fp16) as fp32 vectors and back, and blocks of them moved and
// transposed.
#pragma once
#include "simd.h"

namespace attnfast::cpu::ATTNFAST_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

ATTNFAST_INLINE float to_float(float x) { return x; }
ATTNFAST_INLINE float to_float(double x) { return static_cast<float>(x); }
ATTNFAST_INLINE float to_float(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
ATTNFAST_INLINE float to_float(Float16 x) {
  // Shift the exponent and mantissa into place and let a multiplication re-bias and normalise them.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits =
      magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

ATTNFAST_INLINE Vec load(const BFloat16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(ATTNFAST_16_LANES)
  // g++ 12 spends five instructions on the conversion below.
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#elif defined(ATTNFAST_SVE)
  return bit_cast<Vec>(UVec(svld1uh_u32(svptrue_b32(), &p->bits)) << 16);
#else
  const HalfBits h = *reinterpret_cast<const HalfBitsUnaligned*>(p);
  return bit_cast<Vec>(__builtin_convertvector(h, UVec) << 16);
#endif
}

ATTNFAST_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && !defined(ATTNFAST_16_LANES)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(ATTNFAST_SVE)
  const svuint32_t h = svld1uh_u32(svptrue_b32(), &p->bits);
  return svcvt_f32_f16_x(svptrue_b32(), svreinterpret_f16_u32(h));
#elif defined(ATTNFAST_NEON)
  return vcvt_f32_f16(bit_cast<float16x4_t>(vld1_u16(&p->bits)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Round to nearest even; NaN stays a (quiet) NaN.
ATTNFAST_INLINE void store(BFloat16* p, Vec x) {
  const UVec bits = bit_cast<UVec>(x);
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UVec quiet = (bits >> 16) | 0x40u;
  const UVec chosen = x == x ? rounded : quiet;
  *reinterpret_cast<HalfBitsUnaligned*>(p) = __builtin_convertvector(chosen, HalfBits);
}

ATTNFAST_INLINE uint16_t to_float16_bits(float x) {
  const uint32_t sign = (bit_cast<uint32_t>(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded bits at the bottom
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

ATTNFAST_INLINE void store(Float16* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && !defined(ATTNFAST_16_LANES)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(ATTNFAST_SVE)
  const svfloat16_t h = svcvt_f16_f32_x(svptrue_b32(), x);
  svst1h_u32(svptrue_b32(), &p->bits, svreinterpret_u32_f16(h));
#elif defined(ATTNFAST_NEON)
  vst1_u16(&p->bits, bit_cast<uint16x4_t>(vcvt_f16_f32(x)));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = to_float16_bits(x[i]);
#endif
}

template <class Element>
ATTNFAST_INLINE Vec load_some(const Element* p, Index n) {
  if (n == kLanes) return load(p);
  Element buffer[kLanes] = {};
  memcpy(buffer, p, n * sizeof(Element));
  return load(buffer);
}

template <class Element>
ATTNFAST_INLINE void store_some(Element* p, Vec x, Index n) {
  if (n == kLanes) return store(p, x);
  Element buffer[kLanes];
  store(buffer, x);
  memcpy(p, buffer, n * sizeof(Element));
}

// to[d * ld + lane] = factor * from[lane * stride + d] for `rows` lanes of a column; zero in the
// rest.
template <class Element>
inline void transpose_in(const Element* from, Index stride, Index rows, Index D, float factor,
                         float* to) {
  const Vec scale = broadcast(factor);
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Index live = min_of(max_of(rows - lane, 0), kLanes);
    const Element* base = from + lane * stride;
    Index d = 0;
    for (; d + kLanes <= D; d += kLanes) {
      Vec r[kLanes];
      if (live == kLanes) {
        ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) r[i] = load(base + i * stride + d) * scale;
      } else {
        ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) {
          r[i] = i < live ? load(base + i * stride + d) * scale : zeros();
        }
      }
      transpose_tile(r);
      ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) store(to + (d + i) * kColumn + lane, r[i]);
    }
    for (; d < D; ++d) {
      for (Index i = 0; i < kLanes; ++i) {
        to[d * kColumn + lane + i] = i < live ? to_float(base[i * stride + d]) * factor : 0.0f;
      }
    }
  }
}

// to[lane * stride + d] = factor[lane] * from[d][lane] for `rows` lanes of a column.
template <class Element>
inline void transpose_out(const float* from, Index rows, Index D, const float* factor, Element* to,
                          Index stride) {
  for (Index lane = 0; lane < rows; lane += kLanes) {
    const Index live = min_of(rows - lane, kLanes);
    const Vec scale = load(factor + lane);
    Element* base = to + lane * stride;
    Index d = 0;
    for (; d < D; d += kLanes) {
      const Index width = min_of(D - d, kLanes);
      Vec r[kLanes];
      ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) {
        r[i] = i < width ? load(from + (d + i) * kColumn + lane) * scale : zeros();
      }
      transpose_tile(r);
      if (width == kLanes && live == kLanes) {
        ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) store(base + i * stride + d, r[i]);
      } else {
        ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) {
          if (i < live) store_some(base + i * stride + d, r[i], width);
        }
      }
    }
  }
}

// Copies rows to fp32, zero-padded from D to `padded` columns.
template <class Element>
inline void pack_rows(const Element* from, Index stride, Index rows, Index D, Index padded,
                      float factor, float* to) {
  const Vec scale = broadcast(factor);
  for (Index i = 0; i < rows; ++i) {
    const Element* row = from + i * stride;
    float* out = to + i * padded;
    Index d = 0;
    for (; d + kLanes <= D; d += kLanes) store(out + d, load(row + d) * scale);
    if (d < D) {
      float tail[kLanes];
      store(tail, load_some(row + d, D - d) * scale);
      for (; d < padded; ++d) out[d] = tail[d % kLanes];
    }
  }
}

// to[d] = factor * from[d], of which D rounded up to whole vectors are read.
template <class Element>
inline void copy_row(const float* from, Index D, float factor, Element* to) {
  Index d = 0;
  for (; d + kLanes <= D; d += kLanes) store(to + d, load(from + d) * factor);
  if (d < D) store_some(to + d, load(from + d) * factor, D - d);
}

// Calls f(Element*) with the element type that `dtype` names.
template <class Function>
inline void with_element(DType dtype, Function f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<Float16*>(nullptr));
  }
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
