// The register tile: C[rows][vectors] (+)= sum over k of A[row, k] * B[k][vectors].
//
// A is read one broadcast scalar at a time through any strides, so keys and values are used where
// they lie in memory; B is rows of floats, one after another. kTileRows x kTileVecs accumulators
// fill the registers (the outer-product kernel of Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication", 2008).
//
// With kPairs the numbers of A and B are pairs of bf16 (simd.h): K counts pairs, and each step
// multiplies two of them.
#pragma once
#include "pair_vectors.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// A[i, panel * K + k] = data[i * row + panel * panel_stride + k * step]
struct MatrixA {
  const float* data;
  Index row, step;
  Index panels = 1, panel_stride = 0;
};

struct MatrixB {
  const float* data;
  Index ld;
};

struct MatrixC {
  float* data;
  Index ld;
};

enum class Start { kZero, kAccumulate };

// `tiles` register tiles, one below the other. `column_max`, where given, is raised to the largest
// of each column.
template <int kRows, int kVecs, bool kMax, bool kPairs>
ATTNFAST_NOINLINE void tiles_of_rows(Index tiles, Index K, const MatrixA& a, const MatrixB& b,
                                     const MatrixC& c, Start start, float* column_max) {
  constexpr int kGroup = 3;  // rows that share a pointer: base, base + row, base + 2 * row
  constexpr int kGroups = (kRows + kGroup - 1) / kGroup;
  const Index row = a.row, step = a.step, panels = a.panels, b_ld = b.ld, c_ld = c.ld;
  const Index to_next_panel = a.panel_stride - K * step;
  const float* a_tile = a.data;
  float* c_tile = c.data;
  for (; tiles > 0; --tiles, a_tile += kRows * row, c_tile += kRows * c_ld) {
    Vec acc[kRows][kVecs];
    if (start == Start::kAccumulate) {
      ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) {
        ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) acc[i][j] =
            load(c_tile + i * c_ld + j * kLanes);
      }
    } else {
      ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) {
        ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) acc[i][j] = zeros();
      }
    }
    const float* a_group[kGroups];
    ATTNFAST_UNROLL for (int g = 0; g < kGroups; ++g) a_group[g] = a_tile + g * kGroup * row;
    const float* b_row = b.data;
    for (Index panel = 0; panel < panels; ++panel) {
      _Pragma("GCC unroll 4") for (Index k = 0; k < K; ++k) {
        Vec bv[kVecs];
        ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) bv[j] = load(b_row + j * kLanes);
        ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) {
          const Vec av = broadcast(a_group[i / kGroup][(i % kGroup) * row]);
          ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) acc[i][j] =
              kPairs ? multiply_add_pairs(av, bv[j], acc[i][j]) : av * bv[j] + acc[i][j];
        }
        ATTNFAST_UNROLL for (int g = 0; g < kGroups; ++g) a_group[g] += step;
        b_row += b_ld;
      }
      ATTNFAST_UNROLL for (int g = 0; g < kGroups; ++g) a_group[g] += to_next_panel;
    }
    ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) {
      ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j)
          store(c_tile + i * c_ld + j * kLanes, acc[i][j]);
    }
    if (kMax) {
      ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) {
        Vec m = load(column_max + j * kLanes);
        ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) m = max(acc[i][j], m);
        store(column_max + j * kLanes, m);
      }
    }
  }
}

// All M rows of a panel of kVecs vectors.
template <int kVecs, bool kMax = false, bool kPairs = false>
inline void gemm(Index M, Index K, const MatrixA& a, const MatrixB& b, const MatrixC& c,
                 Start start, float* column_max = nullptr) {
  MatrixA a_rest = a;
  MatrixC c_rest = c;
  const auto rows = [&](auto function, int n) {
    if (M < n) return;
    const Index tiles = M / n;
    function(tiles, K, a_rest, b, c_rest, start, column_max);
    a_rest.data += tiles * n * a.row, c_rest.data += tiles * n * c.ld;
    M -= tiles * n;
  };
  rows(tiles_of_rows<kTileRows, kVecs, kMax, kPairs>, kTileRows);
  rows(tiles_of_rows<4, kVecs, kMax, kPairs>, 4);
  rows(tiles_of_rows<2, kVecs, kMax, kPairs>, 2);
  rows(tiles_of_rows<1, kVecs, kMax, kPairs>, 1);
}

// The same for N columns, N a multiple of kLanes.
template <bool kPairs = false>
inline void gemm_wide(Index M, Index N, Index K, const MatrixA& a, const MatrixB& b,
                      const MatrixC& c, Start start) {
  Index n = 0;
  for (; n + kColumn <= N; n += kColumn) {
    gemm<kTileVecs, false, kPairs>(M, K, a, MatrixB{b.data + n, b.ld}, MatrixC{c.data + n, c.ld},
                                   start);
  }
  for (; n < N; n += kLanes) {
    gemm<1, false, kPairs>(M, K, a, MatrixB{b.data + n, b.ld}, MatrixC{c.data + n, c.ld}, start);
  }
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
