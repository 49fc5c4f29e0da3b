// Attention backward in one pass over the scores: five products instead of the seven of
// attention_bwd_keys.h and attention_bwd_queries.h together.
//   s^T = k q^T    dP^T = v do^T    dv += p^T do    dk += scale ds^T q    dq += scale ds k
// Grid:   (batch entry, key head, block of kStay keys), by the tickets that blocks draw: the first
//         keys of all heads come first
// Memory: k, v, a ring of two stages of q, do and their row terms, and one tile of ds in shared
//         memory; s, dP, dk, dv in registers; dq's sums in global memory, until the last keys have
//         been added
// Order:  a tile of queries is added to by one block of keys after the other, so that dq repeats
//         bit for bit. A warp waits for its turn at 16 queries and half of D; a ticket is drawn when
//         a block begins, so that it waits only for blocks that have begun. Queries are walked from
//         the last to the first: with causal, all keys then start at the same queries.
// Limits: D and D_v up to kD = 64 or 128; bf16, fp16; plain calls, for the registers' sake; GPUs
//         whose blocks can have this much shared memory: at 128 not sm_86, sm_89 and sm_120; sm_75
//         never
#pragma once
#include "fused_shape.h"
#include "gradients.h"
#include "launch.h"

namespace attnfast::cuda {

// What a block of keys does with the tiles of queries that it walks, by their first queries.
template <int kD>
struct FusedWalk {
  static constexpr int kStay = FusedShape<kD>::kStay, kMove = FusedShape<kD>::kMove;
  int begin, last;             // of the first and the last tile
  int whole_begin, whole_end;  // of those whose queries all exist and reach all of the keys
  int adds_before;             // before it, some keys before these are reached too
  int passes_after;            // after it, some keys after these are

  ATTNFAST_DEVICE FusedWalk(const Head& head, int s_block) {
    const int s_last = min_of(s_block + kStay, head.S) - 1, query_end = head.end_query(s_last);
    const int query_begin = head.first_query(s_block);
    begin = query_begin / kMove * kMove;
    last = query_begin < query_end ? (query_end - 1) / kMove * kMove : begin - kMove;
    const InnerQueries inner(head, s_block, kStay, kMove);
    whole_begin = max_of(inner.begin, head.first_query(0));
    whole_end = min_of(inner.end, head.end_query(head.S - 1) - kMove + 1);
    adds_before = s_block == 0            ? INT32_MIN
                  : head.low == INT32_MIN ? INT32_MAX
                                          : saturate(int64_t{s_block} - head.low);
    passes_after = INT32_MAX;
    if (s_block + kStay < head.S) {
      const int reaches = head.first_query(s_block + kStay);  // the first to reach them
      if (reaches < head.T) passes_after = reaches - kMove;
    }
  }
  ATTNFAST_DEVICE bool whole(int t0) const { return t0 >= whole_begin && t0 < whole_end; }
  ATTNFAST_DEVICE bool adds(int t0) const { return t0 < adds_before; }
  ATTNFAST_DEVICE bool passes(int t0) const { return t0 > passes_after; }
};

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS(FusedShape<kD>::kThreads, 1)
    attention_bwd_fused_kernel(ATTNFAST_PARAMS BackwardArguments a) {
  using Shape = FusedShape<kD>;
  constexpr int kStay = Shape::kStay, kMove = Shape::kMove, kThreads = Shape::kThreads;
  constexpr int kSums = kD / 16;  // of 8 columns, in a warp's part of dq
  if (!has_code<Element, false>()) return;
  if (!has_shared(Shape::kSharedBytes)) return fail();
  const BackwardParams& p = a.p;

  // Setup
  const uint32_t k_tile = shared_memory(), v_tile = k_tile + Shape::kStayBytes;
  const uint32_t ring = v_tile + Shape::kStayBytes, ds_tile = ring + 2 * Shape::kStageBytes;
  if (thread_index() == 0) store_shared(ds_tile, take_ticket(a.turns));
  sync_block();
  const int64_t ticket = load_shared<int32_t>(ds_tile), bh = ticket % (p.B * p.H_kv);
  const int block = static_cast<int>(ticket / (p.B * p.H_kv)), s_block = block * kStay;
  const int group = static_cast<int>(p.H / p.H_kv);
  Head head(p, a.rows_q, a.rows_k, bh / p.H_kv, bh % p.H_kv * group);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int s0 = s_block + warp * 16;                                 // the warp's first key
  const int dq_row = warp % 4 * 16, dq_column = warp / 4 * (kD / 2);  // its part of a tile of dq

  // Queries that reach no key at all
  if (block == 0) {
    for (int t0 = 0; t0 < head.T; t0 += kMove) {
      const int t_last = min_of(t0 + kMove, head.T) - 1;
      if (head.first_key(t0) < head.end_key(t_last)) continue;
      for (int g = 0; g < group; ++g) {
        auto* out = head.rows_to<Element>(p.dq, head.h + g, head.q_begin);
        const float none[1][kSums][4] = {};
        store_by_quads<kD / 2>(none, 0.0f, out + (t0 + dq_row) * p.dq.t + dq_column, p.dq.t,
                               head.T - t0 - dq_row, static_cast<int>(p.D) - dq_column, lane);
      }
    }
  }
  if (s_block >= head.S) return;
  const FusedWalk<kD> walk(head, s_block);
  const InnerQueries inner(head, s0, 16, kMove);
  const int end_head = walk.begin <= walk.last ? head.h + group : head.h;

  const auto of_k = LaneAddress<kD>::down_then_across(k_tile + warp * 16 * kD * 2, lane);
  const auto of_q = LaneAddress<kD>::across_then_down(ring, lane);
  const auto of_q_down = LaneAddress<kD>::down_then_across(ring, lane);
  const auto of_ds = LaneAddress<kMove>::across_then_down(ds_tile, lane).from_chunk(dq_row / 8);
  const auto of_all_k = LaneAddress<kD>::down_then_across(k_tile, lane).from_chunk(dq_column / 8);
  const uint32_t ds_row = ds_tile + Swizzle<kMove>::offset(warp * 16 + lane / 4, 0) + lane % 4 * 4;

  auto q = head.queries_of<Element>(p.q, p.D, true);
  auto d_o = head.queries_of<Element>(p.grad_out, p.D_v, true);
  TileWalk<Element, kD, kMove, kThreads, false> q_walk(q, walk.last), do_walk(d_o, walk.last);
  const float* terms = TermPlanes(a, head.b, head.h).m + walk.last;
  const int64_t plane = p.B * p.H * a.padded;
  // Fetches the tile of queries from t0 on into a stage, and goes on to the one above it.
  const auto fetch = [&](uint32_t stage, int t0) {
    const uint32_t to = stage + 2 * Shape::kMoveBytes;
    if (walk.whole(t0)) {
      q_walk.fill(stage, [](int) { return true; });
      do_walk.fill(stage + Shape::kMoveBytes, [](int) { return true; });
    } else {
      const auto known = known_queries<Element>(p, head, true, false);
      q_walk.fill(stage, [&](int r) { return known.has(t0 + r); });
      do_walk.fill(stage + Shape::kMoveBytes, [&](int r) { return d_o.has(t0 + r); });
    }
    constexpr int kChunks = Shape::kTermBytes / 16;
    const int which = thread_index() / kChunks, chunk = thread_index() % kChunks;
    if (which < 3) {
      copy_async(to + thread_index() * 16, terms + which * plane + chunk * 4, 16);
    }
    q_walk.up(), do_walk.up(), terms -= kMove;
  };
  float dk[1][kD / 8][4] = {}, dv[1][kD / 8][4] = {};

  // Load
  if (head.h < end_head) {
    const auto k = head.keys_of<Element>(p.k, p.D, true);
    const auto v = head.keys_of<Element>(p.v, p.D_v, true);
    TileWalk<Element, kD, kStay, kThreads, false>(k, s_block).load(k_tile, k, s_block);
    TileWalk<Element, kD, kStay, kThreads, false>(v, s_block).load(v_tile, v, s_block);
    fetch(ring, walk.last);
  }
  commit_copies();

  // Queries, head by head and tile by tile
  const ScoreEdits edits(a, head);
  const uint32_t kept[1] = {~0u};
  const float (*dcapped)[kMove / 8][4] = nullptr;
  uint32_t stage = 0;
  auto part = static_cast<uint32_t>(((int64_t{head.b} * p.H + head.h) * a.padded + walk.last) /
                                    kMove * Shape::kWarps) +
              warp;
  int t0 = walk.last;
  while (head.h < end_head) {
    const int h = head.h;
    const bool more = t0 > walk.begin;
    const int next_t0 = more ? t0 - kMove : walk.last, next_h = more ? h : h + 1;
    const uint32_t next_stage = Shape::kStageBytes - stage;
    wait_copies<0>();
    sync_block();  // this round's rows are here, and no warp reads the last round's or ds any more
    if (next_h < end_head) {
      head.h = next_h;
      if (!more) {  // from above the first tile to another head's last one
        const int64_t back = walk.last - walk.begin + kMove;
        q_walk.by(p.q.h + back * p.q.t), do_walk.by(p.grad_out.h + back * p.grad_out.t);
        terms += a.padded + back;
      }
      fetch(ring + next_stage, next_t0);
      head.h = h;
    }
    commit_copies();

    const bool edge = !inner.has(t0);
    float s[1][kMove / 8][4], dp[1][kMove / 8][4];
    const auto to_q = LaneAddress<kD>{of_q.first + stage}, to_do = to_q.after(Shape::kMoveBytes);
    // Scores, transposed
    multiply_rows_by_rows<Element, kD>(s, of_k, to_q);
    // dP
    multiply_rows_by_rows<Element, kD>(dp, of_k.after(Shape::kStayBytes), to_do);
    // Probabilities, ds
    const MovingTerms<Shape::kTermBytes> row_terms{ring + stage + 2 * Shape::kMoveBytes, lane,
                                                   false};
    score_gradients<true>(s, dp, edits, kept, 1.0f, dcapped, row_terms);
    if (edge) {
      edits.mask_positions<true>(s, head, t0, s0, lane, 0.0f);
      edits.mask_positions<true>(dp, head, t0, s0, lane, 0.0f);
    }
    ATTNFAST_UNROLL for (int n = 0; n < kMove / 8; ++n) {
      ATTNFAST_UNROLL for (int half = 0; half < 2; ++half) {
        const float (&x)[4] = dp[0][n];
        store_shared((ds_row ^ n * 16) + half * 8 * kMove * 2,
                     pack<Element>(x[half * 2], x[half * 2 + 1]));
      }
    }
    const auto down_q = LaneAddress<kD>{of_q_down.first + stage};
    // dv
    add_registers_times_rows<Element, kD, false>(dv, s, down_q.after(Shape::kMoveBytes), ~0u);
    // dk
    add_registers_times_rows<Element, kD, false>(dk, dp, down_q, ~0u);

    // dq: the block's part, and in its turn what those before it have added
    sync_block();  // ds is here
    float dq[1][kSums][4];
    ATTNFAST_UNROLL for (int k = 0; k < kStay / 16; ++k) {
      uint32_t left[4];
      load_matrix_transposed(left, of_ds(0) + k * 32 * kMove);
      ATTNFAST_UNROLL for (int n = 0; n < kSums; n += 2) {
        uint32_t right[4];
        load_matrix_transposed(right, of_all_k(n) + k * 32 * kD);
        if (k == 0) {
          multiply<Element>(dq[0][n], left, right[0], right[1]);
          multiply<Element>(dq[0][n + 1], left, right[2], right[3]);
        } else {
          multiply_accumulate<Element>(dq[0][n], left, right[0], right[1]);
          multiply_accumulate<Element>(dq[0][n + 1], left, right[2], right[3]);
        }
      }
    }
    auto* sums = reinterpret_cast<Floats4*>(a.sums + uint64_t{part} * Shape::kPart) + lane;
    int32_t* turn = a.turns + 1 + part;  // which block of keys is to add, after the first one
    if (walk.adds(t0)) {
      if (lane == 0) await_turn(turn, block);
      sync_warp();
      ATTNFAST_UNROLL for (int n = 0; n < kSums; ++n) {
        const Floats4 x = load_handed(sums + n * kWarpSize);
        float (&y)[4] = dq[0][n];
        y[0] += x.x, y[1] += x.y, y[2] += x.z, y[3] += x.w;
      }
    }
    if (walk.passes(t0)) {
      ATTNFAST_UNROLL for (int n = 0; n < kSums; ++n) {
        const float (&y)[4] = dq[0][n];
        store_handed(sums + n * kWarpSize, Floats4{y[0], y[1], y[2], y[3]});
      }
      sync_warp();
      if (lane == 0) pass_turn(turn, block + 1);
    } else {
      auto* out = head.rows_to<Element>(p.dq, h, head.q_begin);
      store_by_quads<kD / 2>(dq, p.scale, out + (t0 + dq_row) * p.dq.t + dq_column, p.dq.t,
                             head.T - t0 - dq_row, static_cast<int>(p.D) - dq_column, lane);
    }
    part += (next_t0 - t0) / kMove * Shape::kWarps;
    if (!more) part += static_cast<uint32_t>(a.padded) / kMove * Shape::kWarps;
    head.h = next_h, stage = next_stage, t0 = next_t0;
  }

  // Store
  auto* out_k = head.rows_to<Element>(p.dk, head.h_kv, head.k_begin);
  store_by_quads<kD>(dk, p.scale, out_k + s0 * p.dk.t, p.dk.t, head.S - s0, static_cast<int>(p.D),
                     lane);
  auto* out_v = head.rows_to<Element>(p.dv, head.h_kv, head.k_begin);
  store_by_quads<kD>(dv, 1.0f, out_v + s0 * p.dv.t, p.dv.t, head.S - s0, static_cast<int>(p.D_v),
                     lane);
}

template <class Element, int kD>
void launch_attention_bwd_fused(const BackwardArguments& a, Stream stream) {
  using Shape = FusedShape<kD>;
  const int64_t blocks = max_of<int64_t>((a.p.S + Shape::kStay - 1) / Shape::kStay, 1);
  launch<BackwardArguments>(kernel_name<Element, kD, true>("attention_bwd_fused"),
                            attention_bwd_fused_kernel<Element, kD>, a.p.B * a.p.H_kv * blocks,
                            Shape::kThreads, Shape::kSharedBytes, stream, a);
}

}  // namespace attnfast::cuda
