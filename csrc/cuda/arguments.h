// What the kernels are launched with: the call's parameters, and what follows from them.
#pragma once
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "prims/prims.h"
#include "splits.h"

namespace attnfast::cuda {

// Whether scores are raw products: by the problem alone, since the passes share a maximum.
template <class Params>
bool has_raw_scores(const Params& p) {
  return !p.bias.data && !p.alibi_slopes && !p.sinks && !(p.softcap > 0.0f) && p.scale > 0.0f &&
         p.scale < 0x1p100f;
}

// The units in which kernels have scores. Where nothing comes between the products q k^T and the
// softmax but a positive factor, they are the products. Elsewhere they are natural scores / 2^28:
// no scale, softcap, sink, slope or finite bias overflows.
struct Scaling : Units {
  float softcap = 0.0f, uncap = 0.0f;  // in units, and 1 / softcap; 0: none
  float deepest;                       // so far below another score, a score has a probability of 0

  template <class Params>
  explicit Scaling(const Params& p) {
    const bool raw = has_raw_scores(p);
    choose(raw ? 1.0f : 0x1p-28f);
    factor = p.scale * natural;
    if (raw) keep_products();
    deepest = -1024.0f / to_log2;
    if (p.softcap > 0.0f) {
      softcap = p.softcap * natural;
      uncap = std::min(1.0f / softcap, kLargest);
    }
  }
};

// Dropout as kernels take it: where the seed lies, and what is made of the probability, in fp64, here.
struct Dropout {
  DeviceSeed from;
  float keep_scale;    // 1 / (1 - dropout_p), what probabilities that stay are multiplied with
  uint32_t threshold;  // of 65536, draws below it are dropped; 0: none

  Dropout(const AttentionParams& p, const DeviceSeed& seed)
      : from(seed),
        keep_scale(p.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - p.dropout_p)) : 0.0f),
        threshold(static_cast<uint32_t>(std::rint(p.dropout_p * 65536.0))) {}
};

struct ForwardArguments {
  ForwardParams p;
  Scaling units;
  Dropout dropout;
  int64_t rows_q, rows_k;    // of the tensors; varlen: of all sequences
  int64_t query_blocks = 0;  // of the longest sequence
  // Whether rows begin at multiples of 16 bytes.
  bool q_aligned = false, k_aligned = false, v_aligned = false, out_aligned = false;
};

// Up to so many queries, and keys, attention_bwd_short.h has a plain backward.
constexpr int kShort = 128;

// The bias's own sizes: 1 where it broadcasts.
struct BiasSizes {
  int64_t B = 1, H = 1, T = 1, S = 1;
};

struct BackwardArguments {
  BackwardParams p;
  Scaling units;
  Dropout dropout;
  int64_t rows_q, rows_k;
  BiasSizes bias;
  float* terms;    // [4][B * H][padded]: what row_terms.cu makes of each query
  int64_t padded;  // T, rounded up
  // attention_bwd_fused.h's, else null: dq's sums so far, and whose turn it is to add.
  float* sums = nullptr;
  int32_t* turns = nullptr;
  int64_t blocks = 0;  // of the longest sequence's keys, or queries
  bool q_aligned = false, k_aligned = false, v_aligned = false;
  bool out_aligned = false, grad_out_aligned = false;
  bool dq_aligned = false, dk_aligned = false, dv_aligned = false;
};

struct DecodeArguments {
  DecodeParams p;
  Scaling units;
  int64_t splits;      // of the keys of the longest sequence there can be
  int64_t row_blocks;  // of the queries that share a key head
  float* partial;      // [splits][B * H * T][D_v]: sums of exp(s - m) v over a split's keys
  Floats2* softmax;    // [splits][B * H * T]: m, and l = the sum of exp(s - m)
  bool q_aligned = false, k_aligned = false, v_aligned = false;
};

struct PooledArguments {
  PooledParams p;
  Scaling units;
  int64_t rows_q, rows_k;
  int64_t row_cells = 1, column_cells = 1;  // of a block
  bool q_aligned = false, k_aligned = false;
};

// What a kernel serves. Plain calls have no option but positions, rows that are aligned, and a
// positive scale; masked ones also masks, biases, sinks and any scale. The last two have a block
// mask, beside what plain calls have and beside options.
enum class Form { kPlain, kMasked, kOptions, kBlocks, kPlainBlocks };
constexpr const char* kForms[] = {"plain", "masked", "options", "blocks", "plain blocks"};
template <Form kForm>
constexpr bool kHasOptions = kForm == Form::kOptions || kForm == Form::kBlocks;
template <Form kForm>
constexpr bool kHasBlocks = kForm == Form::kBlocks || kForm == Form::kPlainBlocks;
template <Form kForm>
constexpr bool kIsPlain = kForm == Form::kPlain || kForm == Form::kPlainBlocks;

// Launches the kernels of the head dims up to kHeadDim.
template <int kHeadDim>
void run_attention_fwd(const ForwardArguments& a, Form form, Stream stream);
template <int kHeadDim>
void run_attention_bwd(const BackwardArguments& a, Form form, Stream stream);
// The weights and what keys receive, where wanted, after the forward.
template <int kHeadDim>
void run_attention_weights(const ForwardArguments& a, Stream stream);
// Their probabilities in cells, or by distance.
template <int kHeadDim>
void run_attention_pooled(const PooledArguments& a, Stream stream);
// The bias's gradient, as a part of the backward.
template <int kHeadDim>
void run_attention_bias(const BackwardArguments& a, Stream stream);

template <int kHeadDim>
void run_attention_decode(const DecodeArguments& a, Stream stream);
// What keys receive, after it.
template <int kHeadDim>
void run_attention_decode_received(const DecodeArguments& a, Stream stream);
void run_decode_combine(const DecodeArguments& a, Stream stream);

int64_t padded_rows(int64_t T);
void run_attention_bwd_rows(const BackwardArguments& a, Stream stream);
void run_attention_bwd_sinks(const BackwardArguments& a, Stream stream);

// The head dims that there are, each compiled by itself; csrc/build.py reads them here.
#define ATTNFAST_HEAD_DIMS(X) X(32) X(64) X(96) X(128) X(192) X(256)
#define ATTNFAST_DECLARE(kHeadDim)                                          \
  template <>                                                               \
  void run_attention_fwd<kHeadDim>(const ForwardArguments&, Form, Stream);  \
  template <>                                                               \
  void run_attention_bwd<kHeadDim>(const BackwardArguments&, Form, Stream); \
  template <>                                                               \
  void run_attention_weights<kHeadDim>(const ForwardArguments&, Stream);    \
  template <>                                                               \
  void run_attention_pooled<kHeadDim>(const PooledArguments&, Stream);      \
  template <>                                                               \
  void run_attention_bias<kHeadDim>(const BackwardArguments&, Stream);      \
  template <>                                                               \
  void run_attention_decode<kHeadDim>(const DecodeArguments&, Stream);      \
  template <>                                                               \
  void run_attention_decode_received<kHeadDim>(const DecodeArguments&, Stream);
ATTNFAST_HEAD_DIMS(ATTNFAST_DECLARE)
#undef ATTNFAST_DECLARE

}  // namespace attnfast::cuda
