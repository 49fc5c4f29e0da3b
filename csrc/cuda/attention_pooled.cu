// Probabilities pooled into cells, or by distance: second passes over the scores, of one head dim,
// ATTNFAST_HEAD_DIM.
//   cells         the mean or the largest p of each cell of queries and keys
//   distances     sums of p over a cell's queries, by the power of two that t' - j lies under
// Grid:   cells: (batch entry, head, group of rows of cells, group of columns); distances: (batch
//         entry, head, group of rows of cells)
// Memory: one tile of q and one of k in shared memory; sums place by place of a tile, of cells in
//         registers, of distances beside the tiles. Cells end anywhere: where several share a block
//         all of their rows, or keys, fit into one tile and have a place each; where a cell is
//         larger than a tile all places are its own
// Limits: D up to kD; bf16, fp16
#include "launch.h"
#include "probabilities.h"

namespace attnfast::cuda {

// The first of n rows that a cell holds.
ATTNFAST_DEVICE int cell_begin(int64_t cell, int n, int64_t cells) {
  return static_cast<int>(cell * n / cells);
}

// A group of cells along one side, and the rows or keys that it holds.
struct Group {
  int64_t first, end;  // cells
  int begin, stop;

  ATTNFAST_DEVICE Group(int64_t index, int64_t of_group, int n, int64_t cells)
      : first(index * of_group),
        end(min_of(first + of_group, cells)),
        begin(cell_begin(first, n, cells)),
        stop(cell_begin(end, n, cells)) {}
  ATTNFAST_DEVICE bool has(int i) const { return i >= begin && i < stop; }
  // Where its tiles begin: with it, but that each lies in one block of a block mask.
  ATTNFAST_DEVICE int first_tile(bool in_blocks, int side) const {
    return in_blocks ? begin / side * side : begin;
  }
};

// Some queries of a tile, and the keys that they reach. A row of NaN is NaN at all keys.
struct Reach {
  bool has_nan = false;
  bool counts[2] = {};  // of a lane's two queries: not those that log2 l = inf leaves out
  int begin, end;

  ATTNFAST_DEVICE Reach(const PooledParams& p, const Head& head, const Group& of, int t0, int tile,
                        int warp, int lane) {
    const auto log2_l = [&](int t) {
      return of.has(t) ? load_global(p.norm + head.row_number(p, t) + p.norm_plane) : kInfinity;
    };
    for (int t = t0 + lane; t < t0 + tile; t += kWarpSize) {
      const float x = log2_l(t);
      has_nan |= x != x;
    }
    has_nan = any_lane(has_nan);
    ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
      counts[r] = log2_l(t0 + warp * 16 + r * 8 + lane / 4) != kInfinity;
    }
    begin = has_nan ? 0 : head.first_key(max_of(t0, of.begin));
    end = has_nan ? head.S : head.end_key(min_of(t0 + tile, of.stop) - 1);
  }
};

// probability_tile, and also where no key is in reach if some row is NaN.
template <class Element, int kD, int kN>
ATTNFAST_DEVICE bool pooled_tile(const PooledArguments& a, const Head& head, const Reach& reach,
                                 int t_block, int s0, float (&p)[1][kN][4], int warp, int lane) {
  if (probability_tile<Element, kD>(a, head, t_block, s0, p, warp, lane)) return true;
  if (!reach.has_nan) return false;
  const OwnNorms norms(a.p, head, t_block + warp * 16, lane);
  ATTNFAST_UNROLL for (int x = 0; x < kN * 4; ++x) {
    const float log2_l = norms.log2_l[x % 4 / 2];
    p[0][x / 4][x % 4] = log2_l != log2_l ? log2_l : 0.0f;
  }
  return true;
}

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((CellShape<kD>::kThreads), 1)
    attention_cells_kernel(ATTNFAST_PARAMS PooledArguments a) {
  using Shape = CellShape<kD>;
  if (!has_code<Element>()) return;
  const PooledParams& p = a.p;

  // Setup
  const int64_t column_groups = (p.columns + a.column_cells - 1) / a.column_cells;
  const int64_t row_groups = (p.rows + a.row_cells - 1) / a.row_cells;
  const int64_t index = block_index() / column_groups, bh = index / row_groups;
  const Head head(p, a.rows_q, a.rows_k, bh / p.H, bh % p.H);
  const Group queries(index % row_groups, a.row_cells, head.T, p.rows);
  const Group keys(block_index() % column_groups, a.column_cells, head.S, p.columns);
  const bool largest = p.kind == Pooling::kLargest, in_blocks = p.blocks.starts;
  const int t_first = queries.first_tile(in_blocks, Shape::kM);
  const int s_first = keys.first_tile(in_blocks, Shape::kN);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;

  // Scores, Probabilities: place by place
  float total[Shape::kN / 8][4] = {};
  for (int t = t_first; t < queries.stop; t += Shape::kM) {
    const Reach reach(p, head, queries, t, Shape::kM, warp, lane);
    const int s_end = min_of(reach.end, keys.stop);
    const int tiles = max_of(reach.begin - s_first, 0) / Shape::kN;
    for (int s0 = s_first + tiles * Shape::kN; s0 < s_end; s0 += Shape::kN) {
      float s[1][Shape::kN / 8][4];
      if (!pooled_tile<Element, kD>(a, head, reach, t, s0, s, warp, lane)) continue;
      ATTNFAST_UNROLL for (int x = 0; x < Shape::kN / 2; ++x) {
        const Position at = position_of<false>(t + warp * 16, s0, 0, x / 4, x % 4, lane);
        if (!reach.counts[x % 4 / 2] || !keys.has(at.key)) continue;
        const float own = s[0][x / 4][x % 4];
        float& sum = total[x / 4][x % 4];
        sum = !largest ? sum + own : own == own ? fmaxf(sum, own) : kInfinity;
      }
    }
  }

  // Rows of cells
  const uint32_t totals = shared_memory(), of_rows = totals + Shape::kTotals;
  const auto join = [&](float x, float y) { return largest ? fmaxf(x, y) : x + y; };
  sync_block();  // no warp reads the tiles any more
  ATTNFAST_UNROLL for (int x = 0; x < Shape::kN / 2; ++x) {
    const Position at = position_of<false>(warp * 16, 0, 0, x / 4, x % 4, lane);
    store_shared(totals + (at.t * Shape::kN + at.key) * 4, total[x / 4][x % 4]);
  }
  sync_block();
  const int rows = static_cast<int>(queries.end - queries.first);
  for (int r = warp; r < rows; r += Shape::kWarps) {
    const Group own(queries.first + r, 1, head.T, p.rows);
    float sum = 0.0f;
    for (int t = own.begin; t < min_of(own.stop, own.begin + Shape::kM); ++t) {
      const int place = (t - t_first) % Shape::kM;
      sum = join(sum, load_shared<float>(totals + (place * Shape::kN + lane) * 4));
    }
    store_shared(of_rows + (r * Shape::kN + lane) * 4, sum);
  }
  sync_block();

  // Store
  const int columns = static_cast<int>(keys.end - keys.first);
  for (int i = thread_index(); i < rows * columns; i += Shape::kThreads) {
    const int64_t r = queries.first + i / columns, c = keys.first + i % columns;
    const Group height(r, 1, head.T, p.rows), own(c, 1, head.S, p.columns);
    float sum = 0.0f;
    for (int s = own.begin; s < min_of(own.stop, own.begin + Shape::kN); ++s) {
      const int place = (s - s_first) % Shape::kN;
      sum = join(sum, load_shared<float>(of_rows + (i / columns * Shape::kN + place) * 4));
    }
    const int64_t size = int64_t{height.stop - height.begin} * (own.stop - own.begin);
    if (!largest) sum /= static_cast<float>(max_of<int64_t>(size, 1));
    if (sum == kInfinity) sum -= kInfinity;
    store_global(p.pooled + (bh * p.rows + r) * p.columns + c, sum);
  }
}

// The bin of a distance: 32 and, away from it, one more for each of its bits.
ATTNFAST_DEVICE int bin_of(int d) {
  int bits = 0;
  for (int64_t far = d < 0 ? -int64_t{d} : d; far > 0; far /= 2) ++bits;
  return d < 0 ? 32 - bits : 32 + bits;
}
// The least distance of a bin, and the largest.
ATTNFAST_DEVICE int64_t least_of(int bin) {
  return bin > 32 ? int64_t{1} << (bin - 33) : bin == 32 ? 0 : 1 - (int64_t{1} << (32 - bin));
}

// Sums of distances' bins, in shared memory: row by row, in places in which the rows of a warp fall
// into different banks.
ATTNFAST_DEVICE uint32_t bin_at(uint32_t sums, int row, int bin) {
  return sums + (row * kBins + (bin ^ (row & 15))) * 4;
}

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((DistanceShape<kD>::kThreads), 1)
    attention_distances_kernel(ATTNFAST_PARAMS PooledArguments a) {
  using Shape = DistanceShape<kD>;
  if (!has_code<Element>()) return;
  const PooledParams& p = a.p;

  // Setup: the last rows first, under causal the longest
  const int64_t groups = (p.rows + a.row_cells - 1) / a.row_cells, bh = block_index() / groups;
  const Head head(p, a.rows_q, a.rows_k, bh / p.H, bh % p.H);
  const Group queries(groups - 1 - block_index() % groups, a.row_cells, head.T, p.rows);
  const int t_first = queries.first_tile(p.blocks.starts, Shape::kM);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  // A lane adds to one of its two rows, and there to even bins or to odd ones.
  const int own_row = warp * 16 + lane / 4 + lane % 2 * 8, own_bins = lane / 2 % 2;
  const uint32_t sums = shared_memory() + Shape::kTiles;
  for (int bin = own_bins; bin < kBins; bin += 2) store_shared(bin_at(sums, own_row, bin), 0.0f);
  const int64_t batch = p.cu_seqlens_q ? 0 : head.b;
  const int32_t* tokens_q = p.tokens_q + batch * a.rows_q + head.q_begin;
  const int32_t* tokens_k = p.tokens_k + batch * a.rows_k + head.k_begin;

  // Scores, Probabilities: bin by bin of those that a warp's tile crosses
  float first[2] = {}, same[2] = {};
  for (int t = t_first; t < queries.stop; t += Shape::kM) {
    const Reach reach(p, head, queries, t, Shape::kM, warp, lane);
    for (int s0 = reach.begin / Shape::kN * Shape::kN; s0 < reach.end; s0 += Shape::kN) {
      float s[1][Shape::kN / 8][4];
      if (!pooled_tile<Element, kD>(a, head, reach, t, s0, s, warp, lane)) continue;
      const int t0 = t + warp * 16, near = t0 + head.shift - s0;
      const auto each = [&](auto f) {
        ATTNFAST_UNROLL for (int x = 0; x < Shape::kN / 2; ++x) {
          f(s[0][x / 4][x % 4], position_of<false>(t0, s0, 0, x / 4, x % 4, lane), x % 4 / 2);
        }
      };
      each([&](float& own, Position at, int r) {
        if (!reach.counts[r] || at.key >= head.S) own = 0.0f;
      });
      const int last = bin_of(near + 15);
      for (int bin = bin_of(near - (Shape::kN - 1)); bin <= last; ++bin) {
        const auto least = static_cast<int>(least_of(bin));
        const auto most = static_cast<int>(least_of(bin + 1) - 1);
        float sum[2] = {};
        each([&](float own, Position at, int r) {
          const int d = at.t + head.shift - at.key;
          if (d >= least && d <= most) sum[r] += own;
        });
        ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
          sum[r] += shuffle_xor(sum[r], 1);
          sum[r] += shuffle_xor(sum[r], 2);
        }
        if (bin % 2 != own_bins) continue;
        const uint32_t at = bin_at(sums, own_row, bin);
        store_shared(at, load_shared<float>(at) + (lane % 2 ? sum[1] : sum[0]));
      }
      if (s0 == 0 && lane % 4 == 0) first[0] += s[0][0][0], first[1] += s[0][0][2];
      if (!p.tokens_q) continue;
      each([&](float own, Position at, int r) {
        if (!reach.counts[r] || at.key >= head.S || at.t + head.shift == at.key) return;
        if (load_global(tokens_q + at.t) == load_global(tokens_k + at.key)) same[r] += own;
      });
    }
  }

  // Rows
  const uint32_t others = shared_memory();  // [kM][2]: what follows the bins
  sync_block();                             // no warp reads the tiles any more
  ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
    same[r] += shuffle_xor(same[r], 1);
    same[r] += shuffle_xor(same[r], 2);
    if (lane % 4) continue;
    store_shared(others + (warp * 16 + r * 8 + lane / 4) * 8, Floats2{first[r], same[r]});
  }
  sync_block();

  // Store: row of cells by row of cells
  const int rows = static_cast<int>(queries.end - queries.first);
  for (int i = thread_index(); i < rows * kDistances; i += Shape::kThreads) {
    const int64_t r = queries.first + i / kDistances;
    const int column = i % kDistances;
    const Group own(r, 1, head.T, p.rows);
    float sum = 0.0f;
    for (int t = own.begin; t < min_of(own.stop, own.begin + Shape::kM); ++t) {
      const int place = (t - t_first) % Shape::kM;
      sum += load_shared<float>(column < kBins ? bin_at(sums, place, column)
                                               : others + (place * 2 + column - kBins) * 4);
    }
    store_global(p.pooled + (bh * p.rows + r) * kDistances + column, sum);
  }
}

namespace {

// How many neighbouring cells of n rows a tile surely holds, or 1.
int64_t cells_in_tile(int64_t n, int64_t cells, int64_t side) {
  return std::max<int64_t>(1, side / std::max<int64_t>(1, (n + cells - 1) / cells));
}

template <class Element>
void run(const PooledArguments& arguments, Stream stream) {
  constexpr int kD = ATTNFAST_HEAD_DIM;
  using Cells = CellShape<kD>;
  using Distances = DistanceShape<kD>;
  static_assert(Cells::kSharedBytes <= kTuringShared && Distances::kSharedBytes <= kTuringShared);
  PooledArguments a = arguments;
  const PooledParams& p = a.p;
  a.row_cells = cells_in_tile(p.T, p.rows, Cells::kM);
  a.column_cells = cells_in_tile(p.S, p.columns, Cells::kN);
  const int64_t row_groups = p.B * p.H * ((p.rows + a.row_cells - 1) / a.row_cells);
  const int64_t groups = row_groups * ((p.columns + a.column_cells - 1) / a.column_cells);
  const auto start = [&](const char* name, auto kernel, int64_t blocks, int shared_bytes) {
    launch<PooledArguments>(kernel_name<Element, kD, false>(name), kernel, blocks, Cells::kThreads,
                            shared_bytes, stream, a);
  };
  if (p.kind == Pooling::kByDistance) {
    start("attention_distances", attention_distances_kernel<Element, kD>, row_groups,
          Distances::kSharedBytes);
  } else {
    start("attention_cells", attention_cells_kernel<Element, kD>, groups, Cells::kSharedBytes);
  }
}

}  // namespace

template <>
void run_attention_pooled<ATTNFAST_HEAD_DIM>(const PooledArguments& a, Stream stream) {
  a.p.q.dtype == DType::kFloat16 ? run<Float16>(a, stream) : run<BFloat16>(a, stream);
}

}  // namespace attnfast::cuda
