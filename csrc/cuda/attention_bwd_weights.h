// What the gradient dw of the returned weights adds to the row terms that row_terms.cu made.
//   row_term -= sum over the keys of p Z dw
// Grid:   (batch entry, head, block of kM queries)
// Memory: one tile of q and one of k in shared memory; s and the sums in registers
// Limits: D up to kD; bf16, fp16
#pragma once
#include "gradients.h"
#include "launch.h"
#include "probabilities.h"

namespace attnfast::cuda {

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((ProbabilityShape<kD>::kThreads), 1)
    attention_weight_rows_kernel(ATTNFAST_PARAMS BackwardArguments a) {
  using Shape = ProbabilityShape<kD>;
  if (!has_code<Element>()) return;
  const BackwardParams& p = a.p;

  // Setup
  const int64_t bh = block_index() / a.blocks;
  const int t_block = static_cast<int>(block_index() % a.blocks) * Shape::kM;
  const Head head(p, a.rows_q, a.rows_k, bh / p.H, bh % p.H);
  if (t_block >= head.T) return;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int t0 = t_block + warp * 16, t_last = min_of(t_block + Shape::kM, head.T) - 1;
  const Philox philox(p, a.dropout, head.b, head.h);
  const WeightGradient dw(p, head);
  const float keep_scale = a.dropout.keep_scale;
  float delta[2] = {};

  // Keys, tile by tile
  const int key_end = head.end_key(t_last);
  for (int s0 = head.first_key(t_block) / Shape::kN * Shape::kN; s0 < key_end; s0 += Shape::kN) {
    // Scores, Probabilities
    float s[1][Shape::kN / 8][4];
    if (!probability_tile<Element, kD>(a, head, t_block, s0, s, warp, lane)) continue;
    uint32_t kept[1] = {~0u};
    if (philox.threshold) {
      kept_by_dropout<false, 1, Shape::kN / 8>(kept, philox, t0, s0, lane);
    }
    // dP: what dw adds to delta
    ATTNFAST_UNROLL for (int x = 0; x < Shape::kN / 2; ++x) {
      const float p_x = s[0][x / 4][x % 4];
      if (p_x == 0.0f || !(kept[0] >> x & 1)) continue;
      const Position at = position_of<false>(t0, s0, 0, x / 4, x % 4, lane);
      delta[x / 2 % 2] += p_x * keep_scale * dw(at, head);
    }
  }

  // Store
  ATTNFAST_UNROLL for (int half = 0; half < 2; ++half) {
    delta[half] += shuffle_xor(delta[half], 1);
    delta[half] += shuffle_xor(delta[half], 2);
    const int t = t0 + half * 8 + lane / 4;
    if (lane % 4 || t >= head.T) continue;
    float* to = TermPlanes(a, head.b, head.h).row_term(t);
    store_global(to, load_global(to) - delta[half]);
  }
}

template <class Element, int kD>
void launch_attention_weight_rows(const BackwardArguments& arguments, Stream stream) {
  using Shape = ProbabilityShape<kD>;
  BackwardArguments a = arguments;
  a.blocks = (a.p.T + Shape::kM - 1) / Shape::kM;
  launch<BackwardArguments>(kernel_name<Element, kD, false>("attention_weight_rows"),
                            attention_weight_rows_kernel<Element, kD>, a.p.B * a.p.H * a.blocks,
                            Shape::kThreads, Shape::kSharedBytes, stream, a);
}

}  // namespace attnfast::cuda
