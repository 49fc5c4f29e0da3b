// The most shared memory of a block, in bytes, by architecture: 80 for sm_80. The kernels' code, the
// host and the emulator all ask here, so that none launches what another has compiled away.
#pragma once

namespace attnfast::cuda {

// What sm_80 and all later ones give, and what sm_75 gives.
constexpr int kSharedLimit = 99 << 10, kTuringShared = 64 << 10;

constexpr int shared_of(int arch) {
  if (arch < 80) return kTuringShared;
  if (arch == 80 || arch == 87) return 163 << 10;
  return arch == 90 || (arch >= 100 && arch < 120) ? 227 << 10 : kSharedLimit;
}

}  // namespace attnfast::cuda
