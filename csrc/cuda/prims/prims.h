// The vocabulary that kernels are written in. Every name has two bodies: a line of PTX (ptx.h), and
// one that the CPU emulator runs (emulator/prims.h), which also checks what the hardware would not.
//
//   threads     thread_index  block_index  sync_block  sync_warp  shuffle_xor  any_lane
//   shared      shared_memory  load_shared  store_shared  load_matrix  load_matrix_transposed
//   global      load_global  store_global
//   blocks      take_ticket  await_turn  pass_turn  load_handed  store_handed
//   copies      copy_async  commit_copies  wait_copies
//   forms       has_code  has_shared  fail
//   arithmetic  multiply  multiply_accumulate  exp2_fast  pack  to_float  multiply_high
//
// Shared memory is addressed by 32-bit numbers, never by pointers. What only some architectures
// have goes into a file of its own beside these.
#pragma once
#include <cstdint>
#include <limits>

#include "../memory_limits.h"

namespace attnfast::cuda {

// Storage types; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What one access moves.
struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(8) Floats2 {
  float x, y;
};
struct alignas(16) Floats4 {
  float x, y, z, w;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

constexpr int kWarpSize = 32;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

}  // namespace attnfast::cuda

#ifdef ATTNFAST_EMULATOR
#include "../../emulator/prims.h"
#else
#include "ptx.h"
#endif

namespace attnfast::cuda {

template <class T>
ATTNFAST_DEVICE constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
ATTNFAST_DEVICE constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}

}  // namespace attnfast::cuda
