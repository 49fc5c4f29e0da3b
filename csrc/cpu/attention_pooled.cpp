// Attention probabilities pooled in cells of queries and keys: a second pass over the scores, after
// the forward.
//
//   p = exp(s - m - log l)
//   pooled   the mean, or the largest, of the p of a cell; or sums by distance (call.py's Pooling)
//
// Work:    one item per (batch entry, head, some rows of cells), or per part of a row that has many
//          queries, whose cells are joined in the end; the last queries first
// Memory:  per thread a block's transposed q, one tile of scores, the sums in lanes, and for bf16
//          and fp16 a copy of a range's keys; the cells of parts
// Threads: every item owns its cells and adds queries and keys in their order
#include <type_traits>

#include "attention_pooled_cells.h"
#include "blocks.h"
#include "kernels.h"
#include "probability_tiles.h"
#include "team.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

constexpr Index kMaskRows = 64;  // the smallest blocks of a mask
constexpr Index kMostColumns = kBlock / kColumn + kBlock / kMaskRows + 2;  // of queries, in a block
constexpr Index kPartFloats = 1 << 18;  // the most that the parts of one row of cells take

struct Scratch {
  float *q_t, *s, *k, *sums;

  Worker* worker = nullptr;

  Scratch(Parts& parts, const AttentionParams& p, bool packs, Index floats) {
    const Index D_pad = round_up(p.D, kPanel);
    q_t = parts.take<float>(kMostColumns * query_floats(p));
    s = parts.take<float>((kMaxKeys + kTileSize) * kColumn);
    k = parts.take<float>(packs ? (kRange + kTileSize) * D_pad : 0);
    sums = parts.take<float>(floats);
  }
};

template <class Element>
Index cut_block(const PooledParams& p, const Head<Element>& head, Index begin, Index end,
                Lanes* lanes, const Scratch& scratch) {
  Index columns = 0;
  for (Index t = begin; t < end; ++columns) {
    Index next = min_of(t + kColumn, end);
    if (p.blocks.starts) next = min_of(next, (t / p.blocks.size + 1) * p.blocks.size);
    lanes[columns].t = t, lanes[columns].count = next - t;
    lanes[columns].norm.load_rows(p, head, t, next - t);
    load_queries(head, t, next - t, scratch.q_t + columns * query_floats(p));
    t = next;
  }
  return columns;
}

// Adds what the queries begin .. end - 1, at most kBlock, attend.
template <class Pool, class Element>
void pool_block(const PooledParams& p, const Head<Element>& head, Index begin, Index end,
                const CellRows& to, Pool* pool, const Scratch& scratch) {
  Lanes lanes[kMostColumns];
  const Index columns = cut_block(p, head, begin, end, lanes, scratch);
  bool has_nan = false;
  for (Index c = 0; c < columns; ++c) has_nan |= lanes[c].norm.has_nan;
  const Index first = has_nan ? 0 : head.key_begin(begin) / kRange * kRange;
  const Index last = has_nan ? head.S : head.key_end(end - 1);
  pool->begin_block(columns);
  for (Index key0 = first; key0 < last; key0 += kRange) {
    const Index keys = min_of(kRange, last - key0);
    const float* k = nullptr;
    Index k_row = 0;
    pool->begin_range(key0, keys);
    for (Index c = 0; c < columns; ++c) {
      if (scratch.worker->stops(kColumn * keys)) return;
      const Lanes& at = lanes[c];
      const float* q_t = scratch.q_t + c * query_floats(p);
      bool any = false;
      each_tile(head, at.t, at.count, at.norm, key0, key0 + keys,
                [&](const Column& column, Index key, Index n) {
                  if (!k)
                    k = load_keys(head.k + key0 * p.k.t, p, keys, Use::kAlongRows, scratch.k,
                                  &k_row);
                  if (!any) pool->begin_column();
                  any = true;
                  probability_tile(head, column, at.norm, key, n, k + (key - key0) * k_row, k_row,
                                   q_t, scratch.s);
                  pool->add(c, column, key, n, scratch.s);
                });
      if (any) pool->end_column(at, to);
    }
  }
  for (Index c = 0; c < columns; ++c) pool->end_block(c, lanes[c], to);
}

// How a head's rows of cells are shared out: several to an item, or several items to one.
struct Shares {
  Index rows = 1, parts = 1, step = 0;  // step: queries of a part

  Shares(const PooledParams& p, Index T) {
    const Index queries = (T + p.rows - 1) / p.rows;  // of a row
    if (queries <= kBlock) {
      rows = T ? min_of(max_of(kBlock * p.rows / T, 1), p.rows) : p.rows;
      return;
    }
    parts = min_of((queries + kBlock - 1) / kBlock, max_of(kPartFloats / p.columns, 1));
    step = round_up((queries + parts - 1) / parts, kColumn);
  }
  Index items(const PooledParams& p) const {
    return parts > 1 ? p.rows * parts : (p.rows + rows - 1) / rows;
  }
};

Index queries_of(const PooledParams& p, Index b) {
  return p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.T;
}

float* cells_of(const PooledParams& p, Index b, Index h, Index row) {
  return p.pooled + ((b * p.H + h) * p.rows + row) * p.columns;
}

// Sums become means.
void finish_row(const PooledParams& p, const Cells& queries, Index S, Index row, float* cells) {
  if (p.kind != Pooling::kMean) return;
  const Index count = queries.begin(row + 1) - queries.begin(row);
  const Cells keys{S, p.columns};
  for (Index c = 0; count && c < p.columns; ++c) {
    const Index size = count * (keys.begin(c + 1) - keys.begin(c));
    if (size) cells[c] /= static_cast<float>(size);
  }
}

template <class Pool, class Element>
void pool_item(const PooledParams& p, const Block& at, float* of_part, const Scratch& scratch) {
  const Head<Element> head(p, at.b, at.h);
  const Cells queries{head.T, p.rows};
  const Shares shares(p, head.T);
  const bool whole = shares.parts == 1;
  const Index row = whole ? at.index * shares.rows : at.index / shares.parts;
  const Index end_row = whole ? min_of(row + shares.rows, p.rows) : row + 1;
  Index begin = queries.begin(row), end = queries.begin(end_row);
  if (!whole) {
    begin += at.index % shares.parts * shares.step;
    end = min_of(end, begin + shares.step);
  }
  const CellRows to{queries, row, p.columns, whole ? cells_of(p, at.b, at.h, row) : of_part};
  memset(to.data, 0, (end_row - row) * p.columns * sizeof(float));
  Pool pool(p, head, scratch.sums);
  for (Index t = begin; t < end; t += kBlock)
    pool_block(p, head, t, min_of(t + kBlock, end), to, &pool, scratch);
  for (Index r = row; whole && r < end_row; ++r)
    finish_row(p, queries, head.S, r, to.data + (r - row) * p.columns);
}

// A row of cells from those of its parts, in their order.
template <class Join>
void join_parts(const PooledParams& p, const Blocks& items, const float* cells) {
  for (Index head = 0; head < p.B * p.H; ++head) {
    const Index b = head / p.H, T = queries_of(p, b);
    const Shares shares(p, T);
    if (shares.parts == 1) continue;
    const Index S = p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.S;
    for (Index row = 0; row < p.rows; ++row) {
      const float* from = cells + (items.first_of(head) + row * shares.parts) * p.columns;
      float* to = cells_of(p, b, head % p.H, row);
      for (Index c = 0; c < p.columns; ++c) {
        to[c] = from[c];
        for (Index part = 1; part < shares.parts; ++part)
          to[c] = Join::join(to[c], from[part * p.columns + c]);
      }
      finish_row(p, Cells{T, p.rows}, S, row, to);
    }
  }
}

template <class Pool, class Join, class Element>
void pool_all(const PooledParams& p) {
  const Blocks items(p.B, p.H, [&](Index b) { return Shares(p, queries_of(p, b)).items(p); });
  bool in_parts = false;
  for (Index b = 0; b < p.B; ++b) in_parts |= Shares(p, queries_of(p, b)).parts > 1;
  const Arena memory(in_parts ? items.count() * p.columns * sizeof(float) : 0, p.footprint);
  float* cells = reinterpret_cast<float*>(memory.data());
  const auto prepare = [&](Parts& parts) {
    return Scratch(parts, p, RowsAsFloat<Element>::kPacks, Pool::floats(kMostColumns));
  };
  parallel(p, items.count(), 1, prepare, [&](Index i, const Scratch& scratch) {
    const Index item = items.count() - 1 - i;
    pool_item<Pool, Element>(p, items[item], cells + item * p.columns, scratch);
  });
  if (in_parts && !p.footprint) join_parts<Join>(p, items, cells);
}

}  // namespace

void attention_pooled(const PooledParams& p) {
  with_element(p.q.dtype, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    switch (p.kind) {
      case Pooling::kMean:
        return pool_all<Grid<Add>, Add, Element>(p);
      case Pooling::kLargest:
        return pool_all<Grid<Larger>, Larger, Element>(p);
      case Pooling::kByDistance:
        return pool_all<Distances, Add, Element>(p);
    }
  });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
