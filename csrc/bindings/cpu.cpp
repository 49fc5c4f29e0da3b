// torch.ops.attnfast.cpu_*: tensors in, parameter structs out, through torch's stable ABI (2.10 and
// later).
//
// The schemas are defined in attnfast/ops.py, which also checks shapes and dtypes; what is checked
// here are the values inside tensors that index memory.
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/arena.h"
#include "../cpu/kernels.h"
#include "results.h"
#include "signals.h"

namespace {

using namespace attnfast::bindings;
using attnfast::AttentionParams;
using attnfast::BackwardParams;
using attnfast::DecodeParams;
using attnfast::DType;
using attnfast::Footprint;
using attnfast::ForwardParams;
using attnfast::MutableView;
using attnfast::PooledParams;
using attnfast::ScoreOptions;
using attnfast::View;
using attnfast::Weights;

// The process's own memory, which nobody has to be told of.
struct HostCall {
  template <class AnyTensor>
  void reads(const AnyTensor&, const char*) {}
  void writes(const Tensor&, const char*) {}
};

// The sequences' boundaries, checked so that no index can leave the tensor; returns the longest
// sequence.
int64_t check_cu_seqlens(const int32_t* cu, int64_t sequences, int64_t total, int64_t max_seqlen,
                         const std::string& side) {
  const std::string name = "attention: cu_seqlens_" + side;
  STD_TORCH_CHECK(cu[0] == 0, name, " must start with 0, got ", cu[0]);
  int64_t longest = 0;
  for (int64_t i = 1; i <= sequences; ++i) {
    STD_TORCH_CHECK(cu[i] >= cu[i - 1], name, " must not decrease, got ", cu[i], " after ",
                    cu[i - 1], " at index ", i);
    longest = std::max<int64_t>(longest, cu[i] - cu[i - 1]);
  }
  STD_TORCH_CHECK(cu[sequences] <= total, name, " must end within the ", total, " rows of ", side,
                  ", got ", cu[sequences]);
  STD_TORCH_CHECK(longest <= max_seqlen, "attention: max_seqlen_", side,
                  " must be at least the longest sequence (", longest, "), got ", max_seqlen);
  return longest;
}

// How many threads a call of so many pairs of a query and a key has, and whether it asks for
// signals.
template <class Params>
void share_out(Params* p, double pairs) {
  constexpr double kWorthSharing = 1 << 17;  // multiply-adds
  const double work = pairs * static_cast<double>(p->H) * static_cast<double>(p->D + p->D_v);
  if (work < kWorthSharing) return;
  p->num_threads = static_cast<int>(torch::stable::get_num_threads());
  p->interrupted = interrupts_of(work);
}

double pairs_of(const AttentionParams& p) {
  if (!p.cu_seqlens_q) return static_cast<double>(p.B) * p.T * (p.has_lists() ? p.K : p.S);
  double pairs = 0.0;
  for (int64_t b = 0; b < p.B; ++b) {
    pairs += static_cast<double>(p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]) *
             (p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
  }
  return pairs;
}

// Runs a kernel, whose scratch may be more than there is.
template <class Params>
void run(void (*kernel)(const Params&), const Params& p, const char* whose) {
  try {
    kernel(p);
  } catch (const attnfast::cpu::OutOfMemory& error) {
    const int64_t sizes[] = {p.B, p.H, p.T, p.S, p.D};
    throw NoMemory((std::string(whose) + " scratch: " + mebibytes(error.bytes) +
                    " for (B, H, T, S, D) = " + in_parentheses(sizes, 5))
                       .c_str());
  }
}

// Every key of a list is one of the S, or -1.
void check_indices(const AttentionParams& p) {
  const int64_t rows = p.B * p.index_heads * p.T;
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t* list = p.indices + row * p.K;
    uint32_t most = 0;  // -1 becomes 0, and what is below it large
    for (int64_t j = 0; j < p.K; ++j) most = std::max(most, static_cast<uint32_t>(list[j]) + 1);
    if (most <= p.S) continue;
    const auto is_outside = [&](int32_t key) { return key < -1 || key >= p.S; };
    STD_TORCH_CHECK(false, "attention: indices must lie in [-1, ", p.S, "), got ",
                    *std::find_if(list, list + p.K, is_outside), " for query ", row % p.T,
                    " of batch entry ", row / p.T / p.index_heads);
  }
}

// Of each head's window. Returns the farthest that any reaches to the left, -1 if that is unbounded.
int64_t check_windows(const ScoreOptions& p, int64_t H) {
  int64_t farthest = 0;
  for (int64_t i = 0; i < 2 * H; ++i) {
    STD_TORCH_CHECK(p.windows[i] >= -1,
                    "attention: window must hold -1, for no bound, or more, got ", p.windows[i],
                    " for head ", i / 2);
  }
  for (int64_t h = 0; h < H && farthest >= 0; ++h)
    farthest = p.windows[2 * h] < 0 ? -1 : std::max<int64_t>(farthest, p.windows[2 * h]);
  return farthest;
}

void check_offset(int64_t align) {
  STD_TORCH_CHECK(align >= -kMaxOffset && align <= kMaxOffset, "attention: align must be from ",
                  -kMaxOffset, " to ", kMaxOffset, ", got ", align);
}

// A block mask's entries, so that none refers to what is not there.
void check_blocks(const attnfast::BlockMask& mask, const Tensor& starts, const Tensor& index,
                  const Tensor& bits) {
  const int64_t entries = index.size(1), heads = starts.size(0) * starts.size(1);
  const int64_t lines[2] = {mask.column_starts, starts.size(2) - mask.column_starts};
  for (int64_t head = 0; head < heads; ++head) {
    const int32_t* from = mask.starts + head * starts.size(2);
    for (int side = 0; side < 2; from += lines[side++]) {
      for (int64_t i = 0; i < lines[side]; ++i) {
        STD_TORCH_CHECK(from[i] >= (i ? from[i - 1] : 0) && from[i] <= entries,
                        "attention: block_starts must ascend to at most ", entries, ", got ",
                        from[i]);
      }
    }
  }
  const int32_t* numbers[2] = {mask.keys, mask.queries};
  const int32_t* slots[2] = {mask.slots, mask.column_slots};
  for (int side = 0; side < 2; ++side) {
    for (int64_t i = 0; i < entries; ++i) {
      STD_TORCH_CHECK(numbers[side][i] >= 0 && numbers[side][i] < lines[1 - side] / 2 &&
                          slots[side][i] < bits.size(0),
                      "attention: block_index must hold blocks below ", lines[1 - side] / 2,
                      " and their bits below ", bits.size(0), ", got ", numbers[side][i], " and ",
                      slots[side][i]);
    }
  }
}

void fill_seed(AttentionParams* p, const OptionalTensor& dropout_seed) {
  if (!dropout_seed) return;
  const auto* seed = data_of<int64_t>(*dropout_seed, "dropout_seed");
  p->dropout_seed = static_cast<uint64_t>(seed[0]);
  const int64_t stride = dropout_seed->stride(0);
  p->dropout_offset = static_cast<uint64_t>(seed[stride]);
  p->dropout_heads = p->H;
  if (dropout_seed->numel() == 6) {
    p->dropout_heads = seed[2 * stride], p->dropout_head = seed[3 * stride];
    p->dropout_query = seed[4 * stride], p->dropout_key = seed[5 * stride];
  }
}

// A problem, and the values inside tensors: those that index memory are checked, T and S become
// the longest sequences.
void fill(AttentionParams* p, Kept<HostCall>* kept, ATTNFAST_INPUTS) {
  fill_params(p, kept, true, ATTNFAST_INPUT_NAMES);
  if (p->cu_seqlens_q) {
    p->T = check_cu_seqlens(p->cu_seqlens_q, p->B, q.size(2), max_seqlen_q, "q");
    p->S = check_cu_seqlens(p->cu_seqlens_k, p->B, k.size(2), max_seqlen_k, "k");
  }
  if (p->blocks.starts) check_blocks(p->blocks, *block_starts, *block_index, *block_bits);
  check_indices(*p);
  if (p->windows) check_windows(*p, p->H);
  check_offset(align_offset);
  for (int64_t b = 0; p->align_per_batch && b < p->B; ++b) check_offset(p->align_per_batch[b]);
  fill_seed(p, dropout_seed);
  share_out(p, pairs_of(*p));
}

// Rows of a varlen result that belong to no sequence.
bool has_slack(const AttentionParams& p, int64_t rows_q, int64_t rows_k) {
  return p.cu_seqlens_q && (p.cu_seqlens_q[p.B] < rows_q || p.cu_seqlens_k[p.B] < rows_k);
}

// Whether the call is one query per sequence that attends all keys: what the decoding kernel does,
// which is split over keys, where the forward fills vectors with queries.
bool is_a_step(const ForwardParams& p) {
  const int64_t position = p.align_offset + (p.align_bottom_right ? p.S - 1 : 0);
  return p.T == 1 && !p.cu_seqlens_q && !p.align_per_batch && !p.mask.data && !p.blocks.starts &&
         !p.has_lists() && p.dropout_p == 0.0 && !p.max_logit && p.weights_mode == Weights::kNone &&
         !p.windows && p.window_left < 0 && p.window_right < 0 &&
         (!p.causal || position >= p.S - 1) && (!p.alibi_slopes || position == p.S - 1);
}

void run_step(const ForwardParams& p) {
  const std::vector<int32_t> lengths(p.B, static_cast<int32_t>(p.S));
  DecodeParams step;
  step.B = p.B, step.H = p.H, step.H_kv = p.H_kv, step.T = p.T, step.S = p.S;
  step.D = p.D, step.D_v = p.D_v;
  step.q = p.q, step.k = p.k, step.v = p.v, step.bias = p.bias;
  step.cache_seqlens = lengths.data();
  static_cast<ScoreOptions&>(step) = p;
  step.out = p.out, step.lse = p.lse, step.norm = p.norm;
  step.num_threads = p.num_threads, step.interrupted = p.interrupted;
  step.footprint = p.footprint;
  run(attnfast::cpu::kernels().attention_decode, step, "attention: no memory for the forward's");
}

void run_forward(const ForwardParams& p) {
  if (is_a_step(p)) {
    run_step(p);
  } else {
    run(attnfast::cpu::kernels().attention_fwd, p, "attention: no memory for the forward's");
  }
}

ForwardTensors cpu_fwd(ATTNFAST_INPUTS) {
  ForwardParams p;
  HostCall call;
  Kept kept(&call);
  fill(&p, &kept, ATTNFAST_INPUT_NAMES);
  const bool slack = has_slack(p, q.size(2), k.size(2));
  ForwardTensors results = forward_results(&p, &call, slack, ATTNFAST_INPUT_NAMES);
  run_forward(p);
  return results;
}

// A layer's self-attention, whose q, k and v lie in its packed projection.
#define ATTNFAST_LAYER                                                                             \
  const Tensor &packed, int64_t heads, bool batch_first, OptionalTensor mask, OptionalTensor bias, \
      bool causal, double dropout_p, OptionalTensor dropout_seed
#define ATTNFAST_LAYER_NAMES packed, heads, batch_first, mask, bias, causal, dropout_p, dropout_seed

// One of `parts` (B, H, T, D) that lie side by side in the rows of x, (B, T, parts, H, D), or
// (T, B, parts, H, D) unless batch_first.
template <class AnyView, class Pointer>
AnyView heads_of(const Tensor& x, Pointer* data, const AttentionParams& p, bool batch_first,
                 int64_t part = 0) {
  const DType type = dtype_of(x);
  const int64_t bytes = part * p.H * p.D * (type == DType::kFloat32 ? 4 : 2);
  return AnyView{data ? data + bytes : nullptr,
                 x.stride(batch_first ? 0 : 1),
                 p.D,
                 x.stride(batch_first ? 1 : 0),
                 1,
                 type};
}

void fill(AttentionParams* p, ATTNFAST_LAYER) {
  STD_TORCH_CHECK(
      packed.dim() == 3 && heads > 0 && packed.size(2) % (3 * heads) == 0 && packed.is_contiguous(),
      "attention: packed must be contiguous, with 3 * heads * D features");
  p->B = packed.size(batch_first ? 0 : 1), p->T = p->S = packed.size(batch_first ? 1 : 0);
  p->H = p->H_kv = heads, p->D = p->D_v = packed.size(2) / 3 / heads;
  const auto* data = data_of<char>(packed, "packed");
  p->q = heads_of<View>(packed, data, *p, batch_first, 0);
  p->k = heads_of<View>(packed, data, *p, batch_first, 1);
  p->v = heads_of<View>(packed, data, *p, batch_first, 2);
  const std::array<int64_t, 4> scores{p->B, p->H, p->T, p->S};
  p->mask = read_scores(mask, "mask", scores), p->bias = read_scores(bias, "bias", scores);
  p->scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p->D))), p->causal = causal;
  p->dropout_p = dropout_p;
  check_count(dropout_seed, "dropout_seed", 2);
  fill_seed(p, dropout_seed);
  share_out(p, pairs_of(*p));
}

// Merged heads, (B, T, H, D) or (T, B, H, D), norm and lse (3, B, H, T), and weights: cpu_fwd without
// ten views.
std::tuple<Tensor, Tensor, Tensor> cpu_self_attention(ATTNFAST_LAYER, int64_t weights) {
  ForwardParams p;
  fill(&p, ATTNFAST_LAYER_NAMES);
  const auto type = packed.scalar_type();
  Tensor out = empty(packed, type, {packed.size(0), packed.size(1), p.H * p.D});
  const Tensor norm = empty(packed, ScalarType::Float, {3, p.B, p.H, p.T});
  Tensor probabilities = weights == 0   ? nothing(packed)
                         : weights == 1 ? empty(packed, type, {p.B, p.T, p.S})
                                        : empty(packed, type, {p.B, p.H, p.T, p.S});
  p.out = heads_of<MutableView>(out, static_cast<char*>(out.mutable_data_ptr()), p, batch_first);
  p.norm = floats(norm), p.norm_plane = p.B * p.H * p.T;
  p.lse = p.norm + 2 * p.norm_plane, p.lse_stride_b = p.H * p.T, p.lse_stride_h = p.T;
  p.weights_mode = static_cast<Weights>(weights);
  if (weights)
    p.weights = weights_view<MutableView>(probabilities, probabilities.mutable_data_ptr());
  run_forward(p);
  return {out, norm, probabilities};
}

// The gradient of packed: cpu_bwd, whose dq, dk and dv lie in one tensor.
Tensor cpu_self_attention_bwd(const Tensor& grad_out, const Tensor& out, const Tensor& norm,
                              ATTNFAST_LAYER) {
  BackwardParams p;
  fill(&p, ATTNFAST_LAYER_NAMES);
  const auto is_merged = [&](const Tensor& x) {
    return x.dim() == 3 && x.scalar_type() == packed.scalar_type() && x.size(0) == packed.size(0) &&
           x.size(1) == packed.size(1) && x.size(2) == p.H * p.D &&
           (x.size(2) <= 1 || x.stride(2) == 1);
  };
  STD_TORCH_CHECK(is_merged(grad_out) && is_merged(out),
                  "attention: grad_out and out must be merged heads of packed, with last stride 1");
  STD_TORCH_CHECK(norm.scalar_type() == ScalarType::Float && norm.is_contiguous() &&
                      norm.numel() == 3 * p.B * p.H * p.T,
                  "attention: norm must be what the forward returned");
  Tensor gradient =
      empty(packed, packed.scalar_type(), {packed.size(0), packed.size(1), packed.size(2)});
  p.out = heads_of<View>(out, data_of<char>(out, "out"), p, batch_first);
  p.grad_out = heads_of<View>(grad_out, data_of<char>(grad_out, "grad_out"), p, batch_first);
  p.norm = data_of<float>(norm, "norm"), p.norm_plane = p.B * p.H * p.T;
  p.lse_stride_b = p.H * p.T, p.lse_stride_h = p.T;
  auto* data = static_cast<char*>(gradient.mutable_data_ptr());
  p.dq = heads_of<MutableView>(gradient, data, p, batch_first, 0);
  p.dk = heads_of<MutableView>(gradient, data, p, batch_first, 1);
  p.dv = heads_of<MutableView>(gradient, data, p, batch_first, 2);
  run(attnfast::cpu::kernels().attention_bwd, p, "attention: no memory for the backward's");
  return gradient;
}

BackwardTensors cpu_bwd(ATTNFAST_UPSTREAM, ATTNFAST_INPUTS) {
  BackwardParams p;
  HostCall call;
  Kept kept(&call);
  fill(&p, &kept, ATTNFAST_INPUT_NAMES);
  const bool is_lse = norm.dim() == 3;  // all that torch's own operators keep
  STD_TORCH_CHECK(is_lse || (norm.dim() == 4 && (norm.size(0) == 2 || norm.size(0) == 3)),
                  "attention: norm must be what the forward returned");
  const bool slack = has_slack(p, q.size(2), k.size(2));
  BackwardTensors results =
      backward_results(&p, &kept, slack, ATTNFAST_UPSTREAM_NAMES, ATTNFAST_INPUT_NAMES);
  run(attnfast::cpu::kernels().attention_bwd, p, "attention: no memory for the backward's");
  if (need_dsinks) std::get<4>(results) = converted(std::get<4>(results), sinks->scalar_type());
  return results;
}

Tensor cpu_pooled(ATTNFAST_INPUTS, ATTNFAST_POOLING) {
  PooledParams p;
  HostCall call;
  Kept kept(&call);
  fill(&p, &kept, ATTNFAST_INPUT_NAMES);
  Tensor result = pooled_result(&p, &kept, ATTNFAST_POOLING_NAMES, ATTNFAST_INPUT_NAMES);
  run(attnfast::cpu::kernels().attention_pooled, p, "attention: no memory for the pooling's");
  return result;
}

// The most scratch that a call's forward and backward hold, in bytes: what their kernels say.
std::tuple<int64_t, int64_t> cpu_workspace(ATTNFAST_INPUTS, bool need_dbias) {
  ForwardParams forward;
  BackwardParams backward;
  HostCall call;
  Kept kept(&call);
  fill(&forward, &kept, ATTNFAST_INPUT_NAMES);
  static_cast<AttentionParams&>(backward) = forward;
  Footprint of_forward, of_backward;
  float wanted;  // stands for results, which are not written
  forward.footprint = &of_forward, backward.footprint = &of_backward;
  forward.weights_mode = backward.weights_mode = static_cast<Weights>(weights);
  if (stats) forward.max_logit = &wanted;
  if (stats == 2) forward.received = &wanted;
  run_forward(forward);
  backward.lse_stride_b = forward.H * q.size(2), backward.lse_stride_h = q.size(2);
  backward.norm_plane = q.size(0) * backward.lse_stride_b;
  if (need_dbias) {
    const auto stride = [&](int64_t d) { return bias->size(d) > 1; };
    backward.dbias = MutableView{&wanted, stride(0), stride(1), stride(2), stride(3)};
  }
  run(attnfast::cpu::kernels().attention_bwd, backward, "");
  return {of_forward.most, of_backward.most};
}

// Lengths and pages, checked so that no index can leave the cache.
void check_cache(const DecodeParams& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t length = p.cache_seqlens[b];
    STD_TORCH_CHECK(length >= 0 && length <= p.S,
                    "decode_attention: cache_seqlens must lie in [0, ", p.S,
                    "], the capacity of the cache, got ", length, " at index ", b);
    const int64_t pages = p.page_size ? (length + p.page_size - 1) / p.page_size : 0;
    for (int64_t i = 0; i < pages; ++i) {
      const int32_t page = p.page_table[b * p.pages_per_sequence + i];
      STD_TORCH_CHECK(page >= 0 && page < p.num_pages,
                      "decode_attention: page_table must hold pages in [0, ", p.num_pages,
                      "), got ", page, " at (", b, ", ", i, ")");
    }
  }
}

void fill(DecodeParams* p, Kept<HostCall>* kept, ATTNFAST_DECODE_INPUTS) {
  fill_decode(p, kept, ATTNFAST_DECODE_INPUT_NAMES);
  check_cache(*p);
  if (p->windows) p->window_left = check_windows(*p, p->H);
  double pairs = 0.0;
  for (int64_t b = 0; b < p->B; ++b) pairs += static_cast<double>(p->cache_seqlens[b]) * p->T;
  share_out(p, pairs);
}

DecodeTensors cpu_decode(ATTNFAST_DECODE_INPUTS) {
  DecodeParams p;
  HostCall call;
  Kept kept(&call);
  fill(&p, &kept, ATTNFAST_DECODE_INPUT_NAMES);
  DecodeTensors results = decode_results(&p, &call, q, received);
  run(attnfast::cpu::kernels().attention_decode, p,
      "decode_attention: no memory for the decoding's");
  return results;
}

int64_t cpu_decode_workspace(ATTNFAST_DECODE_INPUTS) {
  DecodeParams p;
  HostCall call;
  Kept kept(&call);
  fill(&p, &kept, ATTNFAST_DECODE_INPUT_NAMES);
  Footprint footprint;
  float wanted;  // stands for a result, which is not written
  p.footprint = &footprint;
  if (received) p.received = &wanted;
  run(attnfast::cpu::kernels().attention_decode, p, "");
  return footprint.most;
}

std::string cpu_isa() { return attnfast::cpu::kernels().name; }
std::string cpu_isas() { return attnfast::cpu::runnable_isas(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ATTNFAST_OPERATORS, CPU, m) {
  m.impl("cpu_fwd", ATTNFAST_BOX(cpu_fwd));
  m.impl("cpu_bwd", ATTNFAST_BOX(cpu_bwd));
  m.impl("cpu_decode", ATTNFAST_BOX(cpu_decode));
  m.impl("cpu_pooled", ATTNFAST_BOX(cpu_pooled));
  m.impl("cpu_self_attention", ATTNFAST_BOX(cpu_self_attention));
  m.impl("cpu_self_attention_bwd", ATTNFAST_BOX(cpu_self_attention_bwd));
  m.impl("cpu_workspace", ATTNFAST_BOX(cpu_workspace));
  m.impl("cpu_decode_workspace", ATTNFAST_BOX(cpu_decode_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFAST_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", ATTNFAST_BOX(cpu_isa));
  m.impl("cpu_isas", ATTNFAST_BOX(cpu_isas));
}
