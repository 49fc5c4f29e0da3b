#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace attnfast::cpu {
namespace {

constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // CPUID 7, EDX
constexpr unsigned kTileState = 3u << 17;                     // XCR0: TILECFG and TILEDATA
constexpr unsigned kOsxsave = 1u << 27;                       // CPUID 1, ECX
constexpr long kRequestPermission = 0x1023, kTileData = 18;   // arch_prctl ARCH_REQ_XCOMP_PERM

bool ask() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_tile_registers() {
  static const bool has = ask();
  return has;
}

}  // namespace attnfast::cpu
#else
namespace attnfast::cpu {
bool has_tile_registers() { return false; }
}  // namespace attnfast::cpu
#endif
