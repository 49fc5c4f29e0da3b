// The CPU's peak: multiply-adds on registers alone, all threads at once. `ceilings.py` compiles it
// with -march=native and calls it.
#include <algorithm>
#include <chrono>
#include <cstdint>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define KEEP "+v"  // in a register
#elif defined(__x86_64__)
#define KEEP "+x"
#else
#define KEEP "+w"
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

// Ten variables, since elements of an array would not stay in registers.
#define EACH(STEP) \
  STEP(s0) STEP(s1) STEP(s2) STEP(s3) STEP(s4) STEP(s5) STEP(s6) STEP(s7) STEP(s8) STEP(s9)
#define PINNED(s) asm volatile("" : KEEP(s));  // one instruction each, never folded

double fp32_flop(int64_t steps, float* sink) {
  const Vector a = Vector{} + 0.999f, b = Vector{} + 1e-3f;
  Vector s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{};
#define STEP(s)  \
  s = s * a + b; \
  PINNED(s)
  for (int64_t i = 0; i < steps; ++i) {
    EACH(STEP)
  }
#undef STEP
#define STEP(s) *sink += s[0];
  EACH(STEP)
#undef STEP
  return 2.0 * kLanes * kChains * static_cast<double>(steps);
}

#ifdef __AVX512BF16__
double bf16_flop(int64_t steps, float* sink) {
  const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
  Vector s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{};
#define STEP(s)                                      \
  s = (Vector)_mm512_dpbf16_ps((__m512)s, one, one); \
  PINNED(s)
  for (int64_t i = 0; i < steps; ++i) {
    EACH(STEP)
  }
#undef STEP
#define STEP(s) *sink += s[0];
  EACH(STEP)
#undef STEP
  return 4.0 * kLanes * kChains * static_cast<double>(steps);
}
#endif

template <class Kernel>
double rate(Kernel kernel, int threads, int64_t steps) {
  double flop = 0, best = 0;
  float sink = 0;
  for (int round = 0; round < 60; ++round) {
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
