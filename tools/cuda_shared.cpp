// Prints what the CUDA kernels are launched with: name, threads and bytes of shared memory of every
// tile shape, a line each; cuda_resources.py runs it. Nothing is launched.
#include <cstdio>
#include <string>

#include "cuda/attention_bwd_keys.h"
#include "cuda/attention_bwd_queries.h"
#include "cuda/attention_bwd_short.h"
#include "cuda/attention_fwd.h"
#include "cuda/decode_shape.h"
#include "cuda/fused_shape.h"
#include "cuda/probabilities.h"

namespace attnfast::cuda {

template <class Shape>
void say(const std::string& name, int head_dim, const char* form = "") {
  std::printf("%s<%d%s> %d %d\n", name.c_str(), head_dim, form, Shape::kThreads,
              Shape::kSharedBytes);
}

template <int kD, Form kForm, bool kSmall>
void say_backward(const char* form) {
  using Keys = BackwardShape<kD, kForm, true, kSmall>;
  say<BackwardShape<kD, kForm, false, kSmall>>("attention_bwd_queries", kD, form);
  for (const char* part : {"", ", dk", ", dv"}) {
    say<Keys>("attention_bwd_keys", kD, (std::string(form) + part).c_str());
  }
}

template <int kD>
void say_all() {
  say<ForwardShape<kD, Form::kPlain>>("attention_fwd", kD, ", plain");
  say<ForwardShape<kD, Form::kMasked>>("attention_fwd", kD, ", masked");
  say<ForwardShape<kD, Form::kOptions>>("attention_fwd", kD, ", options");
  say<ForwardShape<kD, Form::kBlocks>>("attention_fwd", kD, ", blocks");
  say<ForwardShape<kD, Form::kPlainBlocks>>("attention_fwd", kD, ", plain blocks");
  for (const char* name : {"attention_weights", "attention_received", "attention_weight_rows"}) {
    say<ProbabilityShape<kD>>(name, kD);
  }
  say<CellShape<kD>>("attention_cells", kD);
  say<DistanceShape<kD>>("attention_distances", kD);
  say_backward<kD, Form::kPlain, false>(", plain");
  say_backward<kD, Form::kOptions, false>(", options");
  say_backward<kD, Form::kBlocks, false>(", blocks");
  say_backward<kD, Form::kPlainBlocks, false>(", plain blocks");
  if constexpr (kD <= 128) {
    say_backward<kD, Form::kPlain, true>(", plain, small");
    say_backward<kD, Form::kOptions, true>(", options, small");
    say_backward<kD, Form::kBlocks, true>(", blocks, small");
    say_backward<kD, Form::kPlainBlocks, true>(", plain blocks, small");
  }
  say<BiasShape<kD>>("attention_bwd_bias", kD);
  if constexpr (kD <= 128) say<ShortShape<kD>>("attention_bwd_short", kD);
  if constexpr (kD == 64 || kD == 128) say<FusedShape<kD>>("attention_bwd_fused", kD);
  for (const char* name : {"attention_decode", "attention_decode_received"}) {
    say<DecodeShape<kD, false>>(name, kD);
    say<DecodeShape<kD, true>>(name, kD, ", small");
  }
}

}  // namespace attnfast::cuda

int main() {
#define ATTNFAST_SAY(kHeadDim) attnfast::cuda::say_all<kHeadDim>();
  ATTNFAST_HEAD_DIMS(ATTNFAST_SAY)
}
