// Which instruction set's kernels run: the best that the machine has, unless ATTNFAST_CPU_ISA names
// another.
#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace attnfast::cpu {
namespace {

struct Row {
  Kernels kernels;
  bool runs;
};

#define ATTNFAST_ROW(isa, runs) \
  {{#isa, isa::attention_fwd, isa::attention_bwd, isa::attention_decode}, runs}

#if defined(__x86_64__)
// clang's __builtin_cpu_supports does not know "f16c".
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Best first, of those that the build has (setup.py says which).
const Row* table(int* count) {
#if defined(__x86_64__)
  [[maybe_unused]] static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  [[maybe_unused]] static const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  [[maybe_unused]] static const bool has_avx512_bf16 =
      has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  static const Row rows[] = {
#if defined(ATTNFAST_WITH_amx)
      ATTNFAST_ROW(amx, has_avx512_bf16 && has_tile_registers()),
#endif
#if defined(ATTNFAST_WITH_avx512_bf16)
      ATTNFAST_ROW(avx512_bf16, has_avx512_bf16),
#endif
#if defined(ATTNFAST_WITH_avx512)
      ATTNFAST_ROW(avx512, has_avx512),
#endif
#if defined(ATTNFAST_WITH_tiles16)
      ATTNFAST_ROW(tiles16, has_avx2),
#endif
#if defined(ATTNFAST_WITH_lanes16)
      ATTNFAST_ROW(lanes16, has_avx2),
#endif
#if defined(ATTNFAST_WITH_avx2)
      ATTNFAST_ROW(avx2, has_avx2),
#endif
      ATTNFAST_ROW(portable, true),
  };
  *count = sizeof rows / sizeof *rows;
  return rows;
}

const Kernels& choose() {
  int count;
  const Row* rows = table(&count);
  const char* wanted = getenv("ATTNFAST_CPU_ISA");
  for (int i = 0; i < count; ++i) {
    if (rows[i].runs && (!wanted || !*wanted || std::string(wanted) == rows[i].kernels.name))
      return rows[i].kernels;
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
