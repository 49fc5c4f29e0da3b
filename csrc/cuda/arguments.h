// What the kernels are launched with: the call's parameters, and what follows from them.
#pragma once
#include "kernels.h"

namespace attnfast::cuda {

struct ForwardArguments {
  ForwardParams p;
  DeviceSeed dropout;
  int64_t rows_q, rows_k;    // of the tensors; varlen: of all sequences
  int64_t query_blocks = 0;  // of the longest sequence
  // Whether rows begin at multiples of 16 bytes.
  bool q_aligned = false, k_aligned = false, v_aligned = false, out_aligned = false;
};

// Launches the kernel of the head dims up to kHeadDim. Plain calls have no option but positions,
// rows that are aligned, and a positive scale.
template <int kHeadDim>
void run_attention_fwd(const ForwardArguments& a, bool plain, Stream stream);

template <>
void run_attention_fwd<32>(const ForwardArguments&, bool, Stream);
template <>
void run_attention_fwd<64>(const ForwardArguments&, bool, Stream);
template <>
void run_attention_fwd<96>(const ForwardArguments&, bool, Stream);
template <>
void run_attention_fwd<128>(const ForwardArguments&, bool, Stream);
template <>
void run_attention_fwd<192>(const ForwardArguments&, bool, Stream);
template <>
void run_attention_fwd<256>(const ForwardArguments&, bool, Stream);

}  // namespace attnfast::cuda
