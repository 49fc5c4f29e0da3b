// The sinks' gradient, the other half of attention_bias.cu.
//   dsink = sum over b, t of p_sink (row_term - dH (sink - m))
// Grid:   (head)
// Memory: registers; one number per warp in shared memory
#include "launch.h"
#include "row_terms.h"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128;

}  // namespace

ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS(kThreads, 1)
    attention_bwd_sinks_kernel(ATTNFAST_PARAMS BackwardArguments a) {
  const BackwardParams& p = a.p;

  // Setup
  const int64_t h = block_index();
  const float sink = load_global(p.sinks + h) * a.units.natural;

  // Probabilities, ds: of the sink, row by row
  float sum = 0.0f;
  for (int64_t b = 0; b < p.B; ++b) {
    const TermPlanes rows(a, b, h);
    for (int64_t t = thread_index(); t < a.padded; t += kThreads) {
      const RowTerms of = rows.load(t);
      const float depth = depth_of(sink, of.m, a.units);
      const float p_sink = exp2_fast(fmaf(depth, a.units.to_log2, -of.log2_l));
      if (p_sink != 0.0f) sum += p_sink * (of.row_term - of.dentropy * depth);
    }
  }

  // Store
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

void run_attention_bwd_sinks(const BackwardArguments& a, Stream stream) {
  launch<BackwardArguments>("attention_bwd_sinks", attention_bwd_sinks_kernel, a.p.H, kThreads,
                            kThreads / kWarpSize * 4, stream, a);
}

}  // namespace attnfast::cuda
