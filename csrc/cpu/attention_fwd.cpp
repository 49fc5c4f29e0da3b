// Attention forward, one block of queries at a time (FlashAttention-2, Algorithm 1, with the
// queries in lanes).
//
//   o = softmax(scale * q k^T, masked, biased, capped) v        lse = logsumexp of the scores
//
// Work:    one item per (batch entry, head, block of queries), heaviest causal blocks first
// Memory:  per thread the block's transposed q and o and one tile of scores; what of k and v cannot
//          be read in place (keys.h), packed: a tile per thread, or the key heads in work
// Pairs:   where the processor multiplies pairs of bf16 (AVX512_BF16, AMX), both products of bf16
//          inputs do, p rounded to bf16; with AMX those of fp16 and fp32 inputs too, in planes
//          (pairs.h)
// Threads: items are independent; a row's result depends on its own sequence alone
#include <type_traits>

#include "attention_fwd_pairs.h"
#include "kernels.h"
#include "row_results.h"
#include "segments.h"
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

// m becomes the largest score so far, and what was summed relative to the last one is rescaled.
template <bool kStats>
void raise_max(ForwardColumn& state, const float* tile_max, float to_log2, Index D_v) {
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
    const Vec drop = old - base, rescale = exp2(drop * to_log2);
    const Vec l = load(state.l + lane);
    if (kStats) {
      const Vec moved = l * drop;  // may be -inf where nothing survives
      store(state.depth_sum + lane,
            rescale == 0.0f ? zeros() : rescale * (load(state.depth_sum + lane) + moved));
      store(state.distance_sum + lane, rescale * load(state.distance_sum + lane));
    }
    store(state.m + lane, m);
    store(state.l + lane, l * rescale);
    if (state.start == Start::kZero) continue;
    for (Index d = 0; d < D_v; ++d) {
      float* o = state.o_t + d * kColumn + lane;
      store(o, load(o) * rescale);
    }
  }
}

// Part of a tile, for one column of queries.
template <bool kStats, bool kScaled, class Tiles, class Element>
void tile_step(const ForwardParams& p, const Head<Element>& head, const Column& column,
               ForwardColumn& state, const TilePart& part, const KeyTile& tile,
               ForwardScratch& scratch) {
  // Scores
  float tile_max[kColumn];
  for (Index lane = 0; lane < kColumn; lane += kLanes)
    store(tile_max + lane, broadcast(-kInfinity));
  DeadKeys dead;
  Tiles::scores(head, column, state, part, tile, scratch, tile_max, &dead);
  scratch.next_item.advance(kLinesPerTile);

  // Softmax
  raise_max<kStats>(state, tile_max, head.units.to_log2, p.D_v);
  Tiles::template probabilities<kStats, kScaled>(p, head, column, state, part, scratch);

  // Output
  Tiles::add_values(p, column, state, part, tile, scratch, dead);
}

// The sums become the output row, lse, norm and statistics.
template <class Element>
void finish_column(const ForwardParams& p, const Head<Element>& head, const Column& column,
                   ForwardColumn& state) {
  const float keep_scale = keep_scale_of(p);
  const Vec sinks = broadcast(p.sinks ? p.sinks[head.h] : 0.0f);
  alignas(64) float o_scale[kColumn], lse[kColumn], m_of[kColumn], log2_l_of[kColumn],
      max_logit[kColumn], entropy[kColumn], reach[kColumn], focus[kColumn];
  for (Index lane = 0; lane < kColumn; lane += kLanes) {
    const RowSums sums{load(state.m + lane), load(state.l + lane), load(state.depth_sum + lane),
                       load(state.distance_sum + lane)};
    const RowResults row =
        finish_rows(sums, broadcast(head.sink), p.sinks ? &sinks : nullptr, head.units);
    store(o_scale + lane, row.o_scale * keep_scale);
    store(lse + lane, row.lse);
    store(m_of + lane, row.m), store(log2_l_of + lane, row.log2_l);
    store(max_logit + lane, row.max_logit), store(entropy + lane, row.entropy);
    store(reach + lane, row.reach), store(focus + lane, row.focus);
  }

  // Store
  const Index row = head.b * (p.cu_seqlens_q ? 0 : p.lse_stride_b) + head.h * p.lse_stride_h +
                    head.q_begin + column.t0;
  const auto write = [&](float* to, const float* from) {
    memcpy(to + row, from, column.rows * sizeof(float));
  };
  write(p.lse, lse), write(p.norm, m_of), write(p.norm + p.norm_plane, log2_l_of);
  if (p.max_logit) {
    write(p.max_logit, max_logit), write(p.entropy, entropy);
    write(p.reach, reach), write(p.focus, focus);
  }
  if (state.start == Start::kZero) memset(state.o_t, 0, p.D_v * kColumn * sizeof(float));
  Element* out = static_cast<Element*>(p.out.data) + head.b * p.out.b + head.h * p.out.h +
                 (head.q_begin + column.t0) * p.out.t;
  transpose_out(state.o_t, column.rows, p.D_v, o_scale, out, p.out.t);
}

// False, with nothing done, where the block's queries are out of the range of their planes.
template <bool kStats, bool kScaled, class Element, int kPlanes>
bool query_block(const ForwardParams& p, const Head<Element>& head, Index t0, Index rows,
                 const PackedHeads<Element, kPlanes>& packed, ForwardScratch& scratch) {
  using Tiles = ForwardTiles<Element, kPlanes>;
  const Index num_columns = (rows + kColumn - 1) / kColumn;
  const auto column_of = [&](Index c, const Segment& segment) {
    return Column(head, t0 + c * kColumn, min_of(rows - c * kColumn, kColumn), segment);
  };
  for (Index c = 0; c < num_columns; ++c) {
    ForwardColumn& state = scratch.columns[c];
    state.start = Start::kZero;
    for (Index lane = 0; lane < kColumn; lane += kLanes) {
      store(state.m + lane, broadcast(-kInfinity));
      store(state.l + lane, zeros());
      store(state.depth_sum + lane, zeros());
      store(state.distance_sum + lane, zeros());
    }
    if (!Tiles::load_queries(head, column_of(c, {}), state)) return false;
  }
  const Index most = Tiles::keys_per_tile(p);
  const bool in_rows = packed.by_team() || !packed.layout.packs();  // one tile follows the other
  const bool asks_ahead = !kPlanes && in_rows && outgrows_cache(p, head.S);
  Segments segments(head, t0, 0, head.S);
  for (Segment segment; segments.next(&segment);) {
    Index begin = segment.end, end = segment.begin;
    for (Index c = 0; c < num_columns; ++c) {
      const Column column = column_of(c, segment);
      if (column.begin == column.end) continue;
      begin = min_of(begin, column.begin);
      end = max_of(end, column.end);
    }
    // A sequence has the same tiles whatever the block.
    const Index origin = segment.begin - segment.begin % Tiles::kPanelKeys;
    const Index span = segment.end - origin, tiles = (span + most - 1) / most;
    const Index step = min_of(round_up((span + tiles - 1) / tiles, Tiles::kStepKeys), most);
    begin -= (begin - origin) % step;
    for (Index key = begin; key < end; key += step) {
      const Index n = min_of(step, end - key);
      if (scratch.worker->stops(rows * n)) return true;
      const KeyTile tile = load_keys(head, key, n, packed, scratch);
      scratch.next_tile.clear();
      if (asks_ahead) {
        const Index next = min_of(step, end - key - n);
        scratch.next_tile.add(tile.k + n * tile.k_row, tile.k_row, next, p.D);
        scratch.next_tile.add(tile.v + n * tile.v_row, tile.v_row, next, p.D_v);
        const Index pieces = (n + kTileRows - 1) / kTileRows * num_columns;
        scratch.next_tile_lines = (scratch.next_tile.lines() + pieces - 1) / pieces;
      }
      for (Index c = 0; c < num_columns; ++c) {
        const Column column = column_of(c, segment);
        Index first = max_of(key, column.begin), last = min_of(key + n, column.end);
        if (first >= last) continue;
        first -= (first - key) % Tiles::kUnit;
        const TilePart part{first, first - key, last - first};
        tile_step<kStats, kScaled, Tiles>(p, head, column, scratch.columns[c], part, tile, scratch);
      }
    }
  }
  for (Index c = 0; c < num_columns; ++c)
    finish_column(p, head, column_of(c, {}), scratch.columns[c]);
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
  const bool scaled = kPlanes == 1 || Scaling(p).natural == 1.0f;
  if (p.max_logit)
    return scaled ? query_block<true, true, Element, kPlanes>
                  : query_block<true, false, Element, kPlanes>;
  return scaled ? query_block<false, true, Element, kPlanes>
                : query_block<false, false, Element, kPlanes>;
}

template <class Element, int kPlanes>
void forward(const ForwardParams& p) {
  const Index block = kPlanes ? most_queries_per_block(p) : queries_per_block(p);
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
      return ForwardScratch(parts, p, (min_of(block, p.T) + kColumn - 1) / kColumn, packed);
    };
    const auto attend = [&](Index item, ForwardScratch& scratch) {
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
  if (p.has_lists()) return indexed_fwd(p);
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
