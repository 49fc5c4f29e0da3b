// Tiles of rows in shared memory, and their products on tensor cores.
//
// A tile holds rows of kD 2-byte elements in chunks of 8, which is what ldmatrix reads and cp.async
// writes. Chunk c of row r lies at place c ^ (r & 7) of its row (kD a multiple of 64), or at
// c ^ (r / 2 & 3) (kD an odd multiple of 32, whose rows begin in two places of the banks only), so
// that eight rows of one chunk fall into different banks. docs/cuda.md draws it.
//
// Fragments are those of mma.m16n8k16. Lane l holds of a 16 x 8 sum the rows l / 4 and l / 4 + 8,
// of each the columns l % 4 * 2 and the next: [0], [1] of the first row and [2], [3] of the second.
#pragma once
#include "prims/opaque.h"
#include "prims/prims.h"

namespace attnfast::cuda {

template <int kD>
struct Swizzle {
  static_assert(kD % 32 == 0);
  static constexpr uint32_t kMask = kD % 64 ? 3 : 7;
  static ATTNFAST_DEVICE uint32_t of_row(uint32_t row) { return kD % 64 ? row >> 1 & 3 : row & 7; }
  // In bytes from the tile's beginning.
  static ATTNFAST_DEVICE uint32_t offset(uint32_t row, uint32_t chunk) {
    return row * kD * 2 + ((chunk & ~kMask) | ((chunk ^ of_row(row)) & kMask)) * 16;
  }
};

// Where one lane of an ldmatrix reads in a tile: in chunk 0 or 1 of a row. That chunk's place is in
// the address's lowest bits that change, for rows begin at multiples of kMask + 1 chunks (32 and 96
// elements: of four), so that one exclusive-or finds any other; what it leaves is a constant for
// unrolled loops.
template <int kD>
struct LaneAddress {
  uint32_t first;
  uint32_t beyond = 0;  // bytes to add: a constant costs nothing, and `first` serves tiles beyond

  // Four matrices as the A operand of 16 rows; with .trans, as the B operands of 16 rows' products.
  static ATTNFAST_DEVICE LaneAddress down_then_across(uint32_t tile, uint32_t lane) {
    return {tile + Swizzle<kD>::offset(lane % 16, lane / 16)};
  }
  // Four matrices as the B operand of products with 16 rows transposed.
  static ATTNFAST_DEVICE LaneAddress across_then_down(uint32_t tile, uint32_t lane) {
    return {tile + Swizzle<kD>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
  }
  // The same, but what is derived from it is derived anew, and takes no registers in between.
  ATTNFAST_DEVICE LaneAddress again() const { return {opaque(first), beyond}; }
  // The same in a tile that begins so many bytes after this one.
  ATTNFAST_DEVICE LaneAddress after(uint32_t bytes) const { return {first, beyond + bytes}; }
  // The same from chunk `even` on.
  ATTNFAST_DEVICE LaneAddress from_chunk(uint32_t even) const { return {(*this)(even), 0}; }
  // Of chunks `even` and even + 1.
  ATTNFAST_DEVICE uint32_t operator()(uint32_t even) const {
    constexpr uint32_t kMask = Swizzle<kD>::kMask;
    return (first ^ (even & kMask) * 16) + (even & ~kMask) * 16 + beyond;
  }
};

// Of 16 keys' rows, as a B operand holds them, only those that are attended: the others are zero,
// whatever they hold. Bits 0 and 1 of `live` are the lane's first two rows, 2 and 3 its others.
ATTNFAST_DEVICE void drop_dead_rows(uint32_t (&b)[4], uint32_t live) {
  const uint32_t low = (live & 1 ? 0xFFFFu : 0) | (live & 2 ? 0xFFFF0000u : 0);
  const uint32_t high = (live & 4 ? 0xFFFFu : 0) | (live & 8 ? 0xFFFF0000u : 0);
  b[0] &= low, b[1] &= high, b[2] &= low, b[3] &= high;
}

// product[16 * kM x 8 * kN] = a b^T, both from shared memory: a's 16 * kM rows from `a` on, b's
// 8 * kN.
template <class Element, int kD, int kM, int kN>
ATTNFAST_DEVICE void multiply_rows_by_rows(float (&product)[kM][kN][4], LaneAddress<kD> of_a,
                                           LaneAddress<kD> of_b) {
  const auto step = [](int k, float (&sum)[4], const uint32_t (&left)[4], uint32_t b0,
                       uint32_t b1) {
    if (k == 0) {
      multiply<Element>(sum, left, b0, b1);
    } else {
      multiply_accumulate<Element>(sum, left, b0, b1);
    }
  };
  ATTNFAST_UNROLL for (int k = 0; k < kD / 16; ++k) {
    uint32_t left[kM][4];
    ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) load_matrix(left[m], of_a(2 * k) + m * 32 * kD);
    ATTNFAST_UNROLL for (int n = 0; n < kN; n += 2) {
      uint32_t right[4];
      load_matrix(right, of_b(2 * k) + n * 16 * kD);
      ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
        step(k, product[m][n], left[m], right[0], right[1]);
        step(k, product[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The same of rows from `a` and from `b` on.
template <class Element, int kD, int kM, int kN>
ATTNFAST_DEVICE void multiply_rows_by_rows(float (&product)[kM][kN][4], uint32_t a, uint32_t b,
                                           int lane) {
  multiply_rows_by_rows<Element, kD>(product, LaneAddress<kD>::down_then_across(a, lane),
                                     LaneAddress<kD>::across_then_down(b, lane));
}

// sum[16 * kM x kD] += a b: a is a sum of 8 * kN columns in registers, rounded to Element; b has as
// many rows in shared memory. kDropDead: rows of b without their bit in `live` count as zero.
template <class Element, int kD, bool kDropDead, int kM, int kN>
ATTNFAST_DEVICE void add_registers_times_rows(float (&sum)[kM][kD / 8][4],
                                              const float (&a)[kM][kN][4], LaneAddress<kD> of_b,
                                              uint32_t live) {
  ATTNFAST_UNROLL for (int k = 0; k < kN / 2; ++k) {
    uint32_t left[kM][4];
    ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
      ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
        const float (&x)[4] = a[m][2 * k + i / 2];
        left[m][i] = pack<Element>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
      }
    }
    ATTNFAST_UNROLL for (int n = 0; n < kD / 8; n += 2) {
      uint32_t right[4];
      load_matrix_transposed(right, of_b(n) + k * 32 * kD);
      if (kDropDead) drop_dead_rows(right, live >> 4 * k);
      ATTNFAST_UNROLL for (int m = 0; m < kM; ++m) {
        multiply_accumulate<Element>(sum[m][n], left[m], right[0], right[1]);
        multiply_accumulate<Element>(sum[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The same of b's rows from `b` on.
template <class Element, int kD, bool kDropDead, int kM, int kN>
ATTNFAST_DEVICE void add_registers_times_rows(float (&sum)[kM][kD / 8][4],
                                              const float (&a)[kM][kN][4], uint32_t b,
                                              uint32_t live, int lane) {
  add_registers_times_rows<Element, kD, kDropDead>(
      sum, a, LaneAddress<kD>::down_then_across(b, lane), live);
}

}  // namespace attnfast::cuda
