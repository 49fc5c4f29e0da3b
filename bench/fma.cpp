// The CPU's peak: multiply-adds on registers alone, all threads at once. `ceilings.py` compiles it
// with -march=native and calls it.
#include <algorithm>
#include <chrono>
#include <cstdint>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kChains = 10;  // hide the latency of four cycles on two units, and fit 16 registers

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

double fp32_flop(int64_t steps, float* sink) {
  Vector sums[kChains] = {}, a, b;
  for (int lane = 0; lane < kLanes; ++lane) a[lane] = 0.999f, b[lane] = 1e-3f;
  for (int64_t i = 0; i < steps; ++i)
    for (int c = 0; c < kChains; ++c) {
      sums[c] = sums[c] * a + b;
      asm volatile("" : "+x"(sums[c]));  // one instruction each, never folded
    }
  for (int c = 0; c < kChains; ++c) *sink += sums[c][0];
  return 2.0 * kLanes * kChains * static_cast<double>(steps);
}

#ifdef __AVX512BF16__
double bf16_flop(int64_t steps, float* sink) {
  __m512 sums[kChains];
  for (auto& x : sums) x = _mm512_setzero_ps();
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = a;  // 1.0
  for (int64_t i = 0; i < steps; ++i)
    for (int c = 0; c < kChains; ++c) {
      sums[c] = _mm512_dpbf16_ps(sums[c], a, b);
      asm volatile("" : "+v"(sums[c]));
    }
  for (int c = 0; c < kChains; ++c) *sink += _mm512_cvtss_f32(sums[c]);
  return 4.0 * 16 * kChains * static_cast<double>(steps);
}
#endif

template <class Kernel>
double rate(Kernel kernel, int threads, int64_t steps) {
  double flop = 0, best = 0;
  float sink = 0;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    flop = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : flop, sink) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) flop += kernel(steps, &sink);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, flop / seconds.count());
  }
  return sink == -1.0f ? 0 : best;
}

}  // namespace

// FLOP/s in fp32.
extern "C" double fma_fp32(int threads, int64_t steps) { return rate(fp32_flop, threads, steps); }

// FLOP/s with bf16 factors and fp32 sums; 0 where the CPU has no such vector instructions.
extern "C" double fma_bf16(int threads, int64_t steps) {
#ifdef __AVX512BF16__
  return rate(bf16_flop, threads, steps);
#else
  (void)threads, (void)steps;
  return 0;
#endif
}
