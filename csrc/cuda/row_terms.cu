// Backward's numbers per query, before the walk over the keys.
//   row_term = -rowsum(do o) + dlse + dH (log l - H)
// and the turns of the fused kernel, which follows, back to 0.
// Grid:   (batch entry, head, block of kRows queries), the padding included
// Memory: registers
#include "row_terms.h"

#include "fused_shape.h"
#include "launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128, kRows = 64;
static_assert(kRows == FusedShape<64>::kMove && kRows == FusedShape<128>::kMove);
constexpr int kTurnsPerRows = FusedShape<64>::kWarps;

}  // namespace

template <class Element>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS(kThreads, 1)
    attention_bwd_rows_kernel(ATTNFAST_PARAMS BackwardArguments a) {
  if (!has_code<Element>()) return;
  const BackwardParams& p = a.p;
  const int64_t blocks = a.padded / kRows, bh = block_index() / blocks;
  const int first = static_cast<int>(block_index() % blocks) * kRows;
  const Head head(p, a.rows_q, a.rows_k, bh / p.H, bh % p.H);
  if (a.turns && thread_index() < kTurnsPerRows) {
    if (block_index() == 0) store_global(a.turns, 0);
    store_global(a.turns + 1 + block_index() * kTurnsPerRows + thread_index(), 0);
  }
  const int lane = thread_index() % kLanesPerRow;
  for (int r = thread_index() / kLanesPerRow; r < kRows; r += kThreads / kLanesPerRow) {
    const int t = first + r;
    const RowTerms terms = row_terms<Element>(a, head, t, lane);
    if (lane > 0) continue;
    const TermPlanes to(a, head.b, head.h);
    store_global(to.m + t, terms.m);
    store_global(to.m + to.plane + t, terms.log2_l);
    store_global(to.row_term(t), terms.row_term);
    if (to.planes > 3) store_global(to.m + 3 * to.plane + t, terms.dentropy);
  }
}

int64_t padded_rows(int64_t T) { return (T + kRows - 1) / kRows * kRows; }

void run_attention_bwd_rows(const BackwardArguments& a, Stream stream) {
  const bool half = a.p.q.dtype == DType::kFloat16;
  launch<BackwardArguments>(
      half ? "attention_bwd_rows<fp16>" : "attention_bwd_rows<bf16>",
      half ? attention_bwd_rows_kernel<Float16> : attention_bwd_rows_kernel<BFloat16>,
      a.p.B * a.p.H * (a.padded / kRows), kThreads, 0, stream, a);
}

}  // namespace attnfast::cuda
