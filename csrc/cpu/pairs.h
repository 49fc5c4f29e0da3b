// Products of pairs of bf16, and fp16 and fp32 numbers in two and three bf16 planes.
//
// With AMX's tiles, or row by row where there is only vdpbf16ps or bfdot:
//
//   C[rows][columns] (+)= A B      A: rows of pairs, in panels of kLanes; B: rows of pairs
//
// One plane holds bf16 numbers. Three planes hold fp32 numbers exactly, x = high + middle + low,
// each the leading 8 bits of what is left (Henry, Tang, Heinecke, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations", 2019). Six of the nine
// products are summed; those left out are below 2 ** -21 of |a b|. Two planes hold fp16 numbers
// exactly, and of p and ds 16 bits; three of the four products are summed, the fourth is below
// 2 ** -14 of |a b|, but for scores, which are as exact as fp32's. Numbers of extreme magnitude are
// left to fp32 products (Peak below).
#pragma once
#include "elements.h"
#include "gemm.h"
#include "pair_vectors.h"
#include "tile_registers.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// Queries of a key head from which on more planes than one are worth their making.
constexpr Index kFewestQueries = 256;

constexpr Index kPanelPairs = kLanes;      // with tiles, what their rows hold
constexpr Index kPanel = 2 * kPanelPairs;  // numbers of a row of a panel

// How many planes the products of an element use; 0: they are not on pairs.
template <class Element>
inline constexpr int kPlanesOf = 0;
template <>
inline constexpr int kPlanesOf<BFloat16> = kHasPairs ? 1 : 0;
template <>
inline constexpr int kPlanesOf<Float16> = kHasTiles ? 2 : 0;
template <>
inline constexpr int kPlanesOf<float> = kHasTiles ? 3 : 0;

// Whether planes hold the rows of q as they are, so that what scales them waits for the products.
template <int kPlanes>
inline constexpr bool kScalesProducts = kPlanes == 1 || kPlanes == 2;

// a[plane][i][panel * 16 + k] = data[plane * plane_stride + panel * panel_stride + i * row + k]
struct PairsA {
  const float* data;
  Index row, panel_stride, plane_stride;
};

// b[plane][k][j] = data[plane * plane_stride + k * row + j]
struct PairsB {
  const float* data;
  Index row, plane_stride;
};

#if defined(__AMX_BF16__) || defined(ATTNFAST_EMULATED_TILES)
// kM x kN tiles of C.
template <int kPlanes, int kOrder, int kM, int kN>
ATTNFAST_INLINE void multiply_tiles(Index panels, PairsA a, PairsB b, const MatrixC& c,
                                    Start start) {
  constexpr int kA = 4, kB = 6;  // C in registers 0 to 3, row by row
  if (start == Start::kZero) {
    tile_zero<0>();
    if (kN > 1) tile_zero<1>();
    if (kM > 1) tile_zero<2>();
    if (kM > 1 && kN > 1) tile_zero<3>();
  } else {
    tile_load<0>(c.data, c.ld);
    if (kN > 1) tile_load<1>(c.data + kTileSize, c.ld);
    if (kM > 1) tile_load<2>(c.data + kTileSize * c.ld, c.ld);
    if (kM > 1 && kN > 1) tile_load<3>(c.data + kTileSize * c.ld + kTileSize, c.ld);
  }
  for (Index panel = 0; panel < panels; ++panel) {
    ATTNFAST_UNROLL for (int i = 0; i < kPlanes; ++i) {
      const float* a_plane = a.data + i * a.plane_stride;
      tile_load<kA>(a_plane, a.row);
      if (kM > 1) tile_load<kA + 1>(a_plane + kTileSize * a.row, a.row);
      ATTNFAST_UNROLL for (int j = 0; j < kPlanes; ++j) {
        if (i + j >= kOrder) break;
        const float* b_plane = b.data + j * b.plane_stride;
        tile_load<kB>(b_plane, b.row);
        if (kN > 1) tile_load<kB + 1>(b_plane + kTileSize, b.row);
        tile_multiply<0, kA, kB>();
        if (kN > 1) tile_multiply<1, kA, kB + 1>();
        if (kM > 1) tile_multiply<2, kA + 1, kB>();
        if (kM > 1 && kN > 1) tile_multiply<3, kA + 1, kB + 1>();
      }
    }
    a.data += a.panel_stride;
    b.data += kPanelPairs * b.row;
  }
  tile_store<0>(c.data, c.ld);
  if (kN > 1) tile_store<1>(c.data + kTileSize, c.ld);
  if (kM > 1) tile_store<2>(c.data + kTileSize * c.ld, c.ld);
  if (kM > 1 && kN > 1) tile_store<3>(c.data + kTileSize * c.ld + kTileSize, c.ld);
}

template <int kPlanes, int kOrder, int kN>
ATTNFAST_NOINLINE void multiply_tile_columns(Index M, Index panels, PairsA a, const PairsB& b,
                                             MatrixC c, Start start) {
  for (; M > kTileSize; M -= 2 * kTileSize) {
    multiply_tiles<kPlanes, kOrder, 2, kN>(panels, a, b, c, start);
    a.data += 2 * kTileSize * a.row, c.data += 2 * kTileSize * c.ld;
  }
  if (M > 0) multiply_tiles<kPlanes, kOrder, 1, kN>(panels, a, b, c, start);
}
#endif

// M rows; with tiles, rows up to the next multiple of 16 are read and written as well. N: a
// multiple of kLanes. Planes i and j are multiplied where i + j < kOrder.
template <int kPlanes, int kOrder = kPlanes>
inline void multiply_pairs(Index M, Index N, Index panels, const PairsA& a, const PairsB& b,
                           const MatrixC& c, Start start) {
#if defined(__AMX_BF16__) || defined(ATTNFAST_EMULATED_TILES)
  Index n = 0;
  for (; n + 2 * kTileSize <= N; n += 2 * kTileSize) {
    multiply_tile_columns<kPlanes, kOrder, 2>(
        M, panels, a, PairsB{b.data + n, b.row, b.plane_stride}, MatrixC{c.data + n, c.ld}, start);
  }
  if (n < N) {
    multiply_tile_columns<kPlanes, kOrder, 1>(
        M, panels, a, PairsB{b.data + n, b.row, b.plane_stride}, MatrixC{c.data + n, c.ld}, start);
  }
#else
  static_assert(kPlanes == 1, "planes are for tiles");
  gemm_wide<true>(M, N, kPanelPairs, MatrixA{a.data, a.row, 1, panels, a.panel_stride},
                  MatrixB{b.data, b.row}, c, start);
#endif
}

// to[plane * plane_stride] = pairs of (even, odd). One plane: rounded to nearest even.
template <int kPlanes>
ATTNFAST_INLINE void store_pairs(Vec even, Vec odd, float* to, Index plane_stride) {
  if (kPlanes == 1) {
    store(to, pair_of(even, odd));
    return;
  }
  ATTNFAST_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
    store(to + plane * plane_stride, pair_of_high_halves(even, odd));
    even -= high_half(even), odd -= high_half(odd);
  }
}

// The same with the numbers of `first` and then those of `second` along the row.
template <int kPlanes>
ATTNFAST_INLINE void store_row(Vec first, Vec second, float* to, Index plane_stride) {
  if (kPlanes == 1) {
    store(to, row_of_bf16(first, second));
    return;
  }
  ATTNFAST_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
    store(to + plane * plane_stride, row_of_high_halves(first, second));
    first -= high_half(first), second -= high_half(second);
  }
}

// The largest magnitude seen, and whether planes serve for such numbers. They must not be so
// large that a sum overflows where fp32's would not; and where sums of small numbers are the
// result, the largest must not be so small that the lowest plane falls below the normal numbers,
// which tiles take for zero. NaN is in range: it comes through in any case.
class Peak {
 public:
  ATTNFAST_INLINE void add(Vec x) { peak_ = max(abs(x), peak_); }
  float get() const { return max_lanes(peak_); }

  static bool in_range(float peak) { return peak < 0x1p90f; }
  static bool in_range_of_products(float peak) { return peak < 0x1p30f; }
  static bool worth_summing(float peak) { return in_range(peak) && (peak > 0x1p-60f || peak == 0); }

 private:
  Vec peak_ = zeros();
};

template <class Element>
ATTNFAST_INLINE Vec load_part(const Element* p, Index n) {
  if (n >= kLanes) return load(p);
  return n > 0 ? load_some(p, n) : zeros();
}

// Pairs along each row, panel by panel: to[plane][i][d / 2] = factor * (from[i][d], from[i][d +
// 1]), zero from D to a whole panel and for rows up to `padded_rows`.
template <int kPlanes, class Element>
inline void pack_rows_in_planes(const Element* from, Index stride, Index rows, Index D,
                                Index padded_rows, float* to, Index row, Index plane_stride,
                                Peak* peak) {
  for (Index i = 0; i < padded_rows; ++i) {
    for (Index d = 0; d < D; d += kPanel) {
      const Index width = i < rows ? D - d : 0;
      const Element* x = from + i * stride + d;
      const Vec first = load_part(x, width), second = load_part(x + kLanes, width - kLanes);
      if (kPlanes > 1) peak->add(first), peak->add(second);
      store_row<kPlanes>(first, second, to + i * row + d / 2, plane_stride);
    }
  }
}

// Pairs of rows: to[plane][i / 2][d] = factor * (from[i][d], from[i + 1][d]), zero for rows up to
// `padded_rows`, an even number, and from D to a whole vector.
template <int kPlanes, class Element>
inline void pack_row_pairs_in_planes(const Element* from, Index stride, Index rows, Index D,
                                     Index padded_rows, float factor, float* to, Index row,
                                     Index plane_stride) {
  for (Index i = 0; i < padded_rows; i += 2) {
    for (Index d = 0; d < D; d += kLanes) {
      const Element* x = from + i * stride + d;
      const Vec even = load_part(x, i < rows ? D - d : 0) * factor;
      const Vec odd = load_part(x + stride, i + 1 < rows ? D - d : 0) * factor;
      store_pairs<kPlanes>(even, odd, to + i / 2 * row + d, plane_stride);
    }
  }
}

// Columns as rows, in panels of 32 rows: to[plane][i / 32][d][i % 32 / 2] = the pair
// (from[i][d], from[i + 1][d]), zero for rows up to a whole panel and from D to D_pad, a multiple
// of 16.
template <int kPlanes, class Element>
inline void pack_transposed_in_planes(const Element* from, Index stride, Index rows, Index D,
                                      Index D_pad, float* to, Index plane_stride, Peak* peak) {
  for (Index i = 0; i < rows; i += kPanel) {
    for (Index d = 0; d < D_pad; d += kLanes) {
      Vec r[kPlanes][kLanes];
      ATTNFAST_UNROLL for (Index pair = 0; pair < kPanelPairs; ++pair) {
        const Index row = i + 2 * pair;
        const Element* x = from + row * stride + d;
        Vec even = load_part(x, row < rows ? D - d : 0);
        Vec odd = load_part(x + stride, row + 1 < rows ? D - d : 0);
        if (kPlanes > 1) peak->add(even), peak->add(odd);
        ATTNFAST_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
          r[plane][pair] = pair_of_high_halves(even, odd);
          even -= high_half(even), odd -= high_half(odd);
        }
      }
      ATTNFAST_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
        transpose_tile(r[plane]);
        float* out = to + plane * plane_stride + (i / kPanel * D_pad + d) * kPanelPairs;
        for (Index j = 0; j < kLanes; ++j) store(out + j * kPanelPairs, r[plane][j]);
      }
    }
  }
}

// A column of queries: to[plane][d / 2][lane] = factor * (from[lane][d], from[lane][d + 1]) for
// `rows` lanes; zero past rows, and past D up to a whole panel.
template <int kPlanes, class Element>
inline void transpose_column_in_planes(const Element* from, Index stride, Index rows, Index D,
                                       float factor, float* to, Index plane_stride, Peak* peak) {
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Index live = min_of(max_of(rows - lane, 0), kLanes);
    for (Index d = 0; d < round_up(D, kPanel); d += kLanes) {
      Vec r[kLanes];
      ATTNFAST_UNROLL for (Index i = 0; i < kLanes; ++i) {
        r[i] = load_part(from + (lane + i) * stride + d, i < live ? D - d : 0) * factor;
        if (kPlanes > 1) peak->add(r[i]);
      }
      transpose_tile(r);
      for (Index i = 0; i < kLanes; i += 2) {
        store_pairs<kPlanes>(r[i], r[i + 1], to + (d + i) / 2 * kColumn + lane, plane_stride);
      }
    }
  }
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
