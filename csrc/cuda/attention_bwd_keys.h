// Attention backward for keys and values, one warp per 16 or 32 keys (FlashAttention-2,
// arXiv:2307.08691, Algorithm 2).
//   s^T = k q^T    dP^T = v do^T    dv += (p Z)^T do    dk += scale dx^T q
// Grid:   (batch entry, key head, block of kStay keys)
// Memory: the keys' k and v in shared memory, and a ring of q, do and their row terms, of all query
//         heads that share the key head; s, dP, dk, dv in registers
// Limits: D and D_v up to kD; bf16, fp16. Beyond 128 (sm_75: 96) one launch makes each of dk and
//         dv, which together exceed the registers
#pragma once
#include "gradients.h"
#include "launch.h"
#include "prims/opaque.h"

namespace attnfast::cuda {

template <class Element, int kD, Form kForm, bool kWantsK, bool kWantsV, bool kSmall>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((BackwardShape<kD, kForm, true, kSmall>::kThreads), 1)
    attention_bwd_keys_kernel(ATTNFAST_PARAMS BackwardArguments arguments) {
  using Shape = BackwardShape<kD, kForm, true, kSmall>;
  constexpr bool kPlain = Shape::kPlain, kBlocks = Shape::kBlocks;
  constexpr int kStay = Shape::kStay, kMove = Shape::kMove, kThreads = Shape::kThreads;
  constexpr int kRowTiles = Shape::kRowTiles;
  if (!has_code<Element, Shape::kOnTuring, !kSmall>()) return;
  const BackwardParams& p = arguments.p;

  // Setup
  const int64_t group = p.H / p.H_kv, bh = block_index() / arguments.blocks;
  const int s_block = static_cast<int>(block_index() % arguments.blocks) * kStay;
  Head head(p, arguments.rows_q, arguments.rows_k, bh / p.H_kv, bh % p.H_kv * group, !kPlain);
  if (s_block >= head.S) return;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int s0 = s_block + warp * kRowTiles * 16;  // the warp's first key
  const int s_last = min_of(s_block + kStay, head.S) - 1;
  const bool differ = !kPlain && p.windows;  // heads in what they reach
  const Head all = differ ? head.with_next(p, static_cast<int>(group) - 1) : head;
  const int query_begin = all.first_query(s_block) / kMove * kMove;
  const int query_end = all.end_query(s_last);
  const int end_head = query_begin < query_end ? head.h + static_cast<int>(group) : head.h;
  Philox philox(p, arguments.dropout, head.b, head.h);
  const float keep_scale = arguments.dropout.keep_scale;

  const uint32_t k_tile = shared_memory(), v_tile = k_tile + Shape::kStayBytes;
  const uint32_t ring = v_tile + Shape::kStayBytes;
  const uint32_t own = warp * kRowTiles * 16 * kD * 2;  // the warp's rows of k_tile and v_tile
  // Fetches the tile of queries from t0 on of head.h into a stage.
  const auto fetch = [&](uint32_t stage, int t0) {
    if (differ) head.look(p);
    const uint32_t terms = stage + 2 * Shape::kMoveBytes;
    const bool all = kPlain && !kBlocks && !crosses_edge(head, t0, kMove, s_block, kStay);
    load_tile<kD, kMove, kThreads, !kPlain>(
        stage, known_queries<Element>(p, head, arguments.q_aligned, all), t0);
    load_tile<kD, kMove, kThreads, !kPlain>(
        stage + Shape::kMoveBytes,
        head.queries_of<Element>(p.grad_out, p.D_v, arguments.grad_out_aligned), t0);
    constexpr int kChunks = Shape::kTermBytes / 16;
    const int which = thread_index() / kChunks, chunk = thread_index() % kChunks;
    const TermPlanes rows(arguments, head.b, head.h);
    if (which < rows.planes) {
      copy_async(terms + which * Shape::kTermBytes + chunk * 16,
                 rows.m + which * rows.plane + t0 + chunk * 4, 16);
    }
  };

  using Tiles = TilesOf<kForm, kMove, true>;
  Tiles tiles(p.blocks, head, s_block, query_begin, query_end);
  // With a block mask: t0, or where the head at hand has no more tiles, the first of a later one's.
  const auto or_of_next_heads = [&](int t0) {
    while (t0 == kNoTile && ++head.h < end_head) {
      tiles = Tiles(p.blocks, head, s_block, query_begin, query_end);
      t0 = tiles.first();
    }
    return t0;
  };

  float dk[kWantsK ? kRowTiles : 1][kD / 8][4] = {}, dv[kWantsV ? kRowTiles : 1][kD / 8][4] = {};

  // Load
  int t0 = tiles.first();
  if constexpr (kBlocks) t0 = or_of_next_heads(t0);
  if (head.h < end_head) {
    load_tile<kD, kStay, kThreads, !kPlain>(
        k_tile, all.keys_of<Element>(p.k, p.D, arguments.k_aligned), s_block);
    load_tile<kD, kStay, kThreads, !kPlain>(
        v_tile, all.keys_of<Element>(p.v, p.D_v, arguments.v_aligned), s_block);
    fetch(ring, t0);
  }
  commit_copies();

  // Queries, head by head and tile by tile
  uint32_t stage = ring;
  while (head.h < end_head) {
    const int h = head.h, slot = tiles.slot();
    int next_t0, next_h;
    if constexpr (kBlocks) {
      next_t0 = or_of_next_heads(tiles.after(t0)), next_h = head.h;
    } else {
      next_t0 = t0 + kMove < query_end ? t0 + kMove : query_begin;
      next_h = t0 + kMove < query_end ? h : h + 1;
    }
    const uint32_t next_stage = Shape::kStages == 1 ? ring
                                : stage == ring     ? ring + Shape::kStageBytes
                                                    : ring;
    wait_copies<0>();
    sync_block();  // this round's rows are here, and no warp reads the last round's any more
    head.h = next_h;
    if constexpr (Shape::kStages == 2) {
      if (next_h < end_head) fetch(next_stage, next_t0);
      commit_copies();
    }

    if (s0 < head.S) {
      // Anew in each turn: kept, it takes a register that D = 64 lacks (sm_75 spilled 100 bytes).
      const int lane = opaque(thread_index()) % kWarpSize;
      const uint32_t q_rows = stage, do_rows = q_rows + Shape::kMoveBytes;
      const uint32_t term_rows = do_rows + Shape::kMoveBytes;
      head.h = h;
      if (differ) head.look(p);
      const ScoreEdits edits(arguments, head);
      const bool edge = crosses_edge(head, t0, kMove, s0, kRowTiles * 16);
      float s[kRowTiles][kMove / 8][4] = {}, dp[kRowTiles][kMove / 8][4] = {};
      float dcapped[kPlain ? 1 : kRowTiles][kMove / 8][4];
      uint32_t live = ~0u, kept[kRowTiles];
      ATTNFAST_UNROLL for (int m = 0; m < kRowTiles; ++m) kept[m] = ~0u;
      // Scores, transposed
      const BlockBits<kBlocks, true, kRowTiles, kMove / 8> bits(p.blocks, slot, t0, s0, lane);
      multiply_rows_by_rows<Element, kD>(s, k_tile + own, q_rows, lane);
      if constexpr (!kPlain) {
        const bool leaves_out = edits.apply<true>(s, head, t0, s0, lane, edge, dcapped);
        if (bits.mask(s) || leaves_out) live = live_columns(s);
        philox.stream = static_cast<uint32_t>(head.b * p.H + head.h);
        if (philox.threshold) {
          kept_by_dropout<true, kRowTiles, kMove / 8>(kept, philox, t0, s0, lane);
        }
      } else if (bits.mask(s)) {
        live = live_columns(s);
      }
      // dP
      if constexpr (kWantsK) multiply_rows_by_rows<Element, kD>(dp, v_tile + own, do_rows, lane);
      if constexpr (!kPlain && kWantsK) {
        if (p.grad_weights.data) {
          WeightGradient(p, head).template add_to<true>(dp, head, t0, s0, lane);
        }
      }
      // Probabilities, ds
      const MovingTerms<Shape::kTermBytes> terms{term_rows, lane, !kPlain && p.grad_entropy};
      score_gradients<kPlain>(s, dp, edits, kept, keep_scale, kPlain ? nullptr : dcapped, terms);
      if (kPlain && edge) {
        edits.mask_positions<true>(s, head, t0, s0, lane, 0.0f);
        edits.mask_positions<true>(dp, head, t0, s0, lane, 0.0f);
      }
      if constexpr (kPlain) bits.mask(s, 0.0f), bits.mask(dp, 0.0f);
      // dv
      if constexpr (kWantsV) {
        add_registers_times_rows<Element, kD, !kPlain || kBlocks>(dv, s, do_rows, live, lane);
      }
      // dk
      if constexpr (kWantsK) {
        add_registers_times_rows<Element, kD, !kPlain || kBlocks>(dk, dp, q_rows, live, lane);
      }
    }
    head.h = next_h;
    if (Shape::kStages == 1 && next_h < end_head) {
      sync_block();  // no warp reads this round's rows any more
      fetch(next_stage, next_t0);
      commit_copies();
    }
    stage = next_stage, t0 = next_t0;
  }
  if (s0 >= head.S) return;

  // Store
  float scale[2 * kRowTiles], one[2 * kRowTiles];
  ATTNFAST_UNROLL for (int r = 0; r < 2 * kRowTiles; ++r) scale[r] = p.scale, one[r] = 1.0f;
  if constexpr (kWantsK) {
    auto* out = head.rows_to<Element>(p.dk, head.h_kv, head.k_begin);
    store_rows<kD, !kPlain>(dk, scale, k_tile + own, out + s0 * p.dk.t, p.dk.t, head.S - s0,
                            static_cast<int>(p.D), arguments.dk_aligned, lane);
  }
  if constexpr (kWantsV) {
    auto* out = head.rows_to<Element>(p.dv, head.h_kv, head.k_begin);
    store_rows<kD, !kPlain>(dv, one, v_tile + own, out + s0 * p.dv.t, p.dv.t, head.S - s0,
                            static_cast<int>(p.D_v), arguments.dv_aligned, lane);
  }
}

template <class Element, int kD, Form kForm>
void launch_attention_bwd_keys(const BackwardArguments& arguments, Stream stream) {
  with_shape<Element, kD, kForm, true>(stream, [&](auto small) {
    constexpr bool kSmall = decltype(small)::value;
    using Shape = BackwardShape<kD, kForm, true, kSmall>;
    BackwardArguments a = arguments;
    a.blocks = (a.p.S + Shape::kStay - 1) / Shape::kStay;
    const auto run = [&](const char* name, auto kernel) {
      launch<BackwardArguments>(kernel_name<Element, kD>(name, kForms[static_cast<int>(kForm)]),
                                kernel, a.p.B * a.p.H_kv * a.blocks, Shape::kThreads,
                                Shape::kSharedBytes, stream, a);
    };
    if constexpr (kD <= (kSmall ? 96 : 128)) {
      run("attention_bwd_keys", attention_bwd_keys_kernel<Element, kD, kForm, true, true, kSmall>);
    } else {
      run("attention_bwd_keys dk",
          attention_bwd_keys_kernel<Element, kD, kForm, true, false, kSmall>);
      run("attention_bwd_keys dv",
          attention_bwd_keys_kernel<Element, kD, kForm, false, true, kSmall>);
    }
  });
}

}  // namespace attnfast::cuda
