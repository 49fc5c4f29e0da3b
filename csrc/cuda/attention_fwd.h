// Attention forward, one warp per 16 or 32 query rows (FlashAttention-2, arXiv:2307.08691,
// Algorithm 1).
//   o = softmax(scale * q k^T + bias) v        lse = logsumexp of the scores = m + log l
// Grid:   (batch entry, head, block of kM queries); the last queries, with causal the longest,
//         come first
// Memory: q, one tile of k and one of v in shared memory: v arrives during q k^T, the next k
//         during the softmax and p v; s, p, acc, m, l in registers
// Limits: D and D_v up to kD; bf16, fp16
#pragma once
#include "arguments.h"
#include "blocks.h"
#include "dropout.h"
#include "head.h"
#include "launch.h"
#include "prims/opaque.h"
#include "scores.h"
#include "tile.h"

namespace attnfast::cuda {

// kM queries, kN keys.
template <int kD, Form kForm>
struct ForwardShape {
  static constexpr bool kPlain = kIsPlain<kForm>, kBlocks = kHasBlocks<kForm>;
  static constexpr int kRowTiles =
      !kHasOptions<kForm> && kD <= (kBlocks ? 64 : 128) ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kWarps = kBlocks ? 4 / kRowTiles : kD > 128 || kRowTiles == 2 ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kM = kWarps * kRowTiles * 16;
  // The most with which hardly anything spills.
  static constexpr int kPlainN = kD == 64 ? 128 : kD == 96 || kD == 256 ? 32 : 64;
  static constexpr int kN = kPlain && !kBlocks ? kPlainN : kD <= 128 ? 64 : 32;
  static constexpr int kSharedBytes = (kM + 2 * kN) * kD * 2;
  // Where not, for its shared memory or, at 128, its registers, the form with options serves.
  static constexpr bool kOnTuring =
      kSharedBytes <= kTuringShared && !(kPlain && !kBlocks && kD == 128);
};

// A row whose maximum is farther from 0, in powers of two, has it subtracted from its scores before
// they are multiplied: a multiply-add alone would round p.
constexpr float kFar = 1024.0f;

// The running softmax of a lane's rows, two for each row tile: row 2 * m + half.
template <int kRows>
struct Softmax {
  float m[kRows];  // largest score so far, in the scores' units; the same in a quad's lanes
  float l[kRows];  // sum of exp(s - m) over this lane's keys
};

// Sums for the statistics, over this lane's keys.
template <int kRows>
struct Moments {
  float depth_sum[kRows];     // of exp(s - m) (s - m), in units
  float distance_sum[kRows];  // of exp(s - m) |j - t'|
};

template <class Element, int kD, Form kForm>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((ForwardShape<kD, kForm>::kThreads), 1)
    attention_fwd_kernel(ATTNFAST_PARAMS ForwardArguments arguments) {
  using Shape = ForwardShape<kD, kForm>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kThreads = Shape::kThreads;
  constexpr int kRowTiles = Shape::kRowTiles, kRows = 2 * kRowTiles;
  constexpr bool kPlain = Shape::kPlain, kBlocks = Shape::kBlocks, kOptions = kHasOptions<kForm>;
  if (!has_code<Element, Shape::kOnTuring>()) return;
  const ForwardParams& p = arguments.p;

  // Setup
  const int64_t index = block_index(), query_blocks = arguments.query_blocks;
  const int64_t bh = index / query_blocks;
  const int t_block = static_cast<int>(query_blocks - 1 - index % query_blocks) * kM;
  const Head head(p, arguments.rows_q, arguments.rows_k, bh / p.H, bh % p.H);
  if (t_block >= head.T) return;
  const int t_last = min_of(t_block + kM, head.T) - 1;
  const int key_begin = head.first_key(t_block) / kN * kN, key_end = head.end_key(t_last);
  ScoreEdits edits(arguments, head);
  if constexpr (!kOptions) edits.slope = 0.0f, edits.units.softcap = 0.0f;
  const Philox philox(p, arguments.dropout, head.b, head.h);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int t0 = t_block + warp * kRowTiles * 16;  // the warp's first query
  const InnerKeys inner(head, t0, kRowTiles * 16, kN);
  // A plain call's warp without queries goes along: what it computes is not stored, and to leave it
  // out takes more registers than D = 128 has.
  const bool works = kPlain || t0 < head.T;

  const uint32_t q_tile = shared_memory(), k_tile = q_tile + kM * kD * 2;
  const uint32_t v_tile = k_tile + kN * kD * 2, q_rows = q_tile + warp * kRowTiles * 16 * kD * 2;
  const auto of_q = LaneAddress<kD>::down_then_across(q_rows, lane);
  const auto of_k = LaneAddress<kD>::across_then_down(k_tile, lane);
  const auto of_v = LaneAddress<kD>::down_then_across(v_tile, lane);
  const int D_v = static_cast<int>(p.D_v);
  const auto q = head.queries_of<Element>(p.q, p.D, arguments.q_aligned);
  const auto k = head.keys_of<Element>(p.k, p.D, arguments.k_aligned);
  const auto v = head.keys_of<Element>(p.v, p.D_v, arguments.v_aligned);

  float acc[kRowTiles][kD / 8][4] = {};
  Softmax<kRows> softmax;
  Moments<kRows> moments;
  ATTNFAST_UNROLL for (int r = 0; r < kRows; ++r) {
    softmax.m[r] = -kInfinity, softmax.l[r] = 0.0f;
    moments.depth_sum[r] = 0.0f, moments.distance_sum[r] = 0.0f;
  }

  // Load q, and the first k
  TilesOf<kForm, kN, false> tiles(p.blocks, head, t_block, key_begin, key_end);
  const int first = tiles.first();
  TileWalk<Element, kD, kN, kThreads, kOptions> k_walk(k, first), v_walk(v, first);
  if (first < key_end) {
    load_tile<kD, kM, kThreads, kOptions>(q_tile, q, t_block);
    k_walk.load(k_tile, k, first);
  }
  commit_copies();

  // Keys, tile by tile
  for (int s0 = first, next; s0 < key_end; s0 = next) {
    wait_copies<0>();
    sync_block();  // q and k are here, and no warp reads v any more
    v_walk.load(v_tile, v, s0);
    if constexpr (!kBlocks) v_walk.down();
    commit_copies();

    // Scores
    float s[kRowTiles][kN / 8][4];
    uint32_t live = ~0u;
    if (works) {
      const BlockBits<kBlocks, false, kRowTiles, kN / 8> bits(p.blocks, tiles.slot(), t0, s0, lane);
      multiply_rows_by_rows<Element, kD>(s, of_q.again(), of_k.again());
      const bool edge = !inner.has(s0);
      if constexpr (kPlain) {
        // Anew where they are wanted: kept, they take registers that D = 64 lacks.
        const auto anew = [](int x) { return kD <= 64 ? opaque(x) : x; };
        if (edge) edits.mask_positions<false>(s, head, anew(t0), s0, anew(lane));
        if (bits.mask(s)) live = live_columns(s);
      } else {
        const bool leaves_out = edits.apply<false>(s, head, t0, s0, lane, edge);
        if (bits.mask(s) || leaves_out) live = live_columns(s);
      }
    }

    wait_copies<0>();
    sync_block();  // v is here, and no warp reads k any more
    next = tiles.after(s0);
    if constexpr (kBlocks) {
      if (next < key_end) k_walk.by((next - s0) * k.stride), v_walk.by((next - s0) * v.stride);
    } else {
      k_walk.down();
    }
    if (next < key_end) k_walk.load(k_tile, k, next);
    commit_copies();
    if (!works) continue;

    // Softmax
    const float to_log2 = arguments.units.to_log2;
    float base[kRows], base_log2[kRows], farthest = 0.0f;
    ATTNFAST_UNROLL for (int r = 0; r < kRows; ++r) {
      const int i = r / 2, half = r % 2 * 2;
      float m = softmax.m[r];
      ATTNFAST_UNROLL for (int n = 0; n < kN / 8; ++n) {
        m = fmaxf(m, fmaxf(s[i][n][half], s[i][n][half + 1]));
      }
      m = fmaxf(m, shuffle_xor(m, 1));
      m = fmaxf(m, shuffle_xor(m, 2));
      base[r] = fmaxf(m, -kLargest);
      const float drop = softmax.m[r] - base[r];  // of the old maximum, in units
      const float rescale = exp2_fast(drop * to_log2);
      softmax.m[r] = m;
      if constexpr (kOptions) {
        if (p.entropy) {
          const float moved = rescale > 0.0f ? drop : 0.0f;
          moments.depth_sum[r] = rescale * (moments.depth_sum[r] + moved * softmax.l[r]);
          moments.distance_sum[r] *= rescale;
        }
      }
      softmax.l[r] *= rescale;
      ATTNFAST_UNROLL for (int n = 0; n < kD / 8; ++n) {
        acc[i][n][half] *= rescale, acc[i][n][half + 1] *= rescale;
      }
      base_log2[r] = base[r] * to_log2;
      farthest = fmaxf(farthest, fabsf(base_log2[r]));
    }
    const bool wants_depths = kOptions && p.entropy;
    if (wants_depths || any_lane(farthest > kFar)) {
      ATTNFAST_UNROLL for (int r = 0; r < kRows; ++r) {
        if (!wants_depths && !(fabsf(base_log2[r]) > kFar)) continue;
        base_log2[r] = 0.0f;
        ATTNFAST_UNROLL for (int n = 0; n < kN / 8; ++n) {
          s[r / 2][n][r % 2 * 2] -= base[r], s[r / 2][n][r % 2 * 2 + 1] -= base[r];
        }
      }
    }
    const auto to_probabilities = [&](auto each) {
      ATTNFAST_UNROLL for (int r = 0; r < kRows; ++r) {
        ATTNFAST_UNROLL for (int n = 0; n < kN / 8; ++n) {
          ATTNFAST_UNROLL for (int e = r % 2 * 2; e < r % 2 * 2 + 2; ++e) {
            float& x = s[r / 2][n][e];
            const float depth = x;  // where depths are wanted
            x = exp2_fast(fmaf(x, to_log2, -base_log2[r]));
            softmax.l[r] += x;
            each(r, n, e, x, depth);
          }
        }
      }
    };
    if (wants_depths) {
      to_probabilities([&](int r, int n, int e, float x, float depth) {
        if (depth == -kInfinity) return;
        const Position at = position_of<false>(t0, s0, r / 2, n, e, lane);
        moments.depth_sum[r] += x * depth;
        moments.distance_sum[r] += x * fabsf(static_cast<float>(at.key - at.t - head.shift));
      });
    } else {
      to_probabilities([](int, int, int, float, float) {});
    }
    if constexpr (kOptions) {
      if (philox.threshold) {
        uint32_t kept[kRowTiles];
        kept_by_dropout<false, kRowTiles, kN / 8>(kept, philox, t0, s0, lane);
        ATTNFAST_UNROLL for (int i = 0; i < kRowTiles; ++i) {
          ATTNFAST_UNROLL for (int x = 0; x < kN / 2; ++x) {
            if (!(kept[i] >> x & 1)) s[i][x / 4][x % 4] = 0.0f;
          }
        }
      }
    }
    // Output
    if ((!kPlain || kBlocks) && any_lane(live != ~0u)) {
      add_registers_times_rows<Element, kD, true>(acc, s, of_v.again(), live);
    } else {
      add_registers_times_rows<Element, kD, false>(acc, s, of_v.again(), live);
    }
  }

  // Row by row: what its four lanes have, together
  if (t0 >= head.T) return;
  const Scaling& units = arguments.units;
  const float keep_scale = !kOptions ? 1.0f : arguments.dropout.keep_scale;
  float factor[kRows];  // from acc to the output
  ATTNFAST_UNROLL for (int r = 0; r < kRows; ++r) {
    const int t = t0 + r * 8 + lane / 4;
    float m = softmax.m[r], l = softmax.l[r];
    l += shuffle_xor(l, 1);
    l += shuffle_xor(l, 2);
    float rescale = 1.0f, depth_sum = 0.0f, distance_sum = 0.0f;
    if constexpr (!kPlain) {
      depth_sum = moments.depth_sum[r], distance_sum = moments.distance_sum[r];
      if (kOptions && p.entropy) {
        depth_sum += shuffle_xor(depth_sum, 1), distance_sum += shuffle_xor(distance_sum, 1);
        depth_sum += shuffle_xor(depth_sum, 2), distance_sum += shuffle_xor(distance_sum, 2);
      }
      // Sinks: one more key without a value
      if (p.sinks) {
        const float sink = load_global(p.sinks + head.h) * units.natural;
        const float top = fmaxf(m, sink), base = top == -kInfinity ? 0.0f : top;
        rescale = exp2_fast((m - base) * units.to_log2);
        const float l_sink = exp2_fast((sink - base) * units.to_log2);
        depth_sum = rescale * depth_sum;
        if (m != -kInfinity) depth_sum += rescale * (m - base) * l;
        if (sink != -kInfinity) depth_sum += l_sink * (sink - base);
        distance_sum *= rescale;
        l = rescale * l + l_sink;
        m = top;
      }
    }

    // Statistics
    factor[r] = l == 0.0f ? 0.0f : rescale * keep_scale / l;
    if (lane % 4 == 0 && t < head.T) {
      const int64_t row = head.row_number(p, t);
      const bool any = l != 0.0f;  // keys, or a sink
      const float log2_l = log2f(l), log_l = log2_l * kLn2;
      store_global(p.lse + row, any ? m * units.to_natural + log_l : -kInfinity);
      store_global(p.norm + row, any ? m : 0.0f);
      store_global(p.norm + p.norm_plane + row, any ? log2_l : kInfinity);
      if constexpr (kOptions) {
        if (p.entropy) {
          const float entropy = any ? log_l - depth_sum / l * units.to_natural : 0.0f;
          const float focus = exp2_fast((softmax.m[r] - m) * units.to_log2) / l;
          store_global(p.max_logit + row, softmax.m[r] * units.to_natural);
          store_global(p.entropy + row, entropy);
          store_global(p.reach + row, any ? distance_sum / l : 0.0f);
          store_global(p.focus + row, any ? focus : 0.0f);
        }
      }
    }
  }

  // Store
  auto* out = head.rows_to<Element>(p.out, head.h, head.q_begin);
  store_rows<kD, kOptions>(acc, factor, q_rows, out + t0 * p.out.t, p.out.t, head.T - t0, D_v,
                           arguments.out_aligned, lane);
}

template <class Element, int kD, Form kForm>
void launch_attention_fwd(const ForwardArguments& arguments, Stream stream) {
  using Shape = ForwardShape<kD, kForm>;
  static_assert(Shape::kSharedBytes <= kSharedLimit);
  if constexpr (!Shape::kOnTuring) {
    if (on_turing(stream)) {
      return launch_attention_fwd<Element, kD, Form::kOptions>(arguments, stream);
    }
  }
  ForwardArguments a = arguments;
  a.query_blocks = (a.p.T + Shape::kM - 1) / Shape::kM;
  launch<ForwardArguments>(
      kernel_name<Element, kD>("attention_fwd", kForms[static_cast<int>(kForm)]),
      attention_fwd_kernel<Element, kD, kForm>, a.p.B * a.p.H * a.query_blocks, Shape::kThreads,
      Shape::kSharedBytes, stream, a);
}

}  // namespace attnfast::cuda
