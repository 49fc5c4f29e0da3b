// Backward's numbers per query, before the walk over the keys, and the sinks' gradient after it.
//   row = -rowsum(do o) + dlse + dH (log l - H)
//   dsink = sum over b, t of p_sink (row - dH (sink - m))
// Grid:   rows: (batch entry, head, block of kRows queries), the padding included; sinks: (head)
// Memory: registers; sinks: one number per warp in shared memory
#include "gradients.h"
#include "launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128, kRows = 64;

template <class Element>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS(kThreads, 1)
    attention_bwd_rows_kernel(ATTNFAST_PARAMS BackwardArguments a) {
  if (!has_code<Element>()) return;
  const BackwardParams& p = a.p;
  const int64_t blocks = a.padded / kRows, bh = block_index() / blocks;
  const int first = static_cast<int>(block_index() % blocks) * kRows;
  const Head head(p, a.rows_q, a.rows_k, bh / p.H, bh % p.H);
  const int lane = thread_index() % kLanesPerRow;
  for (int r = thread_index() / kLanesPerRow; r < kRows; r += kThreads / kLanesPerRow) {
    const int t = first + r;
    const RowTerms terms = row_terms<Element>(a, head, t, lane);
    if (lane > 0) continue;
    const TermRows to(a, head.b, head.h);
    store_global(to.m + t, terms.m);
    store_global(to.m + to.plane + t, terms.log2_l);
    store_global(to.row(t), terms.row);
    if (to.planes > 3) store_global(to.m + 3 * to.plane + t, terms.spread);
  }
}

ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS(kThreads, 1)
    attention_bwd_sinks_kernel(ATTNFAST_PARAMS BackwardArguments a) {
  const BackwardParams& p = a.p;
  const int64_t h = block_index();
  const float sink = load_global(p.sinks + h) * a.units.natural;
  float sum = 0.0f;
  for (int64_t b = 0; b < p.B; ++b) {
    const TermRows rows(a, b, h);
    for (int64_t t = thread_index(); t < a.padded; t += kThreads) {
      const RowTerms of = rows.load(t);
      const float depth = depth_of(sink, of.m, a.units);
      const float share = exp2_fast(fmaf(depth, a.units.to_log2, -of.log2_l));
      if (share != 0.0f) sum += share * (of.row - of.spread * depth);
    }
  }
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) sum += shuffle_xor(sum, lanes);
  const int warp = thread_index() / kWarpSize;
  if (thread_index() % kWarpSize == 0) store_shared(shared_memory() + warp * 4, sum);
  sync_block();
  if (thread_index() > 0) return;
  float total = 0.0f;
  for (int w = 0; w < kThreads / kWarpSize; ++w) {
    total += load_shared<float>(shared_memory() + w * 4);
  }
  store_global(p.dsinks + h, total);
}

}  // namespace

int64_t padded_rows(int64_t T) { return (T + kRows - 1) / kRows * kRows; }

void run_attention_bwd_rows(const BackwardArguments& a, Stream stream) {
  const bool half = a.p.q.dtype == DType::kFloat16;
  launch<BackwardArguments>(
      half ? "attention_bwd_rows<fp16>" : "attention_bwd_rows<bf16>",
      half ? attention_bwd_rows_kernel<Float16> : attention_bwd_rows_kernel<BFloat16>,
      a.p.B * a.p.H * (a.padded / kRows), kThreads, 0, stream, a);
}

void run_attention_bwd_sinks(const BackwardArguments& a, Stream stream) {
  launch<BackwardArguments>("attention_bwd_sinks", attention_bwd_sinks_kernel, a.p.H, kThreads,
                            kThreads / kWarpSize * 4, stream, a);
}

}  // namespace attnfast::cuda
