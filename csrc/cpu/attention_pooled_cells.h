// What a block of queries adds to its cells: a grid's, or those of distances.
//
// Sums stay in lanes, a query each, until a column of queries has seen a range of keys, or all;
// then the lanes of a row of cells are joined.
#pragma once
#include "probabilities.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr Index kBlock = 256;           // queries
constexpr Index kRange = 2 * kMaxKeys;  // keys

// n rows of queries or keys, cut into cells of which some may be empty.
struct Cells {
  Index n, count;
  Index begin(Index cell) const { return cell * n / count; }
  Index of(Index i) const { return ((i + 1) * count - 1) / n; }
};

// Where the rows of cells from `first` on lie.
struct CellRows {
  Cells queries;
  Index first, row;  // row: floats from one to the next
  float* data;
};

struct Add {
  template <class Number>
  static ATTNFAST_INLINE Number join(Number a, Number b) {
    return a + b;
  }
};
struct Larger {  // NaN wins
  static ATTNFAST_INLINE Vec join(Vec a, Vec b) { return ((b > a) | (b != b)) ? b : a; }
  static ATTNFAST_INLINE float join(float a, float b) { return b > a || b != b ? b : a; }
};

// to[lane] is joined with p[key][lane] of the keys begin .. end - 1, in a few chains.
template <class Pool, class Function>
ATTNFAST_INLINE void join_keys(Index begin, Index end, float* to, Function f) {
  Vec even[kTileVecs], odd[kTileVecs];
  for (int v = 0; v < kTileVecs; ++v) even[v] = odd[v] = zeros();
  Index j = begin;
  for (; j + 2 <= end; j += 2) {
    ATTNFAST_UNROLL for (int v = 0; v < kTileVecs; ++v) {
      even[v] = Pool::join(even[v], f(j, v * kLanes));
      odd[v] = Pool::join(odd[v], f(j + 1, v * kLanes));
    }
  }
  for (int v = 0; v < kTileVecs; ++v) {
    if (j < end) even[v] = Pool::join(even[v], f(j, v * kLanes));
    store(to + v * kLanes, Pool::join(load(to + v * kLanes), Pool::join(even[v], odd[v])));
  }
}

// Some queries of a block that are in lanes together: of one row of a block mask's blocks.
struct Lanes {
  Index t, count;
  Norm norm;

  // Whether the query of a lane has no keys, or is not to count: then p is 0, even if s is NaN.
  bool counts(Index lane) const { return norm.log2_l[lane] != kInfinity; }
};

// Joins sums[i][lane] with the cells columns[i] (null: i) of the lanes' rows.
template <class Pool>
void join_lanes(const float* sums, Index count, const Index* columns, const Lanes& lanes,
                const CellRows& to) {
  const Index t = lanes.t;
  for (Index i = 0; i < count; i += kLanes) {
    const Index width = min_of(count - i, kLanes);
    Index row = to.queries.of(t), row_end = to.queries.begin(row + 1);
    Vec total = zeros();
    const auto finish_row = [&] {
      alignas(64) float of_row[kLanes];
      store(of_row, total);
      float* cells = to.data + (row - to.first) * to.row;
      for (Index x = 0; x < width; ++x) {
        float& cell = cells[columns ? columns[i + x] : i + x];
        cell = Pool::join(cell, of_row[x]);
      }
      total = zeros();
    };
    for (Index lane = 0; lane < lanes.count; lane += kLanes) {
      Vec x[kLanes];
      ATTNFAST_UNROLL for (int r = 0; r < kLanes; ++r) {
        x[r] = r < width ? load(sums + (i + r) * kColumn + lane) : zeros();
      }
      transpose_tile(x);
      for (Index l = 0; l < min_of(lanes.count - lane, kLanes); ++l) {
        if (t + lane + l >= row_end) {
          finish_row();
          row = to.queries.of(t + lane + l), row_end = to.queries.begin(row + 1);
        }
        if (lanes.counts(lane + l)) total = Pool::join(total, x[l]);
      }
    }
    finish_row();
  }
}

// Means and largest ones: cells along the keys.
template <class Pool>
class Grid {
 public:
  static Index floats(Index) { return kRange * kColumn; }

  template <class Element>
  Grid(const PooledParams& p, const Head<Element>& head, float* sums)
      : keys_{head.S, p.columns}, sums_(sums) {}

  void begin_block(Index) {}

  // The keys key .. key + n - 1 are next.
  void begin_range(Index key, Index n) {
    key_ = key, count_ = 0;
    for (Index j = 0; j < n; ++count_) {
      column_[count_] = keys_.of(key + j);
      end_[count_] = min_of(keys_.begin(column_[count_] + 1) - key, n);
      for (; j < end_[count_]; ++j) cell_[j] = static_cast<uint8_t>(count_);
    }
  }

  void begin_column() { memset(sums_, 0, count_ * kColumn * sizeof(float)); }

  void add(Index, const Column&, Index key, Index n, const float* p) {
    const Index from = key - key_;
    for (Index j = 0; j < n;) {
      const Index cell = cell_[from + j], end = min_of(end_[cell] - from, n);
      join_keys<Pool>(j, end, sums_ + cell * kColumn,
                      [&](Index key, Index lane) { return load(p + key * kColumn + lane); });
      j = end;
    }
  }

  void end_column(const Lanes& lanes, const CellRows& to) {
    join_lanes<Pool>(sums_, count_, column_, lanes, to);
  }
  void end_block(Index, const Lanes&, const CellRows&) {}

 private:
  Cells keys_;
  float* sums_;  // [cells of the range][kColumn]
  Index key_ = 0, count_ = 0;
  Index column_[kRange], end_[kRange];  // of the range's cells; end_: in the range
  uint8_t cell_[kRange];                // of each key
};

// Sums by how far back a key is, of the first key, and of keys with the query's token.
class Distances {
 public:
  static constexpr Index kSame = 32, kFirstKey = 64, kEqual = 65, kCount = 66;

  static Index floats(Index columns) { return columns * kCount * kColumn; }

  template <class Element>
  Distances(const PooledParams& p, const Head<Element>& head, float* sums)
      : shift_(head.shift), sums_(sums) {
    const auto at = [&](const int32_t* tokens, Index rows, Index begin) {
      return tokens ? tokens + (p.cu_seqlens_q ? begin : head.b * rows) : nullptr;
    };
    if (!p.tokens_k) return;
    tokens_q_ = at(p.tokens_q, p.T, head.q_begin), tokens_k_ = at(p.tokens_k, p.S, head.k_begin);
  }

  void begin_block(Index columns) { memset(sums_, 0, floats(columns) * sizeof(float)); }
  void begin_range(Index, Index) {}
  void begin_column() {}

  void add(Index index, const Column& column, Index key, Index n, const float* p) {
    float* sums = sums_ + index * kCount * kColumn;
    const auto keys = [&](Index j, Index lane) { return load(p + j * kColumn + lane); };
    for (Index j = 0; j < n;) {
      const Index first = column.t0 + shift_ - key - j, last = first + kColumn - 1;  // d of lanes
      Index power = 0, run = 0;  // of keys that have all lanes in one column
      if (first > 0) {
        power = log2_of(first);
        if (last >> power == 1) run = first - (Index{1} << power) + 1;
      } else if (last < 0) {
        power = log2_of(-last);
        if (-first >> power == 1) run = (Index{2} << power) + first;
      }
      if (run == 0) {
        for (Index lane = 0; lane < column.rows; ++lane)
          sums[column_of(first + lane) * kColumn + lane] += p[j * kColumn + lane];
        ++j;
        continue;
      }
      const Index end = min_of(j + run, n);
      join_keys<Add>(j, end, sums + (first > 0 ? kSame + 1 + power : kSame - 1 - power) * kColumn,
                     keys);
      j = end;
    }
    if (key == 0) join_keys<Add>(0, 1, sums + kFirstKey * kColumn, keys);
    if (tokens_k_) add_equal(column, key, n, p, sums + kEqual * kColumn);
  }

  void end_column(const Lanes&, const CellRows&) {}
  void end_block(Index index, const Lanes& lanes, const CellRows& to) {
    join_lanes<Add>(sums_ + index * kCount * kColumn, kCount, nullptr, lanes, to);
  }

 private:
  static Index log2_of(Index d) { return 63 - __builtin_clzll(static_cast<uint64_t>(d)); }
  static Index column_of(Index d) {
    return d == 0 ? kSame : d > 0 ? kSame + 1 + log2_of(d) : kSame - 1 - log2_of(-d);
  }

  void add_equal(const Column& column, Index key, Index n, const float* p, float* to) const {
    alignas(64) int32_t tokens[kColumn] = {};
    memcpy(tokens, tokens_q_ + column.t0, column.rows * sizeof(int32_t));
    IVec of_q[kTileVecs], t[kTileVecs];
    for (int v = 0; v < kTileVecs; ++v) {
      memcpy(&of_q[v], tokens + v * kLanes, sizeof(IVec));
      t[v] = positions(column, shift_, v * kLanes);
    }
    join_keys<Add>(0, n, to, [&](Index j, Index lane) {
      const Index v = lane / kLanes;
      const IVec equal = (of_q[v] == tokens_k_[key + j]) & (t[v] != static_cast<int32_t>(key + j));
      return equal ? load(p + j * kColumn + lane) : zeros();
    });
  }

  Index shift_;
  float* sums_;  // [columns of queries][kCount][kColumn]
  const int32_t *tokens_q_ = nullptr, *tokens_k_ = nullptr;
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
