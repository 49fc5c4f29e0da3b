// Attention backward of short sequences in one launch: where T and S are at most 128, the time of
// launches and of reading q, k, v and do twice is what counts.
//   delta = rowsum(do o)    s^T, dP^T -> dk, dv    s, dP -> dq
//   (as the kernels for any length)
// Grid:   (batch entry, key head)
// Memory: all of the head's k and v, and a query head's q and do with their row terms, in shared
//         memory; warps have 16 keys each, then 16 queries each, and dk, dv, dq in registers
// Limits: D and D_v up to kD <= 64; bf16, fp16; plain calls (attention_bwd.cu)
#pragma once
#include "attention_bwd_keys.h"
#include "attention_bwd_queries.h"

namespace attnfast::cuda {

constexpr int kShort = 128;  // queries, and keys

template <int kD>
struct ShortShape {
  static constexpr int kWarps = kShort / 16, kThreads = kWarps * kWarpSize;
  static constexpr int kPart = 32;  // rows of a product's other side at a time
  static constexpr int kTileBytes = kShort * kD * 2, kTermBytes = kShort * 4;
  static constexpr int kSharedBytes = 4 * kTileBytes + 2 * kTermBytes;
};

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS(ShortShape<kD>::kThreads, 1)
    attention_bwd_short_kernel(ATTNFAST_PARAMS BackwardArguments a) {
  using Shape = ShortShape<kD>;
  constexpr int kPart = Shape::kPart, kThreads = Shape::kThreads;
  if (!has_code<Element, Shape::kSharedBytes <= kTuringShared>()) return;
  const BackwardParams& p = a.p;

  // Indices
  const int group = static_cast<int>(p.H / p.H_kv);
  const int64_t b = block_index() / p.H_kv, first_head = block_index() % p.H_kv * group;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int own_first = warp * 16;  // the warp's first key, and its first query

  // Shared memory
  const uint32_t k_tile = shared_memory(), v_tile = k_tile + Shape::kTileBytes;
  const uint32_t q_tile = v_tile + Shape::kTileBytes, do_tile = q_tile + Shape::kTileBytes;
  const uint32_t norms = do_tile + Shape::kTileBytes, rows = norms + Shape::kTermBytes;
  const uint32_t own = warp * 16 * kD * 2;  // the warp's rows of any tile

  float dk[1][kD / 8][4] = {}, dv[1][kD / 8][4] = {};
  float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
  const uint32_t kept[1] = {~0u};

  for (int g = 0; g < group; ++g) {
    const Head head(p, a.rows_q, a.rows_k, b, first_head + g);
    const ScoreOptions options(p, head);
    if (g == 0) {
      load_tile<kD, kShort, kThreads, false>(k_tile, head.keys_of<Element>(p.k, p.D, true), 0);
      load_tile<kD, kShort, kThreads, false>(v_tile, head.keys_of<Element>(p.v, p.D_v, true), 0);
    }
    load_tile<kD, kShort, kThreads, false>(q_tile, head.queries_of<Element>(p.q, p.D, true), 0);
    load_tile<kD, kShort, kThreads, false>(do_tile,
                                           head.queries_of<Element>(p.grad_out, p.D_v, true), 0);
    commit_copies();

    for (int t = thread_index() / kLanesPerRow; t < kShort; t += kThreads / kLanesPerRow) {
      const RowTerms terms = row_terms<Element>(a, head, t, thread_index() % kLanesPerRow);
      if (thread_index() % kLanesPerRow > 0) continue;
      store_shared(norms + t * 4, terms.norm);
      store_shared(rows + t * 4, terms.row);
    }
    wait_copies<0>();
    sync_block();  // tiles and terms are here

    // Keys: dk and dv
    if (own_first < head.S) {
      const int query_end = head.end_query(min_of(own_first + 16, head.S) - 1);
      for (int t0 = head.first_query(own_first) / kPart * kPart; t0 < query_end; t0 += kPart) {
        const uint32_t q_rows = q_tile + t0 * kD * 2, do_rows = do_tile + t0 * kD * 2;
        float s[1][kPart / 8][4] = {}, dp[1][kPart / 8][4] = {};
        add_rows_times_rows<Element, kD>(s, k_tile + own, q_rows, lane);
        if (crosses_edge(head, t0, kPart, own_first, 16)) {
          options.mask_positions<true>(s, head, t0, own_first, lane);
        }
        add_rows_times_rows<Element, kD>(dp, v_tile + own, do_rows, lane);
        const MovingTerms<Shape::kTermBytes> terms{norms + t0 * 4, lane, false};
        score_gradients<true>(s, dp, options, kept, 1.0f,
                              static_cast<const float (*)[kPart / 8][4]>(nullptr), terms);
        add_registers_times_rows<Element, kD, false>(dv, s, do_rows, ~0u, lane);
        add_registers_times_rows<Element, kD, false>(dk, dp, q_rows, ~0u, lane);
      }
    }

    // Queries: dq
    float dq[1][kD / 8][4] = {};
    if (own_first < head.T) {
      const int key_end = head.end_key(min_of(own_first + 16, head.T) - 1);
      const SharedTerms terms(norms, rows, own_first, lane);
      for (int s0 = head.first_key(own_first) / kPart * kPart; s0 < key_end; s0 += kPart) {
        const uint32_t k_rows = k_tile + s0 * kD * 2, v_rows = v_tile + s0 * kD * 2;
        float s[1][kPart / 8][4] = {}, dp[1][kPart / 8][4] = {};
        add_rows_times_rows<Element, kD>(s, q_tile + own, k_rows, lane);
        if (crosses_edge(head, own_first, 16, s0, kPart)) {
          options.mask_positions<false>(s, head, own_first, s0, lane);
        }
        add_rows_times_rows<Element, kD>(dp, do_tile + own, v_rows, lane);
        score_gradients<true>(s, dp, options, kept, 1.0f,
                              static_cast<const float (*)[kPart / 8][4]>(nullptr), terms);
        add_registers_times_rows<Element, kD, false>(dq, dp, k_rows, ~0u, lane);
      }
    }

    sync_block();  // no warp reads q and do any more
    if (own_first < head.T) {
      auto* out = head.rows_to<Element>(p.dq, head.h, head.q_begin);
      store_rows<kD, false>(dq, scale, q_tile + own, out + own_first * p.dq.t, p.dq.t,
                            head.T - own_first, static_cast<int>(p.D), true, lane);
    }
    if (g + 1 < group) {
      sync_block();  // dq has left the place of the next q
      continue;
    }

    // Output
    if (own_first >= head.S) return;
    auto* out_k = head.rows_to<Element>(p.dk, head.h_kv, head.k_begin);
    store_rows<kD, false>(dk, scale, k_tile + own, out_k + own_first * p.dk.t, p.dk.t,
                          head.S - own_first, static_cast<int>(p.D), true, lane);
    auto* out_v = head.rows_to<Element>(p.dv, head.h_kv, head.k_begin);
    store_rows<kD, false>(dv, one, v_tile + own, out_v + own_first * p.dv.t, p.dv.t,
                          head.S - own_first, static_cast<int>(p.D_v), true, lane);
  }
}

template <class Element, int kD>
void launch_attention_bwd_short(const BackwardArguments& a, Stream stream) {
  using Shape = ShortShape<kD>;
  static_assert(Shape::kSharedBytes <= kSharedLimit);
  launch<BackwardArguments>(kernel_name<Element, kD, true>("attention_bwd_short"),
                            attention_bwd_short_kernel<Element, kD>, a.p.B * a.p.H_kv,
                            Shape::kThreads, Shape::kSharedBytes, stream, a);
}

}  // namespace attnfast::cuda
