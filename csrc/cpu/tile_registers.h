// Tile registers of AMX: 16 rows of 16 pairs of bf16, multiplied into 16 x 16 fp32.
//
// Sanitizer builds carry the same operations in plain C++ (ATTNFAST_EMULATED_TILES), so that every
// load and store is checked, and every machine can run them.
#pragma once
#include "pair_vectors.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr Index kTileSize = 16;  // rows of a tile; also its pairs per row, and columns of a product

#if defined(__AMX_BF16__)
constexpr bool kHasTiles = true;

// All eight registers whole, for as long as this lives. The registers belong to the thread.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = kTileSize;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { __asm__ volatile("tilerelease" ::: "memory"); }
};

template <int kTile>
ATTNFAST_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// `row`: floats from a row to the next.
template <int kTile>
ATTNFAST_INLINE void tile_load(const float* p, Index row) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row * 4), "i"(kTile) : "memory");
}

template <int kTile>
ATTNFAST_INLINE void tile_store(float* p, Index row) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row * 4), "i"(kTile) : "memory");
}

// c[i][j] += sum over k of a[i][k].even * b[k][j].even + a[i][k].odd * b[k][j].odd
template <int kC, int kA, int kB>
ATTNFAST_INLINE void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#elif defined(ATTNFAST_EMULATED_TILES)
constexpr bool kHasTiles = true;

struct TileRegisters {
  TileRegisters() {}
  ~TileRegisters() {}
};

inline Vec (&emulated_tile(int tile)) [kTileSize] {
  static thread_local Vec registers[8][kTileSize];
  return registers[tile];
}

template <int kTile>
void tile_zero() {
  for (Vec& row : emulated_tile(kTile)) row = zeros();
}

template <int kTile>
void tile_load(const float* p, Index row) {
  for (Index i = 0; i < kTileSize; ++i) emulated_tile(kTile)[i] = load(p + i * row);
}

template <int kTile>
void tile_store(float* p, Index row) {
  for (Index i = 0; i < kTileSize; ++i) store(p + i * row, emulated_tile(kTile)[i]);
}

template <int kC, int kA, int kB>
void tile_multiply() {
  for (Index i = 0; i < kTileSize; ++i) {
    for (Index k = 0; k < kTileSize; ++k) {
      const Vec a = broadcast(emulated_tile(kA)[i][k]);
      Vec& c = emulated_tile(kC)[i];
      c = multiply_add_pairs(a, emulated_tile(kB)[k], c);
    }
  }
}

#else
constexpr bool kHasTiles = false;

struct TileRegisters {
  TileRegisters() {}
  ~TileRegisters() {}
};
#endif

}  // namespace attnfast::cpu::ATTNFAST_ISA
