// The primitives of cuda/prims on the CPU: every CUDA thread is a fiber of an emulated block.
#pragma once
#include <cmath>
#include <cstring>

#include "block.h"
#include "rounding.h"

#define ATTNFAST_KERNEL void
#define ATTNFAST_LAUNCH_BOUNDS(threads, blocks)
#define ATTNFAST_PARAMS const
#define ATTNFAST_DEVICE inline
#define ATTNFAST_UNROLL
#define ATTNFAST_NO_UNROLL

namespace attnfast::cuda {

// As on the GPU, but every form is compiled.
template <class Element, bool kOnTuring = true, bool kElsewhere = true>
bool has_code() {
  const bool turing = emulator::Block::current().gpu().turing();
  return turing ? std::is_same_v<Element, Float16> && kOnTuring : kElsewhere;
}

inline bool has_shared(int bytes) { return bytes <= emulator::Block::current().gpu().shared_limit; }

inline emulator::Block& block() { return emulator::Block::current(); }

inline void fail(ATTNFAST_CALLER) { block().fail({"fail", file, line}, "no code here"); }

inline int thread_index() { return block().thread(); }
inline int64_t block_index() { return block().index(); }

inline void sync_block(ATTNFAST_CALLER) {
  const emulator::Place place{"sync_block", file, line};
  if (block().enter(place)) block().sync_all(place);
}
inline void sync_warp(ATTNFAST_CALLER) {
  const emulator::Place place{"sync_warp", file, line};
  if (block().enter(place)) block().sync_lanes(place);
}

template <class T>
T shuffle_xor(T x, int lanes, ATTNFAST_CALLER) {
  struct Argument {
    T in, out;
    int lanes;
  } mine{x, x, lanes};
  const emulator::Place place{"shuffle_xor", file, line};
  if (!block().enter(place)) return x;
  block().meet(place, &mine, [](void** all) {
    for (int i = 0; i < kWarpSize; ++i) {
      auto* to = static_cast<Argument*>(all[i]);
      to->out = static_cast<Argument*>(all[i ^ to->lanes])->in;
    }
  });
  return mine.out;
}

inline bool any_lane(bool x, ATTNFAST_CALLER) {
  bool mine = x;
  const emulator::Place place{"any_lane", file, line};
  if (!block().enter(place)) return x;
  block().meet(place, &mine, [](void** all) {
    bool any = false;
    for (int i = 0; i < kWarpSize; ++i) any |= *static_cast<bool*>(all[i]);
    for (int i = 0; i < kWarpSize; ++i) *static_cast<bool*>(all[i]) = any;
  });
  return mine;
}

inline uint32_t shared_memory() { return emulator::SharedMemory::kBase; }

template <class T>
T load_shared(uint32_t address, ATTNFAST_CALLER) {
  const emulator::Place place{"load_shared", file, line};
  block().enter(place);
  T x;
  std::memcpy(&x, block().read_shared(block().tampered(address, place), sizeof(T), place),
              sizeof(T));
  return x;
}
template <class T>
void store_shared(uint32_t address, T x, ATTNFAST_CALLER) {
  const emulator::Place place{"store_shared", file, line};
  block().enter(place);
  std::memcpy(block().write_shared(block().tampered(address, place), sizeof(T), place), &x,
              sizeof(T));
}

template <class T>
T load_global(const T* p, ATTNFAST_CALLER) {
  const emulator::Place place{"load_global", file, line};
  block().enter(place);
  const T* address =
      reinterpret_cast<const T*>(block().tampered(reinterpret_cast<uintptr_t>(p), place));
  block().read_global(address, sizeof(T), place);
  T x;
  std::memcpy(&x, address, sizeof(T));
  return x;
}
template <class T>
void store_global(T* p, T x, ATTNFAST_CALLER) {
  const emulator::Place place{"store_global", file, line};
  block().enter(place);
  T* address = reinterpret_cast<T*>(block().tampered(reinterpret_cast<uintptr_t>(p), place));
  block().write_global(address, sizeof(T), place);
  std::memcpy(address, &x, sizeof(T));
}

inline int32_t take_ticket(int32_t* tickets, ATTNFAST_CALLER) {
  const emulator::Place place{"take_ticket", file, line};
  block().enter(place);
  block().write_global(tickets, sizeof(int32_t), place);
  return __atomic_fetch_add(tickets, 1, __ATOMIC_RELAXED);
}
inline void await_turn(const int32_t* at, int32_t turn, ATTNFAST_CALLER) {
  const emulator::Place place{"await_turn", file, line};
  if (!block().enter(place)) return;
  block().read_global(at, sizeof(int32_t), place);
  block().await(place, [&] { return __atomic_load_n(at, __ATOMIC_ACQUIRE) == turn; });
  block().handed().take(at, block().warp_of_launch());
}
inline void pass_turn(int32_t* at, int32_t turn, ATTNFAST_CALLER) {
  const emulator::Place place{"pass_turn", file, line};
  if (!block().enter(place)) return;
  block().write_global(at, sizeof(int32_t), place);
  block().handed().pass(at, block().warp_of_launch(),
                        [&] { __atomic_store_n(at, turn, __ATOMIC_RELEASE); });
}
inline Floats4 load_handed(const Floats4* p, ATTNFAST_CALLER) {
  const emulator::Place place{"load_handed", file, line};
  block().enter(place);
  p = reinterpret_cast<const Floats4*>(block().tampered(reinterpret_cast<uintptr_t>(p), place));
  block().read_global(p, sizeof(Floats4), place);
  if (!block().handed().may_load(p, block().warp_of_launch())) {
    block().fail(place, "a read of what no other block has passed on");
  }
  return *p;
}
inline void store_handed(Floats4* p, Floats4 x, ATTNFAST_CALLER) {
  const emulator::Place place{"store_handed", file, line};
  block().enter(place);
  p = reinterpret_cast<Floats4*>(block().tampered(reinterpret_cast<uintptr_t>(p), place));
  block().write_global(p, sizeof(Floats4), place);
  block().handed().store(p, block().warp_of_launch());
  *p = x;
}

inline void copy_async(uint32_t to, const void* from, int valid, ATTNFAST_CALLER) {
  const emulator::Place place{"copy_async", file, line};
  block().enter(place);
  block().copy(block().tampered(to, place), from, 16, valid, place);
}
inline void commit_copies(ATTNFAST_CALLER) {
  if (block().enter({"commit_copies", file, line})) block().commit();
}
template <int kNewest>
void wait_copies(ATTNFAST_CALLER) {
  block().wait_copies(kNewest, {"wait_copies", file, line});
}

struct MatrixLoad {
  uint32_t address;
  uint32_t* r;
};

template <bool kTransposed>
void load_matrices(MatrixLoad mine, const emulator::Place& place) {
  if (!block().enter(place)) return;
  mine.address = block().tampered(mine.address, place);
  block().meet(place, &mine, [&](void** all) {
    const auto lane = [&](int i) { return static_cast<MatrixLoad*>(all[i]); };
    std::vector<uint64_t> addresses;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = lane(matrix * 8 + row)->address;
        std::memcpy(element[row], block().read_shared(address, 16, place, true), 16);
        addresses.push_back(address);
      }
      for (int i = 0; i < kWarpSize; ++i) {
        const int row = i / 4, column = i % 4 * 2;
        const uint16_t low = kTransposed ? element[column][row] : element[row][column];
        const uint16_t high = kTransposed ? element[column + 1][row] : element[row][column + 1];
        lane(i)->r[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
    block().count(place, addresses, 16);
  });
}

inline void load_matrix(uint32_t (&r)[4], uint32_t address, ATTNFAST_CALLER) {
  load_matrices<false>({address, r}, {"load_matrix", file, line});
}
inline void load_matrix_transposed(uint32_t (&r)[4], uint32_t address, ATTNFAST_CALLER) {
  load_matrices<true>({address, r}, {"load_matrix_transposed", file, line});
}

template <class Element>
float to_float(Element x) {
  return emulator::widen<std::is_same_v<Element, Float16>>(x.bits);
}
template <class Element>
uint32_t pack(float low, float high) {
  constexpr bool kHalf = std::is_same_v<Element, Float16>;
  return emulator::narrow<kHalf>(low) | static_cast<uint32_t>(emulator::narrow<kHalf>(high)) << 16;
}

template <class Element>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         ATTNFAST_CALLER) {
  struct Argument {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  const emulator::Place place{"multiply_accumulate", file, line};
  if (!block().enter(place)) return;
  if (block().gpu().turing() && !std::is_same_v<Element, Float16>) {
    block().fail(place, "sm_75 multiplies no bf16");
  }
  block().meet(place, &mine, [](void** all) {
    constexpr bool kHalf = std::is_same_v<Element, Float16>;
    const auto low = [](uint32_t x) { return emulator::widen<kHalf>(x & 0xFFFF); };
    const auto high = [](uint32_t x) { return emulator::widen<kHalf>(x >> 16); };
    float A[16][16], B[16][8], D[16][8];
    for (int i = 0; i < kWarpSize; ++i) {
      const auto& lane = *static_cast<Argument*>(all[i]);
      const int g = i / 4, t = i % 4 * 2;
      for (int r = 0; r < 4; ++r) {
        A[g + r % 2 * 8][t + r / 2 * 8] = low(lane.a[r]);
        A[g + r % 2 * 8][t + 1 + r / 2 * 8] = high(lane.a[r]);
      }
      for (int r = 0; r < 2; ++r) {
        B[t + r * 8][g] = low(lane.b[r]), B[t + 1 + r * 8][g] = high(lane.b[r]);
      }
      for (int r = 0; r < 4; ++r) D[g + r / 2 * 8][t + r % 2] = lane.d[r];
    }
    emulator::multiply_accumulate(A, B, D, block().gpu().turing() ? 4 : 8);
    for (int i = 0; i < kWarpSize; ++i) {
      const auto& lane = *static_cast<Argument*>(all[i]);
      const int g = i / 4, t = i % 4 * 2;
      for (int r = 0; r < 4; ++r) lane.d[r] = D[g + r / 2 * 8][t + r % 2];
    }
  });
}

template <class Element>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ATTNFAST_CALLER) {
  d[0] = d[1] = d[2] = d[3] = 0.0f;
  multiply_accumulate<Element>(d, a, b0, b1, file, line);
}

inline float exp2_fast(float x) { return emulator::exp2_approx(x); }

inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

}  // namespace attnfast::cuda
