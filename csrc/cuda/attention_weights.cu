// Second passes over the scores, of one head dim, ATTNFAST_HEAD_DIM.
//   weights       p Z, per head or the mean over the heads
//   received      sum over the queries of p
//   weight_rows   what dw adds to delta: row -= sum over the keys of p Z dw
// Grid:   weights: (batch entry, head unless averaged, block of queries, block of keys); received:
//         (batch entry, head, block of keys); weight_rows: (batch entry, head, block of queries)
// Memory: one tile of q and one of k in shared memory; s and the sums in registers
// Limits: D up to kD; bf16, fp16
#include "launch.h"
#include "probabilities.h"

namespace attnfast::cuda {
namespace {

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((ProbabilityShape<kD>::kThreads), 1)
    attention_weights_kernel(ATTNFAST_PARAMS ForwardArguments a) {
  using Shape = ProbabilityShape<kD>;
  if (!has_code<Element>()) return;
  const ForwardParams& p = a.p;
  const bool mean = p.weights_mode == Weights::kMean;
  const int64_t key_blocks = (p.S + Shape::kN - 1) / Shape::kN, index = block_index();
  const int s0 = static_cast<int>(index % key_blocks) * Shape::kN;
  const int t_block = static_cast<int>(index / key_blocks % a.query_blocks) * Shape::kM;
  const int64_t bh = index / key_blocks / a.query_blocks;
  const int64_t b = mean ? bh : bh / p.H, first = mean ? 0 : bh % p.H, end = mean ? p.H : first + 1;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int t0 = t_block + warp * 16;
  const float keep = dropout_factor(p), share = mean ? 1.0f / static_cast<float>(p.H) : 1.0f;

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
      if (kept[0] >> x & 1) sum[x / 4][x % 4] += s[0][x / 4][x % 4] * keep;
    }
  }
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
  const int64_t key_blocks = (p.S + Shape::kN - 1) / Shape::kN, bh = block_index() / key_blocks;
  const int s0 = static_cast<int>(block_index() % key_blocks) * Shape::kN;
  const Head head(p, a.rows_q, a.rows_k, bh / p.H, bh % p.H);
  if (s0 >= head.S) return;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int query_end = head.end_query(min_of(s0 + Shape::kN, head.S) - 1);
  float column[Shape::kN / 8][2] = {};
  for (int t = head.first_query(s0) / Shape::kM * Shape::kM; t < query_end; t += Shape::kM) {
    float s[1][Shape::kN / 8][4];
    if (!probability_tile<Element, kD>(a, head, t, s0, s, warp, lane)) continue;
    ATTNFAST_UNROLL for (int x = 0; x < Shape::kN / 2; ++x) {
      column[x / 4][x % 2] += s[0][x / 4][x % 4];
    }
  }
  const float total = column_totals<Shape::kWarps>(column, warp, lane);
  if (warp > 0 || s0 + lane >= head.S) return;
  const int64_t row = (p.cu_seqlens_q ? 0 : head.b * p.received_stride_b) +
                      head.h * p.received_stride_h + head.k_begin;
  store_global(p.received + row + s0 + lane, total);
}

template <class Element, int kD>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((ProbabilityShape<kD>::kThreads), 1)
    attention_weight_rows_kernel(ATTNFAST_PARAMS BackwardArguments a) {
  using Shape = ProbabilityShape<kD>;
  if (!has_code<Element>()) return;
  const BackwardParams& p = a.p;
  const int64_t bh = block_index() / a.blocks;
  const int t_block = static_cast<int>(block_index() % a.blocks) * Shape::kM;
  const Head head(p, a.rows_q, a.rows_k, bh / p.H, bh % p.H);
  if (t_block >= head.T) return;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int t0 = t_block + warp * 16, t_last = min_of(t_block + Shape::kM, head.T) - 1;
  const Philox philox(p, a.dropout, head.b, head.h);
  const WeightGradient dw(p, head);
  const float keep = dropout_factor(p);
  float row[2] = {};
  const int key_end = head.end_key(t_last);
  for (int s0 = head.first_key(t_block) / Shape::kN * Shape::kN; s0 < key_end; s0 += Shape::kN) {
    float s[1][Shape::kN / 8][4];
    if (!probability_tile<Element, kD>(a, head, t_block, s0, s, warp, lane)) continue;
    uint32_t kept[1] = {~0u};
    if (philox.threshold) {
      kept_by_dropout<false, 1, Shape::kN / 8>(kept, philox, t0, s0, lane);
    }
    ATTNFAST_UNROLL for (int x = 0; x < Shape::kN / 2; ++x) {
      const float share = s[0][x / 4][x % 4];
      if (share == 0.0f || !(kept[0] >> x & 1)) continue;
      const Position at = position_of<false>(t0, s0, 0, x / 4, x % 4, lane);
      row[x / 2 % 2] += share * keep * dw(at, head);
    }
  }
  ATTNFAST_UNROLL for (int half = 0; half < 2; ++half) {
    row[half] += shuffle_xor(row[half], 1);
    row[half] += shuffle_xor(row[half], 2);
    const int t = t0 + half * 8 + lane / 4;
    if (lane % 4 || t >= head.T) continue;
    float* to = TermRows(a, head.b, head.h).row(t);
    store_global(to, load_global(to) - row[half]);
  }
}

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

template <class Element>
void run_rows(const BackwardArguments& arguments, Stream stream) {
  constexpr int kD = ATTNFAST_HEAD_DIM;
  using Shape = ProbabilityShape<kD>;
  BackwardArguments a = arguments;
  a.blocks = (a.p.T + Shape::kM - 1) / Shape::kM;
  launch<BackwardArguments>(kernel_name<Element, kD, false>("attention_weight_rows"),
                            attention_weight_rows_kernel<Element, kD>, a.p.B * a.p.H * a.blocks,
                            Shape::kThreads, Shape::kSharedBytes, stream, a);
}

}  // namespace

template <>
void run_attention_weights<ATTNFAST_HEAD_DIM>(const ForwardArguments& a, Stream stream) {
  a.p.q.dtype == DType::kFloat16 ? run<Float16>(a, stream) : run<BFloat16>(a, stream);
}

template <>
void run_attention_weight_rows<ATTNFAST_HEAD_DIM>(const BackwardArguments& a, Stream stream) {
  a.p.q.dtype == DType::kFloat16 ? run_rows<Float16>(a, stream) : run_rows<BFloat16>(a, stream);
}

}  // namespace attnfast::cuda
