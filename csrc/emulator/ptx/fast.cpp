#include "fast.h"

#include <cmath>
#include <cstring>

// Neither contracts a product and a sum, so both give the same.
#define ATTNFAST_PTX_CLONES __attribute__((target_clones("arch=haswell", "default")))

namespace attnfast::ptx {

namespace {

constexpr int kColumns = 8;  // at a time

// The floats nearest to x on the way to zero.
inline void toward_zero(const double* x, float* out) {
  for (int n = 0; n < kColumns; ++n) {
    const float nearest = static_cast<float>(x[n]);
    uint32_t bits;
    std::memcpy(&bits, &nearest, 4);
    const bool finite = (bits & 0x7F800000) != 0x7F800000;
    const bool beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(x[n]);
    bits -= finite && beyond ? 1 : 0;
    std::memcpy(&out[n], &bits, 4);
  }
}

}  // namespace

ATTNFAST_PTX_CLONES
void fused_multiply_add(float* d, const float* a, const float* b, const float* c) {
  float out[32];
  for (int l = 0; l < 32; ++l) out[l] = __builtin_fmaf(a[l], b[l], c[l]);
  std::memcpy(d, out, sizeof out);
}

ATTNFAST_PTX_CLONES
void multiply_add(float* d, const float* a, const float* b, int rows, int columns, int K,
                  int at_a_time) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; column += kColumns) {
      float* out = d + row * columns + column;
      if (!at_a_time) {
        float sum[kColumns] = {};
        for (int k = 0; k < K; ++k) {
          const float x = a[row * K + k];
          for (int n = 0; n < kColumns; ++n) sum[n] += x * b[k * columns + column + n];
        }
        for (int n = 0; n < kColumns; ++n) out[n] += sum[n];
        continue;
      }
      for (int first = 0; first < K; first += at_a_time) {
        double sum[kColumns];
        for (int n = 0; n < kColumns; ++n) sum[n] = out[n];
        for (int k = first; k < K && k < first + at_a_time; ++k) {
          const double x = a[row * K + k];
          for (int n = 0; n < kColumns; ++n) {
            sum[n] += x * static_cast<double>(b[k * columns + column + n]);
          }
        }
        toward_zero(sum, out);
      }
    }
  }
}

}  // namespace attnfast::ptx
