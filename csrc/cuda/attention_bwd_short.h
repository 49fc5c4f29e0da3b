// Attention backward of short sequences in one launch: where T and S are at most 128, the time of
// launches and of reading q, k, v and do twice is what counts.
//   delta = rowsum(do o)    s, dP -> dq    s^T, dP^T -> dk, dv
//   (as the kernels for any length)
// Grid:   (batch entry, key head)
// Memory: all of the head's k and v, and a query head's q and do with their row terms, in shared
//         memory; warps have 16 queries each, then 16 keys each, and dq, then dk and dv in
//         registers
// Limits: D and D_v up to kD <= 128; bf16, fp16; plain calls; GPUs whose blocks can have this much
//         shared memory, at kD = 128 more than sm_86, sm_89 and sm_120 give (attention_bwd.cu)
#pragma once
#include "attention_bwd_keys.h"
#include "attention_bwd_queries.h"

namespace attnfast::cuda {

template <int kD>
struct ShortShape {
  static constexpr int kWarps = kShort / 16, kThreads = kWarps * kWarpSize;
  // Rows of a product's other side at a time; 32 would spill at 128.
  static constexpr int kPart = kD == 128 ? 16 : 32;
  static constexpr int kTileBytes = kShort * kD * 2, kTermBytes = kShort * 4;
  static constexpr int kSharedBytes = 4 * kTileBytes + 3 * kTermBytes;
};

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS(ShortShape<kD>::kThreads, 1)
    attention_bwd_short_kernel(ATTNFAST_PARAMS BackwardArguments a) {
  using Shape = ShortShape<kD>;
  constexpr int kPart = Shape::kPart, kThreads = Shape::kThreads;
  if (!has_code<Element>()) return;
  if (!has_shared(Shape::kSharedBytes)) return fail();
  const BackwardParams& p = a.p;

  // Setup
  const int group = static_cast<int>(p.H / p.H_kv);
  const int64_t b = block_index() / p.H_kv, first_head = block_index() % p.H_kv * group;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int own_first = warp * 16;  // the warp's first query, and its first key

  const uint32_t k_tile = shared_memory(), v_tile = k_tile + Shape::kTileBytes;
  const uint32_t q_tile = v_tile + Shape::kTileBytes, do_tile = q_tile + Shape::kTileBytes;
  const uint32_t rows = do_tile + Shape::kTileBytes;
  const uint32_t own = warp * 16 * kD * 2;  // the warp's rows of any tile
  // Load: a query head's q and do with their row terms; with the first, k and v, which stay.
  const auto load = [&](const Head& head, bool with_keys) {
    if (with_keys) {
      load_tile<kD, kShort, kThreads, false>(k_tile, head.keys_of<Element>(p.k, p.D, true), 0);
      load_tile<kD, kShort, kThreads, false>(v_tile, head.keys_of<Element>(p.v, p.D_v, true), 0);
    } else {
      sync_block();  // no warp reads the last head's rows any more
    }
    const bool all = !crosses_edge(head, 0, head.T, 0, head.S);
    const auto q = known_queries<Element>(p, head, true, all);
    ATTNFAST_NO_UNROLL for (int t = 0; t < kShort; t += 32) {  // unrolled, it would spill at 128
      load_tile<kD, 32, kThreads, false>(q_tile + t * kD * 2, q, t);
    }
    load_tile<kD, kShort, kThreads, false>(do_tile,
                                           head.queries_of<Element>(p.grad_out, p.D_v, true), 0);
    commit_copies();
    for (int t = thread_index() / kLanesPerRow; t < kShort; t += kThreads / kLanesPerRow) {
      const RowTerms terms = row_terms<Element>(a, head, t, thread_index() % kLanesPerRow);
      if (thread_index() % kLanesPerRow > 0) continue;
      store_shared(rows + t * 4, terms.m);
      store_shared(rows + Shape::kTermBytes + t * 4, terms.log2_l);
      store_shared(rows + 2 * Shape::kTermBytes + t * 4, terms.row_term);
    }
    wait_copies<0>();
    sync_block();  // tiles and terms are here
  };
  const uint32_t kept[1] = {~0u};
  const float (*dcapped)[kPart / 8][4] = nullptr;

  // Queries: dq, head by head, the last one first
  for (int g = group - 1; g >= 0; --g) {
    const Head head(p, a.rows_q, a.rows_k, b, first_head + g);
    load(head, g == group - 1);
    if (own_first >= head.T) continue;
    const ScoreEdits edits(a, head);
    const SharedTerms<Shape::kTermBytes> terms{rows + own_first * 4, lane};
    const int key_end = head.end_key(min_of(own_first + 16, head.T) - 1);
    float dq[1][kD / 8][4] = {};
    for (int s0 = head.first_key(own_first) / kPart * kPart; s0 < key_end; s0 += kPart) {
      const uint32_t k_rows = k_tile + s0 * kD * 2, v_rows = v_tile + s0 * kD * 2;
      float s[1][kPart / 8][4] = {}, dp[1][kPart / 8][4] = {};
      // Scores
      multiply_rows_by_rows<Element, kD>(s, q_tile + own, k_rows, lane);
      // dP
      multiply_rows_by_rows<Element, kD>(dp, do_tile + own, v_rows, lane);
      // Probabilities, ds
      score_gradients<true>(s, dp, edits, kept, 1.0f, dcapped, terms);
      if (crosses_edge(head, own_first, 16, s0, kPart)) {
        edits.mask_positions<false>(dp, head, own_first, s0, lane, 0.0f);
      }
      // dq
      add_registers_times_rows<Element, kD, false>(dq, dp, k_rows, ~0u, lane);
    }
    // Store
    auto* out = head.rows_to<Element>(p.dq, head.h, head.q_begin);
    store_by_quads<kD>(dq, p.scale, out + own_first * p.dq.t, p.dq.t, head.T - own_first,
                       static_cast<int>(p.D), lane);
  }

  // Keys: dk and dv, over all heads, from the first on, whose q and do are still here
  const Head first(p, a.rows_q, a.rows_k, b, first_head);
  float dk[1][kD / 8][4] = {}, dv[1][kD / 8][4] = {};
  for (int g = 0; g < group; ++g) {
    const Head head(p, a.rows_q, a.rows_k, b, first_head + g);
    if (g > 0) load(head, false);
    if (own_first >= head.S) continue;
    const ScoreEdits edits(a, head);
    const int query_end = head.end_query(min_of(own_first + 16, head.S) - 1);
    for (int t0 = head.first_query(own_first) / kPart * kPart; t0 < query_end; t0 += kPart) {
      const uint32_t q_rows = q_tile + t0 * kD * 2, do_rows = do_tile + t0 * kD * 2;
      float s[1][kPart / 8][4] = {}, dp[1][kPart / 8][4] = {};
      // Scores, transposed
      multiply_rows_by_rows<Element, kD>(s, k_tile + own, q_rows, lane);
      // dP
      multiply_rows_by_rows<Element, kD>(dp, v_tile + own, do_rows, lane);
      // Probabilities, ds
      const MovingTerms<Shape::kTermBytes> terms{rows + t0 * 4, lane, false};
      score_gradients<true>(s, dp, edits, kept, 1.0f, dcapped, terms);
      if (crosses_edge(head, t0, kPart, own_first, 16)) {
        edits.mask_positions<true>(s, head, t0, own_first, lane, 0.0f);
        edits.mask_positions<true>(dp, head, t0, own_first, lane, 0.0f);
      }
      // dv
      add_registers_times_rows<Element, kD, false>(dv, s, do_rows, ~0u, lane);
      // dk
      add_registers_times_rows<Element, kD, false>(dk, dp, q_rows, ~0u, lane);
    }
  }
  if (own_first >= first.S) return;

  // Store
  auto* out_k = first.rows_to<Element>(p.dk, first.h_kv, first.k_begin);
  store_by_quads<kD>(dk, p.scale, out_k + own_first * p.dk.t, p.dk.t, first.S - own_first,
                     static_cast<int>(p.D), lane);
  auto* out_v = first.rows_to<Element>(p.dv, first.h_kv, first.k_begin);
  store_by_quads<kD>(dv, 1.0f, out_v + own_first * p.dv.t, p.dv.t, first.S - own_first,
                     static_cast<int>(p.D_v), lane);
}

template <class Element, int kD>
void launch_attention_bwd_short(const BackwardArguments& a, Stream stream) {
  using Shape = ShortShape<kD>;
  launch<BackwardArguments>(kernel_name<Element, kD, true>("attention_bwd_short"),
                            attention_bwd_short_kernel<Element, kD>, a.p.B * a.p.H_kv,
                            Shape::kThreads, Shape::kSharedBytes, stream, a);
}

}  // namespace attnfast::cuda
