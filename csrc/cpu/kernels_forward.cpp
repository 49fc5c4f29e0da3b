// Attention forward, one block of queries at a time (FlashAttention-2, Algorithm 1, with the
// queries in lanes).
//
//   o = softmax(scale * q k^T, masked, biased, capped) v        lse = logsumexp of the scores
//
// Work:    one item per (batch entry, head, block of queries), heaviest causal blocks first
// Memory:  per thread the block's transposed q and o and one tile of scores; what of k and v cannot
//          be read in place (keys.h), packed: a tile per thread, or the key heads in work
// bf16:    where the processor multiplies pairs of bf16 (AVX512_BF16), both products do: q k^T
//          along the rows as they lie, p v on pairs of keys, p rounded to bf16
// Threads: items are independent; a row's result depends on its own sequence alone
#include "arena.h"
#include "kernels.h"
#include "keys.h"
#include "scores.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

// Raising the running maximum means rescaling o; until a lane has grown this much (in powers of
// two) it waits.
constexpr float kLazyRise = 8.0f;

// Cache lines of the next item asked for with each tile, and the most rows of an item for which
// that is done.
constexpr Index kLinesPerTile = 256;
constexpr Index kPrefetchRows = 256;

struct ColumnState {
  float m[kColumn], l[kColumn];            // running maximum and sum
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
      const Vec moved = l == 0.0f ? zeros() : l * (old - base);
      store(state.entropy + lane, keep * (load(state.entropy + lane) + moved));
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

// s -> p = exp2(s - m) in place, folded into l and the statistics.
template <bool kStats, bool kNatural>
void exponentiate(ColumnState& state, const Column& column, Index shift, Index key, Index n,
                  float* s) {
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Vec m = load(state.m + lane);
    const Vec base = m == -kInfinity ? zeros() : m;
    const IVec t = positions(column, shift, lane);
    Vec l = zeros(), entropy = zeros(), reach = zeros();
    for (Index j = 0; j < n; ++j) {
      float* x = s + j * kColumn + lane;
      const Vec relative = load(x) - base;
      const Vec p = exp2(kNatural ? relative * kLog2E : relative);
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

struct Scratch {
  float *s, *keep, *k, *v;
  float *p_pairs, *v_clean;  // [kMaxKeys / 2][kColumn], [kMaxKeys / 2][D_v]: pairs of keys
  ColumnState* columns;
  Prefetcher next;

  template <class Element>
  static size_t bytes(const Problem& p, Index num_columns, const PackedHeads<Element>& packed) {
    size_t n = Arena::bytes_for<float>(kMaxKeys * kColumn) * (p.dropout_p > 0.0 ? 2 : 1);
    n += Arena::bytes_for<ColumnState>(num_columns);
    n += num_columns *
         (Arena::bytes_for<float>(p.D * kColumn) + Arena::bytes_for<float>(p.D_v * kColumn));
    if (kPairsOf<Element>)
      n += Arena::bytes_for<float>(kMaxKeys / 2 * kColumn) +
           Arena::bytes_for<float>(kMaxKeys / 2 * round_up(p.D_v, kLanes));
    if (packed.most) return n;
    return n + Arena::bytes_for<float>(packed.layout.k_floats(kMaxKeys)) +
           Arena::bytes_for<float>(packed.layout.v_floats(kMaxKeys));
  }

  template <class Element>
  void take(Arena& arena, const Problem& p, Index num_columns, const PackedHeads<Element>& packed) {
    arena.reset(bytes(p, num_columns, packed));
    s = arena.take<float>(kMaxKeys * kColumn);
    keep = p.dropout_p > 0.0 ? arena.take<float>(kMaxKeys * kColumn) : nullptr;
    columns = arena.take<ColumnState>(num_columns);
    for (Index c = 0; c < num_columns; ++c) {
      columns[c].q_t = arena.take<float>(p.D * kColumn);
      columns[c].o_t = arena.take<float>(p.D_v * kColumn);
    }
    if (kPairsOf<Element>) {
      p_pairs = arena.take<float>(kMaxKeys / 2 * kColumn);
      v_clean = arena.take<float>(kMaxKeys / 2 * round_up(p.D_v, kLanes));
    }
    if (packed.most) return;
    k = arena.take<float>(packed.layout.k_floats(kMaxKeys));
    v = arena.take<float>(packed.layout.v_floats(kMaxKeys));
  }
};

template <class Element>
KeyTile load_keys(const Head<Element>& head, Index key, Index n, const PackedHeads<Element>& packed,
                  Scratch& scratch) {
  const Problem& p = head.problem;
  if (packed.most) {
    const Index index = head.b * p.H_kv + head.h / (p.H / p.H_kv);
    return packed.layout.tile(head, key, packed.k(index), packed.v(index));
  }
  packed.layout.pack(head, key, n, scratch.k, scratch.v);
  KeyTile tile = packed.layout.tile(head, key, nullptr, nullptr);
  if (packed.layout.packs_k) tile.k = scratch.k;
  if (packed.layout.packs_v) tile.v = scratch.v;
  return tile;
}

// The pairs of v without what keys that nobody attends to hold, where that is NaN or Inf.
const float* without_poison(const float* v, Index v_row, Index n, Index D_v, const DeadKeys& dead,
                            float* clean) {
  if (!dead.any) return v;
  const Index pairs = (n + 1) / 2;
  const float* result = v;
  for (Index j = 0; j < n; ++j) {
    if (!dead.key[j]) continue;
    const uint32_t half = j % 2 ? 0xffff0000u : 0x0000ffffu;
    const uint32_t exponent = 0x7f807f80u & half;
    IVec poison{};
    for (Index d = 0; d < D_v; d += kLanes)
      poison |= (bit_cast<UVec>(load(result + j / 2 * v_row + d)) & exponent) == exponent;
    if (!any(poison)) continue;
    if (result == v) memcpy(clean, v, pairs * v_row * sizeof(float));
    result = clean;
    for (Index d = 0; d < D_v; d += kLanes) {
      float* x = clean + j / 2 * v_row + d;
      store(x, bit_cast<Vec>(bit_cast<UVec>(load(x)) & ~half));
    }
  }
  return result;
}

// o += v^T p on pairs of keys.
Start gather_pairs(const float* v, Index v_row, Index n, Index D_v, const DeadKeys& dead,
                   ColumnState& state, Scratch& scratch) {
  const float* s = scratch.s;
  for (Index j = 0; j < n; j += 2) {
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      const Vec even = load(s + j * kColumn + lane);
      const Vec odd = j + 1 < n ? load(s + (j + 1) * kColumn + lane) : zeros();
      store(scratch.p_pairs + j / 2 * kColumn + lane, pair_of(even, odd));
    }
  }
  v = without_poison(v, v_row, n, D_v, dead, scratch.v_clean);
  gemm<kTileVecs, false, true>(D_v, (n + 1) / 2, MatrixA{v, 1, v_row},
                               MatrixB{scratch.p_pairs, kColumn}, MatrixC{state.o_t, kColumn},
                               state.start);
  return Start::kAccumulate;
}

// Keys per tile: a block of k and v rows should stay in the first-level cache.
Index keys_per_tile(const Problem& p) {
  const Index fits = (24 << 10) / (sizeof(float) * max_of(max_of(p.D, p.D_v), 1));
  return min_of(max_of(fits / kTileRows * kTileRows, 4 * kTileRows), kMaxKeys);
}

template <bool kStats, bool kNatural, class Element>
void tile_step(const ForwardParams& p, const Head<Element>& head, const Column& column,
               ColumnState& state, Index key, Index n, const KeyTile& tile, Scratch& scratch) {
  float tile_max[kColumn];
  for (Index lane = 0; lane < kColumn; lane += kLanes)
    store(tile_max + lane, broadcast(-kInfinity));
  DeadKeys dead;
  if constexpr (kPairsOf<Element>) {
    const PairScores scores{state.q_t, tile.k, tile.k_row, (p.D + 1) / 2, head.q_factor};
    score_tile(head, column, key, n, scores, scratch.s, nullptr, tile_max, &dead);
    for (Index j = 0; j < n; j += max_of(n - 1, 1)) {  // keys that complete a pair
      if (key + j >= column.begin && key + j < column.end) continue;
      if (!dead.any) memset(dead.key, 0, sizeof dead.key);
      dead.any = dead.key[j] = true;
    }
  } else {
    const FloatScores scores{state.q_t, tile.k, tile.k_row, p.D};
    score_tile(head, column, key, n, scores, scratch.s, nullptr, tile_max, &dead);
  }
  scratch.next.advance(kLinesPerTile);
  rescale<kStats>(state, tile_max, head.to_log2(), p.D_v);
  exponentiate<kStats, kNatural>(state, column, head.shift, key, n, scratch.s);
  if (p.dropout_p > 0.0) {
    dropout_tile(head, column, key, n, 1.0f, scratch.keep);
    for (Index i = 0; i < n * kColumn; i += kLanes) {
      store(scratch.s + i, load(scratch.s + i) * load(scratch.keep + i));
    }
  }
  if constexpr (kPairsOf<Element>) {
    state.start = gather_pairs(tile.v, tile.v_row, n, p.D_v, dead, state, scratch);
  } else {
    state.start =
        gather_keys(tile.v, tile.v_row, n, p.D_v, scratch.s, state.o_t, state.start, dead);
  }
}

// The sums become the output row, lse and statistics.
template <class Element>
void finish_column(const ForwardParams& p, const Head<Element>& head, const Column& column,
                   ColumnState& state) {
  const float to_log2 = head.to_log2(), to_natural = head.to_natural();
  const float kept = p.dropout_p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout_p));
  alignas(64) float factor[kColumn], lse[kColumn], max_logit[kColumn], entropy[kColumn],
      reach[kColumn];
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const Vec m = load(state.m + lane);
    Vec top = m, l = load(state.l + lane), h = load(state.entropy + lane), shrink = broadcast(1.0f);
    if (p.sinks) {
      const Vec sink = broadcast(p.sinks[head.h] / to_natural);
      top = max(sink, m);
      const Vec base = top == -kInfinity ? zeros() : top;
      const Vec fall = l == 0.0f ? zeros() : m - base;
      shrink = l == 0.0f ? broadcast(1.0f) : exp2(fall * to_log2);
      const Vec sink_p = exp2((sink - base) * to_log2);
      h = (h + l * fall) * shrink + (sink_p > 0.0f ? sink_p * (sink - base) : zeros());
      l = l * shrink + sink_p;
    }
    const Vec log_l = log2(l) * kLn2;
    const IVec empty = l == 0.0f;
    const Vec inverse = empty ? zeros() : 1.0f / l;
    store(factor + lane, inverse * shrink * kept);
    store(lse + lane, empty ? broadcast(-kInfinity) : top * to_natural + log_l);
    store(max_logit + lane, m * to_natural);
    store(entropy + lane, empty ? zeros() : log_l - h * inverse * to_natural);
    store(reach + lane, load(state.reach + lane) * shrink * inverse);
  }
  const Index row = head.b * (p.cu_seqlens_q ? 0 : p.lse_stride_b) + head.h * p.lse_stride_h +
                    head.q_begin + column.t0;
  memcpy(p.lse + row, lse, column.rows * sizeof(float));
  if (p.max_logit) {
    memcpy(p.max_logit + row, max_logit, column.rows * sizeof(float));
    memcpy(p.entropy + row, entropy, column.rows * sizeof(float));
    memcpy(p.reach + row, reach, column.rows * sizeof(float));
  }
  if (state.start == Start::kZero) memset(state.o_t, 0, p.D_v * kColumn * sizeof(float));
  Element* out = static_cast<Element*>(p.out.data) + head.b * p.out.b + head.h * p.out.h +
                 (head.q_begin + column.t0) * p.out.t;
  transpose_out(state.o_t, column.rows, p.D_v, factor, out, p.out.t);
}

template <bool kStats, bool kNatural, class Element>
void query_block(const ForwardParams& p, const Head<Element>& head, Index t0, Index rows,
                 const PackedHeads<Element>& packed, Scratch& scratch) {
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
    if constexpr (kPairsOf<Element>) {
      transpose_pairs(q, p.q.t, column.rows, p.D, state.q_t);
    } else {
      transpose_in(q, p.q.t, column.rows, p.D, head.q_factor, state.q_t);
    }
    if (column.begin < column.end) {
      begin = min_of(begin, column.begin);
      end = max_of(end, column.end);
    }
  }
  if (kPairsOf<Element>) begin -= begin % 2, end = min_of(end + end % 2, head.S);
  const Index most = keys_per_tile(p);
  const Index tiles = max_of((end - begin + most - 1) / most, 1);
  const Index step = min_of(round_up((end - begin + tiles - 1) / tiles, kTileRows), most);
  for (Index key = begin; key < end; key += step) {
    const Index n = min_of(step, end - key);
    const KeyTile tile = load_keys(head, key, n, packed, scratch);
    for (Index c = 0; c < num_columns; ++c) {
      const Column column(head, t0 + c * kColumn, min_of(rows - c * kColumn, kColumn));
      Index first = max_of(key, column.begin), last = min_of(key + n, column.end);
      if (first >= last) continue;
      if (kPairsOf<Element>) {  // whole pairs; the key too many is masked by its position
        first -= (first - key) % 2;
        last = min_of(last + (last - key) % 2, key + n);
      }
      tile_step<kStats, kNatural>(p, head, column, scratch.columns[c], first, last - first,
                                  tile.from<Element>(first - key), scratch);
    }
  }
  for (Index c = 0; c < num_columns; ++c) {
    const Column column(head, t0 + c * kColumn, min_of(rows - c * kColumn, kColumn));
    finish_column(p, head, column, scratch.columns[c]);
  }
}

// Short heads are over before the hardware sees a pattern in their rows.
template <class Element>
void prefetch_head(const ForwardParams& p, Index head_index, Prefetcher* next) {
  const Head<Element> head(p, head_index / p.H, head_index % p.H);
  next->add(head.q, p.q.t, head.T, p.D);
  next->add(head.k, p.k.t, head.S, p.D);
  next->add(head.v, p.v.t, head.S, p.D_v);
}

template <class Element>
void forward(const ForwardParams& p) {
  // bf16 and fp16 blocks are taller, so that each fp32 copy of k and v serves more queries.
  const Index block = RowsAsFloat<Element>::kPacks ? 128 : 64;
  const Index blocks = (p.T + block - 1) / block, group = p.H / p.H_kv;
  const Index items = p.B * p.H * blocks;
  if (items == 0) return;
  const auto run =
      p.max_logit
          ? (p.bias.data ? query_block<true, true, Element> : query_block<true, false, Element>)
          : (p.bias.data ? query_block<false, true, Element> : query_block<false, false, Element>);
  PackedHeads<Element> packed(p, group * blocks);
  const Index key_heads = p.B * p.H_kv, heads_at_once = packed.most ? packed.most : key_heads;
  const Index parts = (p.S + kPackedKeys - 1) / kPackedKeys;
  const int threads = usable_threads(p.num_threads);
  const bool prefetches = p.T <= kPrefetchRows && p.S <= kPrefetchRows && !packed.most;
  const Index chunk = prefetches ? max_of(min_of(items / (threads * 8), 8), 1) : 1;
#pragma omp parallel num_threads(threads) if (items > 1 && threads > 1)
  {
    Arena& arena = thread_arena();
    Scratch scratch;
    scratch.take(arena, p, (min_of(block, p.T) + kColumn - 1) / kColumn, packed);
    for (Index first = 0; first < key_heads; first += heads_at_once) {
      const Index heads = min_of(heads_at_once, key_heads - first);
      if (packed.most) {
#pragma omp single
        packed.first = first;
#pragma omp for schedule(dynamic, 1)
        for (Index i = 0; i < heads * parts; ++i) packed.pack(p, first + i / parts, i % parts);
      }
#pragma omp for schedule(dynamic, chunk) nowait
      for (Index item = 0; item < heads * group * blocks; ++item) {
        const Index head_index = first * group + item / blocks;
        const Index t0 = (blocks - 1 - item % blocks) * block;
        const Head<Element> head(p, head_index / p.H, head_index % p.H);
        scratch.next.clear();
        if (prefetches && t0 == 0 && head_index + 1 < p.B * p.H)
          prefetch_head<Element>(p, head_index + 1, &scratch.next);
        if (t0 < head.T) run(p, head, t0, min_of(block, head.T - t0), packed, scratch);
      }
      if (first + heads < key_heads) {
#pragma omp barrier
      }
    }
    arena.release();
  }
}

}  // namespace

void attention_fwd(const ForwardParams& p) {
  with_element(p.q.dtype,
               [&](auto* element) { forward<std::remove_pointer_t<decltype(element)>>(p); });
  if (p.weights_mode != Weights::kNone) weights_fwd(p);
  if (p.received) received_fwd(p);
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
