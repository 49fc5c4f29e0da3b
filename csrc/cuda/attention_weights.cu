// Second passes over the scores, of one head dim, ATTNFAST_HEAD_DIM.
//   weights       p Z, per head or the mean over the heads
//   received      sum over the queries of p
// Grid:   weights: (batch entry, head unless averaged, block of queries, block of keys); received:
//         (batch entry, head, block of keys)
// Memory: one tile of q and one of k in shared memory; s and the sums in registers
// Limits: D up to kD; bf16, fp16
#include "dropout.h"
#include "launch.h"
#include "probabilities.h"

namespace attnfast::cuda {

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((ProbabilityShape<kD>::kThreads), 1)
    attention_weights_kernel(ATTNFAST_PARAMS ForwardArguments a) {
  using Shape = ProbabilityShape<kD>;
  if (!has_code<Element>()) return;
  const ForwardParams& p = a.p;

  // Setup
  const bool mean = p.weights_mode == Weights::kMean;
  const int64_t key_blocks = (p.S + Shape::kN - 1) / Shape::kN, index = block_index();
  const int s0 = static_cast<int>(index % key_blocks) * Shape::kN;
  const int t_block = static_cast<int>(index / key_blocks % a.query_blocks) * Shape::kM;
  const int64_t bh = index / key_blocks / a.query_blocks;
  const int64_t b = mean ? bh : bh / p.H, first = mean ? 0 : bh % p.H, end = mean ? p.H : first + 1;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int t0 = t_block + warp * 16;
  const float keep_scale = a.dropout.keep_scale,
              share = mean ? 1.0f / static_cast<float>(p.H) : 1.0f;

  // Scores, Probabilities: head by head
  float sum[Shape::kN / 8][4] = {};
  for (int64_t h = first; h < end; ++h) {
    const Head head(p, a.rows_q, a.rows_k, b, h);
    float s[1][Shape::kN / 8][4];
    if (!probability_tile<Element, kD>(a, head, t_block, s0, s, warp, lane)) continue;
    const Philox philox(p, a.dropout, b, h);
    uint32_t kept[1] = {~0u};
    if (philox.threshold) {
      kept_by_dropout<false, 1, Shape::kN / 8>(kept, philox, t0, s0, lane);
    }
    ATTNFAST_UNROLL for (int x = 0; x < Shape::kN / 2; ++x) {
      if (kept[0] >> x & 1) sum[x / 4][x % 4] += s[0][x / 4][x % 4] * keep_scale;
    }
  }

  // Store
  auto* out = static_cast<Element*>(p.weights.data) + b * p.weights.b + first * p.weights.h;
  ATTNFAST_UNROLL for (int x = 0; x < Shape::kN / 2; ++x) {
    const Position at = position_of<false>(t0, s0, 0, x / 4, x % 4, lane);
    if (at.t >= p.T || at.key >= p.S) continue;
    const uint32_t rounded = pack<Element>(sum[x / 4][x % 4] * share, 0.0f);
    store_global(out + at.t * p.weights.t + at.key * p.weights.d,
                 Element{static_cast<uint16_t>(rounded)});
  }
}

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((ProbabilityShape<kD>::kThreads), 1)
    attention_received_kernel(ATTNFAST_PARAMS ForwardArguments a) {
  using Shape = ProbabilityShape<kD>;
  if (!has_code<Element>()) return;
  const ForwardParams& p = a.p;

  // Setup
  const int64_t key_blocks = (p.S + Shape::kN - 1) / Shape::kN, bh = block_index() / key_blocks;
  const int s0 = static_cast<int>(block_index() % key_blocks) * Shape::kN;
  const Head head(p, a.rows_q, a.rows_k, bh / p.H, bh % p.H);
  if (s0 >= head.S) return;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int query_end = head.end_query(min_of(s0 + Shape::kN, head.S) - 1);

  // Scores, Probabilities: queries, tile by tile
  float column[Shape::kN / 8][2] = {};
  for (int t = head.first_query(s0) / Shape::kM * Shape::kM; t < query_end; t += Shape::kM) {
    float s[1][Shape::kN / 8][4];
    if (!probability_tile<Element, kD>(a, head, t, s0, s, warp, lane)) continue;
    ATTNFAST_UNROLL for (int x = 0; x < Shape::kN / 2; ++x) {
      column[x / 4][x % 2] += s[0][x / 4][x % 4];
    }
  }

  // Store
  const float total = column_totals<Shape::kWarps>(column, warp, lane);
  if (warp > 0 || s0 + lane >= head.S) return;
  const int64_t row = (p.cu_seqlens_q ? 0 : head.b * p.received_stride_b) +
                      head.h * p.received_stride_h + head.k_begin;
  store_global(p.received + row + s0 + lane, total);
}

namespace {

template <class Element>
void run(const ForwardArguments& arguments, Stream stream) {
  constexpr int kD = ATTNFAST_HEAD_DIM;
  using Shape = ProbabilityShape<kD>;
  static_assert(Shape::kSharedBytes <= kTuringShared);
  ForwardArguments a = arguments;
  a.query_blocks = (a.p.T + Shape::kM - 1) / Shape::kM;
  const int64_t key_blocks = (a.p.S + Shape::kN - 1) / Shape::kN;
  const auto start = [&](const char* name, auto kernel, int64_t blocks) {
    launch<ForwardArguments>(kernel_name<Element, kD, false>(name), kernel, blocks, Shape::kThreads,
                             Shape::kSharedBytes, stream, a);
  };
  if (a.p.weights.data) {
    const int64_t heads = a.p.weights_mode == Weights::kMean ? 1 : a.p.H;
    start("attention_weights", attention_weights_kernel<Element, kD>,
          a.p.B * heads * a.query_blocks * key_blocks);
  }
  if (a.p.received) {
    start("attention_received", attention_received_kernel<Element, kD>, a.p.B * a.p.H * key_blocks);
  }
}

}  // namespace

template <>
void run_attention_weights<ATTNFAST_HEAD_DIM>(const ForwardArguments& a, Stream stream) {
  a.p.q.dtype == DType::kFloat16 ? run<Float16>(a, stream) : run<BFloat16>(a, stream);
}

}  // namespace attnfast::cuda
