// The gradient of a bias, of one head dim, ATTNFAST_HEAD_DIM: ds summed over the dimensions that the
// bias broadcasts, in a fixed order. Each block owns a tile of the bias, and goes through all that
// share it. The sinks' gradient, which knows no head dim, is in sinks.cu.
//   dbias = sum of ds
// Grid:   (bias's batch entry, bias's head, block of kM queries or 1, block of kN keys or 1)
// Memory: tiles of q, do, k and v in shared memory; s, dP and the sum in registers
// Limits: D and D_v up to kD; bf16, fp16
#include "gradients.h"
#include "launch.h"
#include "probabilities.h"

namespace attnfast::cuda {
namespace {

ATTNFAST_DEVICE void store_number(const MutableView& x, int64_t at, float value) {
  switch (x.dtype) {
    case DType::kFloat32:
      return store_global(static_cast<float*>(x.data) + at, value);
    case DType::kBFloat16:
      return store_global(static_cast<uint16_t*>(x.data) + at,
                          static_cast<uint16_t>(pack<BFloat16>(value, 0.0f)));
    case DType::kFloat16:
      return store_global(static_cast<uint16_t*>(x.data) + at,
                          static_cast<uint16_t>(pack<Float16>(value, 0.0f)));
    default:
      return store_global(static_cast<double*>(x.data) + at, static_cast<double>(value));
  }
}

}  // namespace

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((BiasShape<kD>::kThreads), 1)
    attention_bwd_bias_kernel(ATTNFAST_PARAMS BackwardArguments arguments) {
  using Shape = BiasShape<kD>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kThreads = Shape::kThreads;
  if (!has_code<Element, Shape::kSharedBytes <= kTuringShared>()) return;
  const BackwardParams& p = arguments.p;
  const BiasSizes& sizes = arguments.bias;

  // Setup
  int64_t index = block_index();
  const int64_t key_blocks = sizes.S > 1 ? (sizes.S + kN - 1) / kN : 1;
  const int64_t query_blocks = sizes.T > 1 ? (sizes.T + kM - 1) / kM : 1;
  const int key_block = static_cast<int>(index % key_blocks), by_key = index / key_blocks;
  const int query_block = static_cast<int>(by_key % query_blocks);
  index = by_key / query_blocks;
  const int64_t bias_h = index % sizes.H, bias_b = index / sizes.H;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const float keep_scale = arguments.dropout.keep_scale;

  const uint32_t q_tile = shared_memory(), do_tile = q_tile + kM * kD * 2;
  const uint32_t k_tile = do_tile + kM * kD * 2, v_tile = k_tile + kN * kD * 2;
  const uint32_t own = warp * 16 * kD * 2;  // the warp's rows of q_tile and do_tile

  // ds of one tile of one head, added to the sum
  float sum[1][kN / 8][4] = {};
  const auto add_tile = [&](const Head& head, int t_block, int s0) {
    const int t0 = t_block + warp * 16;
    const int t_last = min_of(t_block + kM, head.T) - 1;
    if (t_block >= head.T || s0 >= head.end_key(t_last) || s0 + kN <= head.first_key(t_block))
      return;
    const int slot = p.blocks.starts ? slot_at(p.blocks, head, t_block, s0) : kFull;
    if (slot == kEmpty) return;
    // Load
    sync_block();  // no warp reads the last tiles any more
    load_tile<kD, kM, kThreads, true>(
        q_tile, head.queries_of<Element>(p.q, p.D, arguments.q_aligned), t_block);
    load_tile<kD, kM, kThreads, true>(
        do_tile, head.queries_of<Element>(p.grad_out, p.D_v, arguments.grad_out_aligned), t_block);
    load_tile<kD, kN, kThreads, true>(k_tile, head.keys_of<Element>(p.k, p.D, arguments.k_aligned),
                                      s0);
    load_tile<kD, kN, kThreads, true>(v_tile,
                                      head.keys_of<Element>(p.v, p.D_v, arguments.v_aligned), s0);
    commit_copies();
    wait_copies<0>();
    sync_block();  // all four are here
    const ScoreEdits edits(arguments, head);
    const Philox philox(p, arguments.dropout, head.b, head.h);
    const OwnTerms<1> terms(TermPlanes(arguments, head.b, head.h), t0, head.T, lane);
    float s[1][kN / 8][4] = {}, dp[1][kN / 8][4] = {};
    uint32_t kept[1] = {~0u};
    // Scores
    multiply_rows_by_rows<Element, kD>(s, q_tile + own, k_tile, lane);
    edits.apply<false>(s, head, t0, s0, lane, crosses_edge(head, t0, 16, s0, kN));
    BlockBits<true, false, 1, kN / 8>(p.blocks, slot, t0, s0, lane).mask(s);
    if (philox.threshold) kept_by_dropout<false, 1, kN / 8>(kept, philox, t0, s0, lane);
    // dP
    multiply_rows_by_rows<Element, kD>(dp, do_tile + own, v_tile, lane);
    if (p.grad_weights.data) {
      WeightGradient(p, head).template add_to<false>(dp, head, t0, s0, lane);
    }
    // Probabilities, ds
    score_gradients<false>(s, dp, edits, kept, keep_scale,
                           static_cast<const float (*)[kN / 8][4]>(nullptr), terms);
    ATTNFAST_UNROLL for (int n = 0; n < kN / 8; ++n) {
      ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) sum[0][n][e] += dp[0][n][e];
    }
  };

  // All that shares the bias's tile
  for (int64_t b = bias_b; b < p.B; b += sizes.B) {
    for (int64_t h = bias_h; h < p.H; h += sizes.H) {
      const Head head(p, arguments.rows_q, arguments.rows_k, b, h);
      const int t_begin = sizes.T > 1 ? query_block * kM : 0,
                s_begin = sizes.S > 1 ? key_block * kN : 0;
      const int t_end = sizes.T > 1 ? t_begin + 1 : head.T,
                s_end = sizes.S > 1 ? s_begin + 1 : head.S;
      for (int t_block = t_begin; t_block < t_end; t_block += kM) {
        for (int s0 = s_begin; s0 < s_end; s0 += kN) add_tile(head, t_block, s0);
      }
    }
  }

  // Store: sums within the tile, over queries by way of shared memory
  const int64_t at = bias_b * p.dbias.b + bias_h * p.dbias.h;
  const int t0 = query_block * kM + warp * 16, s0 = key_block * kN;
  if (sizes.T > 1 && sizes.S > 1) {
    ATTNFAST_UNROLL for (int n = 0; n < kN / 8; ++n) {
      ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
        const Position of = position_of<false>(t0, s0, 0, n, e, lane);
        if (of.t >= sizes.T || of.key >= sizes.S) continue;
        store_number(p.dbias, at + of.t * p.dbias.t + of.key * p.dbias.d, sum[0][n][e]);
      }
    }
    return;
  }
  if (sizes.T > 1) {
    ATTNFAST_UNROLL for (int half = 0; half < 2; ++half) {
      float row = 0.0f;
      ATTNFAST_UNROLL for (int n = 0; n < kN / 8; ++n) {
        row += sum[0][n][half * 2] + sum[0][n][half * 2 + 1];
      }
      row += shuffle_xor(row, 1);
      row += shuffle_xor(row, 2);
      const int t = t0 + half * 8 + lane / 4;
      if (lane % 4 == 0 && t < sizes.T) store_number(p.dbias, at + t * p.dbias.t, row);
    }
    return;
  }
  float own_columns[kN / 8][2];
  ATTNFAST_UNROLL for (int n = 0; n < kN / 8; ++n) {
    ATTNFAST_UNROLL for (int e = 0; e < 2; ++e) {
      own_columns[n][e] = sum[0][n][e] + sum[0][n][e + 2];
    }
  }
  float column = column_totals<Shape::kWarps>(own_columns, warp, lane);
  if (warp > 0) return;
  if (sizes.S > 1) {
    if (s0 + lane < sizes.S) store_number(p.dbias, at + (s0 + lane) * p.dbias.d, column);
    return;
  }
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) column += shuffle_xor(column, lanes);
  if (lane == 0) store_number(p.dbias, at, column);
}

namespace {

template <class Element>
void run(const BackwardArguments& a, Stream stream) {
  constexpr int kD = ATTNFAST_HEAD_DIM;
  using Shape = BiasShape<kD>;
  static_assert(Shape::kSharedBytes <= kSharedLimit);
  const int64_t key_blocks = a.bias.S > 1 ? (a.bias.S + Shape::kN - 1) / Shape::kN : 1;
  const int64_t query_blocks = a.bias.T > 1 ? (a.bias.T + Shape::kM - 1) / Shape::kM : 1;
  launch<BackwardArguments>(kernel_name<Element, kD, false>("attention_bwd_bias"),
                            attention_bwd_bias_kernel<Element, kD>,
                            a.bias.B * a.bias.H * query_blocks * key_blocks, Shape::kThreads,
                            Shape::kSharedBytes, stream, a);
}

}  // namespace

template <>
void run_attention_bias<ATTNFAST_HEAD_DIM>(const BackwardArguments& a, Stream stream) {
  a.p.q.dtype == DType::kFloat16 ? run<Float16>(a, stream) : run<BFloat16>(a, stream);
}

}  // namespace attnfast::cuda
