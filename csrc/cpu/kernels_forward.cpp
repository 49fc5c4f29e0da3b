// Attention forward, one block of queries at a time (FlashAttention-2, Algorithm 1, with the
// queries in lanes).
//
//   o = softmax(scale * q k^T, masked, biased, capped) v        lse = logsumexp of the scores
//
// Work:    one item per (batch entry, head, block of queries), heaviest causal blocks first
// Memory:  per thread the block's transposed q and o and one tile of scores; what of k and v cannot
//          be read in place (keys.h), packed: a tile per thread, or the key heads in work
// Pairs:   where the processor multiplies pairs of bf16 (AVX512_BF16, AMX), both products of bf16
//          inputs do, p rounded to bf16; with AMX those of fp32 inputs too, in three planes
//          (pairs.h)
// Threads: items are independent; a row's result depends on its own sequence alone
#include <type_traits>

#include "kernels.h"
#include "keys.h"
#include "scores.h"
#include "team.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

// Raising the running maximum means rescaling o; until a lane has grown this much (in powers of
// two) it waits.
constexpr float kLazyRise = 8.0f;

// Cache lines of the next item asked for with each tile, and the most rows of an item for which
// that is done. Items with more rows ask for their own next tile.
constexpr Index kLinesPerTile = 256;
constexpr Index kPrefetchRows = 256;

struct ColumnState {
  float m[kColumn], l[kColumn];            // running maximum, in the scores' units, and sum
  float entropy[kColumn], reach[kColumn];  // sum of p (s - m), sum of p |j - t'|
  float* q_t;                              // [D][kColumn], or pairs of D
  float* o_t;                              // [D_v][kColumn]
  Start start;                             // whether o_t holds anything yet
};

template <bool kStats>
void rescale(ColumnState& state, const float* tile_max, float to_log2, Index D_v) {
  const float rise = kStats ? 0.0f : kLazyRise / to_log2;
  IVec grown{};
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    grown |= load(tile_max + lane) > load(state.m + lane) + rise;
  }
  if (!any(grown)) return;
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Vec old = load(state.m + lane);
    const Vec m = max(load(tile_max + lane), old);
    const Vec base = m == -kInfinity ? zeros() : m;
    const Vec keep = exp2((old - base) * to_log2);
    const Vec l = load(state.l + lane);
    if (kStats) {
      const Vec moved = l * (old - base);  // may be -inf where nothing is kept
      store(state.entropy + lane,
            keep == 0.0f ? zeros() : keep * (load(state.entropy + lane) + moved));
      store(state.reach + lane, keep * load(state.reach + lane));
    }
    store(state.m + lane, m);
    store(state.l + lane, l * keep);
    if (state.start == Start::kZero) continue;
    for (Index d = 0; d < D_v; ++d) {
      float* o = state.o_t + d * kColumn + lane;
      store(o, load(o) * keep);
    }
  }
}

// s -> p = exp2((s - m) * to_log2) in place, folded into l and the statistics. Unless kScaled,
// to_log2 is 1.
template <bool kStats, bool kScaled>
void exponentiate(ColumnState& state, const Column& column, Index shift, Index key, Index n,
                  float to_log2, float* s) {
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Vec m = load(state.m + lane);
    const Vec base = m == -kInfinity ? zeros() : m;
    const IVec t = positions(column, shift, lane);
    Vec l = zeros(), entropy = zeros(), reach = zeros();
    for (Index j = 0; j < n; ++j) {
      float* x = s + j * kColumn + lane;
      const Vec relative = load(x) - base;
      const Vec p = exp2(kScaled ? relative * to_log2 : relative);
      l += p;
      if (kStats) {
        entropy += p > 0.0f ? p * relative : zeros();
        reach += p * abs(__builtin_convertvector(t - static_cast<int32_t>(key + j), Vec));
      }
      store(x, p);
    }
    store(state.l + lane, load(state.l + lane) + l);
    if (kStats) {
      store(state.entropy + lane, load(state.entropy + lane) + entropy);
      store(state.reach + lane, load(state.reach + lane) + reach);
    }
  }
}

// The same without statistics, p leaving as pairs of keys.
template <bool kScaled, int kPlanes>
void exponentiate_pairs(ColumnState& state, Index n, float to_log2, const float* s, float* pairs,
                        Index plane) {
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Vec m = load(state.m + lane);
    const Vec base = m == -kInfinity ? zeros() : m;
    const auto p_of = [&](Index j) {
      const Vec relative = load(s + j * kColumn + lane) - base;
      return exp2(kScaled ? relative * to_log2 : relative);
    };
    Vec l_even = zeros(), l_odd = zeros();
    Index j = 0;
    for (; j + 1 < n; j += 2) {
      const Vec even = p_of(j), odd = p_of(j + 1);
      l_even += even, l_odd += odd;
      store_pairs<kPlanes>(even, odd, pairs + j / 2 * kColumn + lane, plane);
    }
    if (j < n) {
      const Vec even = p_of(j);
      l_even += even;
      store_pairs<kPlanes>(even, zeros(), pairs + j / 2 * kColumn + lane, plane);
    }
    store(state.l + lane, load(state.l + lane) + (l_even + l_odd));
  }
}

constexpr Index kPairKeys = 64;                         // of one tile on pairs
constexpr Index kPairsPlane = kPairKeys / 2 * kColumn;  // of p in pairs of keys

struct Scratch {
  float *s, *keep;
  float *k, *v;              // a packed tile
  float *p_pairs, *v_clean;  // [planes][kMaxKeys / 2][kColumn]; a tile of v
  ColumnState* columns;
  Prefetcher next_item, next_tile;
  Index next_tile_lines = 0;  // asked for with each column
  Worker* worker = nullptr;

  template <class Element, int kPlanes>
  Scratch(Parts& parts, const Problem& p, Index num_columns,
          const PackedHeads<Element, kPlanes>& packed) {
    const auto floats = [&](Index n) { return parts.take<float>(n); };
    s = floats((kMaxKeys + kTileSize) * kColumn);
    keep = floats(p.dropout_p > 0.0 ? kMaxKeys * kColumn : 0);
    columns = parts.take<ColumnState>(num_columns);
    constexpr Index kPlaneCount = kPlanes ? kPlanes : 1;
    for (Index c = 0; c < num_columns; ++c) {
      float* q_t = floats(kPlaneCount * round_up(p.D, kPanel) * kColumn);
      float* o_t = floats(round_up(p.D_v, kTileSize) * kColumn);
      if (columns) columns[c].q_t = q_t, columns[c].o_t = o_t;
    }
    p_pairs = floats(kPlanes * kPairsPlane);
    v_clean = floats(kPlanes ? packed.layout.v_floats(kMaxKeys) : 0);
    const bool packs_tiles = kPlanes < 2 && !packed.by_team();
    Index k_tile = packs_tiles ? packed.layout.k_floats(kMaxKeys) : 0;
    Index v_tile = packs_tiles ? packed.layout.v_floats(kMaxKeys) : 0;
    if (kPlanes > 1) v_tile = KeyLayout<Element, 0>(p).v_floats(kMaxKeys);  // out of range: in fp32
    k = floats(k_tile);
    v = floats(v_tile);
  }
};

// The tile of keys key .. key + n - 1, packed by the team or into scratch.
template <class Element, int kPlanes>
KeyTile load_keys(const Head<Element>& head, Index key, Index n,
                  const PackedHeads<Element, kPlanes>& packed, Scratch& scratch) {
  const Problem& p = head.problem;
  const KeyLayout<Element, kPlanes>& layout = packed.layout;
  if (packed.by_team()) {
    const Index index = head.b * p.H_kv + head.h / (p.H / p.H_kv);
    return layout.tile(head, key, packed.k(index), packed.v(index), packed.capacity(index));
  }
  Peaks peaks;
  layout.pack(head, key, n, scratch.k, scratch.v, kMaxKeys, &peaks);
  return layout.tile(head, key, scratch.k ? scratch.k - key * layout.k_row : nullptr,
                     scratch.v ? scratch.v - layout.v_offset(key) : nullptr, kMaxKeys);
}

// Keys per tile: about what the first-level cache holds of k or v. Tile registers take what the
// second level holds.
template <int kPlanes>
Index keys_per_tile(const Problem& p) {
  if (kPlanes) return kPairKeys;
  const Index fits = (36 << 10) / (sizeof(float) * max_of(max_of(p.D, p.D_v), 1));
  return min_of(max_of(fits / kTileRows * kTileRows, 4 * kTileRows), kMaxKeys);
}

// Keys first .. first + n - 1 of a tile that begins with key `tile_key`.
template <bool kStats, bool kScaled, int kPlanes, class Element>
void tile_step(const ForwardParams& p, const Head<Element>& head, const Column& column,
               ColumnState& state, Index tile_key, Index first, Index n, const KeyTile& tile,
               Scratch& scratch) {
  float tile_max[kColumn];
  for (Index lane = 0; lane < kColumn; lane += kLanes)
    store(tile_max + lane, broadcast(-kInfinity));
  const Index skip = first - tile_key;
  const float* k = tile.k + skip * tile.k_row;
  DeadKeys dead;
  if constexpr (kPlanes > 0) {
    const Index panels = (p.D + kPanel - 1) / kPanel;
    const PairScores<kPlanes> scores{{state.q_t, kColumn, panels * kPanelPairs * kColumn},
                                     {k, tile.k_row, kPanelPairs, tile.k_plane},
                                     panels,
                                     kPlanes > 1 ? 1.0f : head.q_factor};
    score_tile(head, column, first, n, scores, scratch.s, nullptr, tile_max, &dead);
  } else {
    const FloatScores scores{state.q_t, k, tile.k_row, p.D};
    score_tile(head, column, first, n, scores, scratch.s, nullptr, tile_max, &dead);
  }
  scratch.next_item.advance(kLinesPerTile);
  scratch.next_tile.advance(scratch.next_tile_lines);
  rescale<kStats>(state, tile_max, head.to_log2, p.D_v);
  const bool drops = p.dropout_p > 0.0;
  const Index lead = kPlanes ? skip % kPanel : 0;  // keys of the first panel that come before
  float* pairs = scratch.p_pairs + lead / 2 * kColumn;
  if (kPlanes && !kStats && !drops) {
    if constexpr (kPlanes > 0)
      exponentiate_pairs<kScaled, kPlanes>(state, n, head.to_log2, scratch.s, pairs, kPairsPlane);
  } else {
    exponentiate<kStats, kScaled>(state, column, head.shift, first, n, head.to_log2, scratch.s);
    if (drops) {
      dropout_tile(head, column, first, n, 1.0f, scratch.keep);
      for (Index i = 0; i < n * kColumn; i += kLanes) {
        store(scratch.s + i, load(scratch.s + i) * load(scratch.keep + i));
      }
    }
    if constexpr (kPlanes > 0)
      pack_row_pairs_in_planes<kPlanes>(scratch.s, kColumn, n, kColumn, n + n % 2, 1.0f, pairs,
                                        kColumn, kPairsPlane);
  }
  if constexpr (kPlanes > 0) {
    const Index panels = (lead + n + kPanel - 1) / kPanel, end = (lead + n + 1) / 2;
    for (int plane = 0; plane < kPlanes; ++plane) {
      float* all = scratch.p_pairs + plane * kPairsPlane;
      memset(all, 0, lead / 2 * kColumn * sizeof(float));
      memset(all + end * kColumn, 0, (panels * kPanelPairs - end) * kColumn * sizeof(float));
    }
    const Index D_v_pad = round_up(p.D_v, kTileSize), panel_floats = D_v_pad * kPanelPairs;
    const LiveKeys live{lead, lead + n, column.begin - first + lead, column.end - first + lead,
                        dead};
    Index v_plane = tile.v_plane;
    const float* v = without_poison<kPlanes>(tile.v + skip / kPanel * panel_floats, D_v_pad,
                                             tile.v_plane, panels, live, scratch.v_clean, &v_plane);
    multiply_pairs<kPlanes>(p.D_v, kColumn, panels, PairsA{v, kPanelPairs, panel_floats, v_plane},
                            PairsB{scratch.p_pairs, kColumn, kPairsPlane},
                            MatrixC{state.o_t, kColumn}, state.start);
    state.start = Start::kAccumulate;
  } else {
    state.start = gather_keys(tile.v + skip * tile.v_row, tile.v_row, n, p.D_v, scratch.s,
                              state.o_t, state.start, dead);
  }
}

// The sums become the output row, lse, norm and statistics.
template <class Element>
void finish_column(const ForwardParams& p, const Head<Element>& head, const Column& column,
                   ColumnState& state) {
  const float to_log2 = head.to_log2, to_natural = head.to_natural;
  const float kept = p.dropout_p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout_p));
  alignas(64) float factor[kColumn], lse[kColumn], base_of[kColumn], log_l_of[kColumn],
      max_logit[kColumn], entropy[kColumn], reach[kColumn], focus[kColumn];
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Vec m = load(state.m + lane);
    Vec top = m, l = load(state.l + lane), h = load(state.entropy + lane), shrink = broadcast(1.0f);
    Vec top_natural = m * to_natural;
    if (p.sinks) {
      const Vec sink = broadcast(head.sink);
      top = max(sink, m);
      top_natural = sink >= m ? broadcast(p.sinks[head.h]) : top_natural;
      const Vec base = top == -kInfinity ? zeros() : top;
      const Vec fall = l == 0.0f ? zeros() : m - base;
      shrink = l == 0.0f ? broadcast(1.0f) : exp2(fall * to_log2);
      const Vec sink_p = exp2((sink - base) * to_log2);
      h = (shrink == 0.0f ? zeros() : (h + l * fall) * shrink) +
          (sink_p > 0.0f ? sink_p * (sink - base) : zeros());
      l = l * shrink + sink_p;
    }
    const Vec log2_l = log2(l), log_l = log2_l * kLn2;
    const IVec empty = l == 0.0f;
    const Vec inverse = empty ? zeros() : 1.0f / l;
    store(factor + lane, inverse * shrink * kept);
    store(lse + lane, empty ? broadcast(-kInfinity) : top_natural + log_l);
    store(base_of + lane, empty ? zeros() : top);
    store(log_l_of + lane, empty ? broadcast(kInfinity) : log2_l);
    store(max_logit + lane, m * to_natural);
    store(entropy + lane, empty ? zeros() : log_l - h * inverse * to_natural);
    store(reach + lane, load(state.reach + lane) * shrink * inverse);
    store(focus + lane, m == -kInfinity ? zeros() : shrink * inverse);
  }
  const Index row = head.b * (p.cu_seqlens_q ? 0 : p.lse_stride_b) + head.h * p.lse_stride_h +
                    head.q_begin + column.t0;
  const auto write = [&](float* to, const float* from) {
    memcpy(to + row, from, column.rows * sizeof(float));
  };
  write(p.lse, lse), write(p.norm, base_of), write(p.norm + p.norm_plane, log_l_of);
  if (p.max_logit) {
    write(p.max_logit, max_logit), write(p.entropy, entropy);
    write(p.reach, reach), write(p.focus, focus);
  }
  if (state.start == Start::kZero) memset(state.o_t, 0, p.D_v * kColumn * sizeof(float));
  Element* out = static_cast<Element*>(p.out.data) + head.b * p.out.b + head.h * p.out.h +
                 (head.q_begin + column.t0) * p.out.t;
  transpose_out(state.o_t, column.rows, p.D_v, factor, out, p.out.t);
}

// False, with nothing done, where the block's queries are out of the range of their planes.
template <bool kStats, bool kScaled, class Element, int kPlanes>
bool query_block(const ForwardParams& p, const Head<Element>& head, Index t0, Index rows,
                 const PackedHeads<Element, kPlanes>& packed, Scratch& scratch) {
  const Index num_columns = (rows + kColumn - 1) / kColumn;
  Index begin = head.S, end = 0;
  for (Index c = 0; c < num_columns; ++c) {
    const Column column(head, t0 + c * kColumn, min_of(rows - c * kColumn, kColumn));
    ColumnState& state = scratch.columns[c];
    state.start = Start::kZero;
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      store(state.m + lane, broadcast(-kInfinity));
      store(state.l + lane, zeros());
      store(state.entropy + lane, zeros());
      store(state.reach + lane, zeros());
    }
    const Element* q = head.q + column.t0 * p.q.t;
    if constexpr (kPlanes > 0) {
      Peak peak;
      transpose_column_in_planes<kPlanes>(q, p.q.t, column.rows, p.D,
                                          kPlanes > 1 ? head.q_factor : 1.0f, state.q_t,
                                          round_up(p.D, kPanel) / 2 * kColumn, &peak);
      if (kPlanes > 1 && !Peak::in_range(peak.get())) return false;
    } else {
      transpose_in(q, p.q.t, column.rows, p.D, head.q_factor, state.q_t);
    }
    if (column.begin < column.end) {
      begin = min_of(begin, column.begin);
      end = max_of(end, column.end);
    }
  }
  // A sequence has the same tiles whatever the block. With pairs, they begin with a panel and the
  // parts of one with a tile register's rows, or with a pair; keys too many are masked by their
  // position.
  constexpr Index kUnit = kPlanes ? (kHasTiles ? kTileSize : 2) : 1;
  const Index most = keys_per_tile<kPlanes>(p);
  const Index origin = head.live_begin - (kPlanes ? head.live_begin % kPanel : 0);
  const Index span = max_of(head.live_end - origin, 1), tiles = (span + most - 1) / most;
  const Index step =
      min_of(round_up((span + tiles - 1) / tiles, kPlanes ? kPanel : kTileRows), most);
  begin -= (begin - origin) % step;
  const bool in_rows = packed.by_team() || !packed.layout.packs();  // one tile follows the other
  const bool asks_ahead = !kPlanes && in_rows && outgrows_cache(p, head.S);
  for (Index key = begin; key < end; key += step) {
    const Index n = min_of(step, end - key);
    if (scratch.worker->stops(rows * n)) return true;
    const KeyTile tile = load_keys(head, key, n, packed, scratch);
    scratch.next_tile.clear();
    if (asks_ahead) {
      const Index next = min_of(step, end - key - n);
      scratch.next_tile.add(tile.k + n * tile.k_row, tile.k_row, next, p.D);
      scratch.next_tile.add(tile.v + n * tile.v_row, tile.v_row, next, p.D_v);
      scratch.next_tile_lines = (scratch.next_tile.lines() + num_columns - 1) / num_columns;
    }
    for (Index c = 0; c < num_columns; ++c) {
      const Column column(head, t0 + c * kColumn, min_of(rows - c * kColumn, kColumn));
      Index first = max_of(key, column.begin), last = min_of(key + n, column.end);
      if (first >= last) continue;
      first -= (first - key) % kUnit;
      tile_step<kStats, kScaled, kPlanes>(p, head, column, scratch.columns[c], key, first,
                                          last - first, tile, scratch);
    }
  }
  for (Index c = 0; c < num_columns; ++c) {
    const Column column(head, t0 + c * kColumn, min_of(rows - c * kColumn, kColumn));
    finish_column(p, head, column, scratch.columns[c]);
  }
  return true;
}

// Short heads are over before the hardware sees a pattern in their rows.
template <class Element>
void prefetch_head(const ForwardParams& p, Index head_index, Prefetcher* next) {
  const Head<Element> head(p, head_index / p.H, head_index % p.H);
  next->add(head.q, p.q.t, head.T, p.D);
  next->add(head.k, p.k.t, head.S, p.D);
  next->add(head.v, p.v.t, head.S, p.D_v);
}

template <class Element, int kPlanes>
auto query_block_for(const ForwardParams& p) {
  const bool scaled = kPlanes == 1 || Scaling(p).unit == 1.0f;
  if (p.max_logit)
    return scaled ? query_block<true, true, Element, kPlanes>
                  : query_block<true, false, Element, kPlanes>;
  return scaled ? query_block<false, true, Element, kPlanes>
                : query_block<false, false, Element, kPlanes>;
}

template <class Element, int kPlanes>
void forward(const ForwardParams& p) {
  const Index block = kPlanes ? kTallBlock : queries_per_block(p);
  const Blocks blocks(p.cu_seqlens_q, p.B, p.H, p.T, block);
  if (blocks.count() == 0) return;
  const auto run = query_block_for<Element, kPlanes>(p);
  const Index group = p.H / p.H_kv, key_heads = p.B * p.H_kv;
  PackedHeads<Element, kPlanes> packed(p, group * ((p.T + block - 1) / block));
  [[maybe_unused]] const auto run_in_fp32 = query_block_for<Element, 0>(p);
  [[maybe_unused]] const PackedHeads<Element, 0> in_fp32(p, 1);  // items read for themselves
  const bool prefetches = p.T <= kPrefetchRows && p.S <= kPrefetchRows && !packed.by_team();
  for (Index first = 0, last; first < key_heads; first = last) {
    last = packed.by_team() ? packed.pack_from(p, first) : key_heads;
    const Index first_item = blocks.first_of(first * group);
    const Index items = blocks.first_of(last * group) - first_item;
    const Index shares = items / (usable_threads(p.num_threads) * 8);
    const auto prepare = [&](Parts& parts) {
      return Scratch(parts, p, (min_of(block, p.T) + kColumn - 1) / kColumn, packed);
    };
    const auto attend = [&](Index item, Scratch& scratch) {
      const Block at = blocks[first_item + item];
      const Index t0 = (at.count - 1 - at.index) * block, head_index = at.b * p.H + at.h;
      const Head<Element> head(p, at.b, at.h);
      scratch.next_item.clear();
      if (prefetches && t0 == 0 && head_index + 1 < p.B * p.H)
        prefetch_head<Element>(p, head_index + 1, &scratch.next_item);
      const Index rows = min_of(block, head.T - t0);
      if constexpr (kPlanes > 1) {
        if (!packed.by_team() || !packed.in_range(head_index / group) ||
            !run(p, head, t0, rows, packed, scratch)) {
          run_in_fp32(p, head, t0, rows, in_fp32, scratch);
        }
      } else {
        run(p, head, t0, rows, packed, scratch);
      }
    };
    parallel(p, items, prefetches ? max_of(min_of(shares, 8), 1) : 1, prepare, attend);
  }
}

}  // namespace

void attention_fwd(const ForwardParams& p) {
  with_element(p.q.dtype, [&]([[maybe_unused]] auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    constexpr int kPlanes = kPlanesOf<Element>;
    const bool passes_follow = p.weights_mode != Weights::kNone || p.received;  // in fp32
    if (kPlanes > 1 && (passes_follow || p.T * (p.H / p.H_kv) < kFewestQueries)) {
      forward<Element, 0>(p);
    } else {
      forward<Element, kPlanes>(p);
    }
  });
  if (p.weights_mode != Weights::kNone) weights_fwd(p);
  if (p.received) received_fwd(p);
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
