// Arithmetic as the hardware rounds it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace attnfast::emulator {

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The value of 16 bits: fp16 if kHalf, else bf16.
template <bool kHalf>
inline float widen(uint16_t x) {
  if constexpr (!kHalf) return float_of_bits(static_cast<uint32_t>(x) << 16);
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t magnitude = x & 0x7FFF;
  if (magnitude >= 0x7C00) return float_of_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // 2^112 makes up for the difference of the exponents' biases, and normalises subnormals.
  const float value = float_of_bits(magnitude << 13) * 0x1p112f;
  return float_of_bits(sign | bits_of_float(value));
}

// To nearest, ties to even; overflow is infinite; NaN is the canonical one of cvt.
template <bool kHalf>
inline uint16_t narrow(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7FFF;
  if constexpr (!kHalf) return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  const uint32_t m = bits_of_float(magnitude);
  return sign | static_cast<uint16_t>((m - 0x38000000 + 0xFFF + (m >> 13 & 1)) >> 13);
}

// The float nearest to x on the way to zero.
inline float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  if (std::fabs(static_cast<double>(nearest)) <= std::fabs(x)) return nearest;
  if (std::isinf(nearest) || nearest != nearest) return nearest;
  return float_of_bits(bits_of_float(nearest) - 1);
}

// D += A B. Tensor cores add eight products (on sm_75, four) to the accumulator at a time and drop
// what does not fit, instead of rounding (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of
// NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021).
inline void multiply_accumulate(const float (&A)[16][16], const float (&B)[16][8],
                                float (&D)[16][8], int at_a_time) {
  for (int i = 0; i < 16; ++i) {
    for (int first = 0; first < 16; first += at_a_time) {
      double sum[8];
      for (int j = 0; j < 8; ++j) sum[j] = D[i][j];
      for (int k = first; k < first + at_a_time; ++k) {
        for (int j = 0; j < 8; ++j) sum[j] += static_cast<double>(A[i][k]) * B[k][j];
      }
      for (int j = 0; j < 8; ++j) D[i][j] = toward_zero(sum[j]);
    }
  }
}

// ex2.approx.ftz: subnormal numbers are zero on both sides, and the last bit is not to be relied
// on.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  if (y < 0x1p-126f) return 0.0f;
  return std::isinf(y) ? y : float_of_bits(bits_of_float(y) & ~1u);
}

}  // namespace attnfast::emulator
