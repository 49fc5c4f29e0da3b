// Which instruction set's kernels run: the best for this machine, unless ATTNFAST_CPU_ISA names another.
#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif

#include "kernels.h"

namespace attnfast::cpu {
namespace {

struct Row {
  Kernels kernels;
  bool runs;
};

// Whether this machine runs a set, by the set's name.
[[maybe_unused]] bool runs_portable() { return true; }
#if defined(__x86_64__)
// clang's __builtin_cpu_supports does not know "f16c".
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
[[maybe_unused]] bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
[[maybe_unused]] bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool runs_avx512_bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16");
}
// Intel's processors from AVX512-FP16 on multiply pairs of bf16 at less than half the rate of fp32
// (kFastPairs), in which avx512 computes.
bool serves(const std::string& isa) {
  unsigned a, b, c, d;
  return isa != "avx512_bf16" || !__builtin_cpu_is("intel") ||
         !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bit_AVX512FP16);
}
[[maybe_unused]] bool runs_amx() { return runs_avx512_bf16() && has_tile_registers(); }
// In sanitizer builds only, in AVX2 instructions: the shapes of avx512 and of amx.
[[maybe_unused]] bool runs_lanes16() { return runs_avx2(); }
[[maybe_unused]] bool runs_tiles16() { return runs_avx2(); }
#else
bool serves(const std::string&) { return true; }
#endif
#if defined(__aarch64__)
[[maybe_unused]] bool runs_neon() { return true; }
#if defined(__linux__)
[[maybe_unused]] bool runs_neon_bf16() { return getauxval(AT_HWCAP2) & HWCAP2_BF16; }
[[maybe_unused]] bool runs_sve() {  // compiled for vectors of 32 bytes
  return runs_neon_bf16() && (getauxval(AT_HWCAP) & HWCAP_SVE) &&
         (getauxval(AT_HWCAP2) & HWCAP2_SVEBF16) &&
         (prctl(PR_SVE_GET_VL) & PR_SVE_VL_LEN_MASK) == 32;
}
#else
[[maybe_unused]] bool runs_neon_bf16() { return false; }
[[maybe_unused]] bool runs_sve() { return false; }
#endif
#endif

// Best first, of those that the build has.
const Row* table(int* count) {
#define ATTNFAST_ROW(isa)                                                                        \
  {{#isa, isa::attention_fwd, isa::attention_bwd, isa::attention_decode, isa::attention_pooled}, \
   runs_##isa()},
  static const Row rows[] = {ATTNFAST_ISAS(ATTNFAST_ROW)};
#undef ATTNFAST_ROW
  *count = sizeof rows / sizeof *rows;
  return rows;
}

const Kernels& choose() {
  int count;
  const Row* rows = table(&count);
  const char* wanted = getenv("ATTNFAST_CPU_ISA");
  for (int i = 0; i < count; ++i) {
    const std::string name = rows[i].kernels.name;
    if (rows[i].runs && (wanted && *wanted ? name == wanted : serves(name))) return rows[i].kernels;
  }
  throw std::runtime_error(std::string("ATTNFAST_CPU_ISA must be one of ") + runnable_isas() +
                           " on this machine, got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* runnable_isas() {
  static const std::string names = [] {
    int count;
    const Row* rows = table(&count);
    std::string all;
    for (int i = 0; i < count; ++i) {
      if (rows[i].runs) all += (all.empty() ? "" : ",") + std::string(rows[i].kernels.name);
    }
    return all;
  }();
  return names.c_str();
}

}  // namespace attnfast::cpu
