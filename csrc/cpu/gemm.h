// The register tile: C[rows][vectors] (+)= sum over k of A[row, k] * B[k][vectors].
//
// A is read one broadcast scalar at a time through any strides, so keys and values are used where they
// lie in memory; B is rows of floats, one after another. kTileRows x kTileVecs accumulators fill the registers
// (the outer-product kernel of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008).
#pragma once
#include "simd.h"

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

// `column_max`, where given, is raised to the largest of each column of the tile.
template <int kRows, int kVecs, bool kMax>
ATTNFAST_NOINLINE void tile(Index K, MatrixA a, MatrixB b, MatrixC c, Start start, float* column_max) {
  Vec acc[kRows][kVecs];
  if (start == Start::kAccumulate) {
    ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) {
      ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) acc[i][j] = load(c.data + i * c.ld + j * kLanes);
    }
  } else {
    ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) {
      ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) acc[i][j] = zeros();
    }
  }
  const float* b_row = b.data;
  for (Index panel = 0; panel < a.panels; ++panel) {
    const float* a_column = a.data + panel * a.panel_stride;
    _Pragma("GCC unroll 4") for (Index k = 0; k < K; ++k) {
      Vec bv[kVecs];
      ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) bv[j] = load(b_row + j * kLanes);
      ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) {
        const Vec av = broadcast(a_column[i * a.row]);
        ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) acc[i][j] = av * bv[j] + acc[i][j];
      }
      a_column += a.step;
      b_row += b.ld;
    }
  }
  ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) {
    ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) store(c.data + i * c.ld + j * kLanes, acc[i][j]);
  }
  if (kMax) {
    ATTNFAST_UNROLL for (int j = 0; j < kVecs; ++j) {
      Vec m = load(column_max + j * kLanes);
      ATTNFAST_UNROLL for (int i = 0; i < kRows; ++i) m = max(acc[i][j], m);
      store(column_max + j * kLanes, m);
    }
  }
}

// All M rows of a panel of kVecs vectors.
template <int kVecs, bool kMax = false>
inline void gemm(Index M, Index K, MatrixA a, MatrixB b, MatrixC c, Start start,
                 float* column_max = nullptr) {
  Index i = 0;
  const auto rows = [&](auto tile_function, int n) {
    for (; i + n <= M; i += n) {
      tile_function(K, MatrixA{a.data + i * a.row, a.row, a.step, a.panels, a.panel_stride}, b,
                    MatrixC{c.data + i * c.ld, c.ld}, start, column_max);
    }
  };
  rows(tile<kTileRows, kVecs, kMax>, kTileRows);
  rows(tile<4, kVecs, kMax>, 4);
  rows(tile<2, kVecs, kMax>, 2);
  rows(tile<1, kVecs, kMax>, 1);
}

// The same for N columns, N a multiple of kLanes.
inline void gemm_wide(Index M, Index N, Index K, MatrixA a, MatrixB b, MatrixC c, Start start) {
  Index n = 0;
  for (; n + kColumn <= N; n += kColumn) {
    gemm<kTileVecs>(M, K, a, MatrixB{b.data + n, b.ld}, MatrixC{c.data + n, c.ld}, start);
  }
  for (; n < N; n += kLanes) {
    gemm<1>(M, K, a, MatrixB{b.data + n, b.ld}, MatrixC{c.data + n, c.ld}, start);
  }
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
