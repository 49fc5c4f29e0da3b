// A small random generator (xorshift64*, Vigna 2016, arXiv:1402.6246): every schedule from one
// seed.
#pragma once
#include <cstdint>

namespace attnfast::emulator {

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_((seed + 1) * 0x9E3779B97F4A7C15ull) {
    if (!state_) state_ = 1;
    for (int i = 0; i < 4; ++i) next();
  }

  uint32_t next() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545F4914F6CDD1Dull) >> 32);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((uint64_t{next()} * n) >> 32); }

 private:
  uint64_t state_;
};

}  // namespace attnfast::emulator
