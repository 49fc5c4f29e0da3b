// torch.ops.attnfast.cpu_*: tensors in, parameter structs out, through torch's stable ABI (2.10 and
// later).
//
// The schemas are defined in attnfast/ops.py, which also checks shapes and dtypes; what is checked
// here are the values inside tensors that index memory.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/arena.h"
#include "../cpu/kernels.h"
#include "signals.h"
#include "tensors.h"

namespace {

using namespace attnfast::bindings;
using attnfast::BackwardParams;
using attnfast::DecodeParams;
using attnfast::DType;
using attnfast::ForwardParams;
using attnfast::MutableView;
using attnfast::Problem;
using attnfast::View;
using attnfast::Weights;

double element(ScalarType type, const void* data, int64_t offset) {
  switch (type) {
    case ScalarType::Double:
      return static_cast<const double*>(data)[offset];
    case ScalarType::BFloat16:
      return static_cast<float>(static_cast<const c10::BFloat16*>(data)[offset]);
    case ScalarType::Half:
      return static_cast<float>(static_cast<const c10::Half*>(data)[offset]);
    default:
      return static_cast<const float*>(data)[offset];
  }
}

void set_element(const Tensor& x, int64_t offset, float value) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      static_cast<double*>(x.mutable_data_ptr())[offset] = value;
      return;
    case ScalarType::BFloat16:
      static_cast<c10::BFloat16*>(x.mutable_data_ptr())[offset] = value;
      return;
    case ScalarType::Half:
      static_cast<c10::Half*>(x.mutable_data_ptr())[offset] = value;
      return;
    default:
      static_cast<float*>(x.mutable_data_ptr())[offset] = value;
  }
}

// Small tensors (slopes, sinks, lengths) as plain arrays that live as long as the call.
struct SmallTensors {
  std::vector<float> slopes, sinks;
  std::vector<int32_t> align, cu_seqlens_q, cu_seqlens_k, cache_seqlens, page_table;
};

std::vector<float> floats_of(const Tensor& x, const char* name) {  // 1-D or 2-D
  std::vector<float> out;
  const void* data = data_of(x, name);
  const int64_t rows = x.dim() == 2 ? x.size(0) : 1, columns = x.size(x.dim() - 1);
  out.reserve(rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t offset = (x.dim() == 2 ? i * x.stride(0) : 0) + j * x.stride(x.dim() - 1);
      out.push_back(static_cast<float>(element(x.scalar_type(), data, offset)));
    }
  }
  return out;
}

std::vector<int32_t> ints_of(const Tensor& x, const char* name) {  // 1-D or 2-D
  const bool is_long = x.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_long || x.scalar_type() == ScalarType::Int, "attention: ", name,
                  " must be int32 or int64");
  std::vector<int32_t> out;
  const void* data = data_of(x, name);
  const int64_t rows = x.dim() == 2 ? x.size(0) : 1, columns = x.size(x.dim() - 1);
  out.reserve(rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t offset = (x.dim() == 2 ? i * x.stride(0) : 0) + j * x.stride(x.dim() - 1);
      const int64_t value = is_long ? static_cast<const int64_t*>(data)[offset]
                                    : static_cast<const int32_t*>(data)[offset];
      STD_TORCH_CHECK(value >= std::numeric_limits<int32_t>::min() &&
                          value <= std::numeric_limits<int32_t>::max(),
                      "attention: ", name, " must fit in 32 bits, got ", value);
      out.push_back(static_cast<int32_t>(value));
    }
  }
  return out;
}

// The sequences' boundaries, checked so that no index can leave the tensor; returns the longest
// sequence.
int64_t check_cu_seqlens(const std::vector<int32_t>& cu, int64_t total, int64_t max_seqlen,
                         const std::string& side) {
  const std::string name = "attention: cu_seqlens_" + side;
  STD_TORCH_CHECK(!cu.empty() && cu[0] == 0, name, " must start with 0, got ",
                  cu.empty() ? -1 : cu[0]);
  int64_t longest = 0;
  for (size_t i = 1; i < cu.size(); ++i) {
    STD_TORCH_CHECK(cu[i] >= cu[i - 1], name, " must not decrease, got ", cu[i], " after ",
                    cu[i - 1], " at index ", i);
    longest = std::max<int64_t>(longest, cu[i] - cu[i - 1]);
  }
  STD_TORCH_CHECK(cu.back() <= total, name, " must end within the ", total, " rows of ", side,
                  ", got ", cu.back());
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

double pairs_of(const Problem& p) {
  if (!p.cu_seqlens_q) return static_cast<double>(p.B) * p.T * p.S;
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

void check_offset(int64_t align) {
  STD_TORCH_CHECK(align >= -kMaxOffset && align <= kMaxOffset, "attention: align must be from ",
                  -kMaxOffset, " to ", kMaxOffset, ", got ", align);
}

void fill_problem(Problem* p, SmallTensors* small, ATTNFAST_INPUTS) {
  (void)weights, (void)stats, (void)deterministic;  // the kernels are deterministic always
  check_sizes(q, k, v, "k", "v", std::nullopt);
  p->B = q.size(0), p->H = q.size(1), p->T = q.size(2), p->D = q.size(3);
  p->H_kv = k.size(1), p->S = k.size(2), p->D_v = v.size(3);
  p->q = read(q, "q"), p->k = read(k, "k"), p->v = read(v, "v");
  if (alibi_slopes) {
    small->slopes = floats_of(*alibi_slopes, "alibi_slopes");
    p->alibi_slopes = small->slopes.data();
    p->alibi_stride_b = alibi_slopes->dim() == 2 && alibi_slopes->size(0) > 1 ? p->H : 0;
  }
  if (sinks) {
    small->sinks = floats_of(*sinks, "sinks");
    p->sinks = small->sinks.data();
  }
  if (cu_seqlens_q) {
    small->cu_seqlens_q = ints_of(*cu_seqlens_q, "cu_seqlens_q");
    small->cu_seqlens_k = ints_of(*cu_seqlens_k, "cu_seqlens_k");
    STD_TORCH_CHECK(small->cu_seqlens_q.size() == small->cu_seqlens_k.size(),
                    "attention: cu_seqlens_k must have as many entries as cu_seqlens_q (",
                    small->cu_seqlens_q.size(), "), got ", small->cu_seqlens_k.size());
    p->T = check_cu_seqlens(small->cu_seqlens_q, p->T, max_seqlen_q, "q");
    p->S = check_cu_seqlens(small->cu_seqlens_k, p->S, max_seqlen_k, "k");
    p->B = static_cast<int64_t>(small->cu_seqlens_q.size()) - 1;
    p->cu_seqlens_q = small->cu_seqlens_q.data(), p->cu_seqlens_k = small->cu_seqlens_k.data();
    p->q.b = p->k.b = p->v.b = 0;
  }
  check_counts(p->B, p->H, alibi_slopes, sinks);
  check_count(align, "align", p->B), check_count(dropout_seed, "dropout_seed", 2);
  const bool packed = p->cu_seqlens_q;  // T and S may be less than the maxima
  const std::array<int64_t, 4> scores{packed ? 1 : p->B, p->H, packed ? max_seqlen_q : p->T,
                                      packed ? max_seqlen_k : p->S};
  p->mask = read_scores(mask, "mask", scores), p->bias = read_scores(bias, "bias", scores);
  if (align) {
    small->align = ints_of(*align, "align");
    for (const int64_t by : small->align) check_offset(by);
    p->align_per_batch = small->align.data();
  }
  check_offset(align_offset);
  p->align_offset = align_offset, p->align_bottom_right = align_bottom_right;
  p->scale = static_cast<float>(scale), p->causal = causal;
  p->window_left = window_left, p->window_right = window_right;
  p->softcap = static_cast<float>(softcap);
  p->dropout_p = dropout_p;
  if (dropout_seed) {
    const auto* seed = data_of<int64_t>(*dropout_seed, "dropout_seed");
    p->dropout_seed = static_cast<uint64_t>(seed[0]);
    p->dropout_offset = static_cast<uint64_t>(seed[dropout_seed->stride(0)]);
  }
  share_out(p, pairs_of(*p));
}

// Rows of a varlen result that belong to no sequence.
bool has_slack(const Problem& p, int64_t rows_q, int64_t rows_k) {
  return p.cu_seqlens_q && (p.cu_seqlens_q[p.B] < rows_q || p.cu_seqlens_k[p.B] < rows_k);
}

// Whether the call is one query per sequence that attends all keys: what the decoding kernel does,
// which is split over keys, where the forward fills vectors with queries.
bool is_a_step(const ForwardParams& p) {
  const int64_t position = p.align_offset + (p.align_bottom_right ? p.S - 1 : 0);
  return p.T == 1 && !p.cu_seqlens_q && !p.align_per_batch && !p.mask.data && p.dropout_p == 0.0 &&
         !p.max_logit && p.weights_mode == Weights::kNone && p.window_left < 0 &&
         p.window_right < 0 && (!p.causal || position >= p.S - 1) &&
         (!p.alibi_slopes || position == p.S - 1);
}

void run_step(const ForwardParams& p) {
  const std::vector<int32_t> lengths(p.B, static_cast<int32_t>(p.S));
  DecodeParams step;
  step.B = p.B, step.H = p.H, step.H_kv = p.H_kv, step.T = p.T, step.S = p.S;
  step.D = p.D, step.D_v = p.D_v;
  step.q = p.q, step.k = p.k, step.v = p.v, step.bias = p.bias;
  step.cache_seqlens = lengths.data();
  step.alibi_slopes = p.alibi_slopes, step.alibi_stride_b = p.alibi_stride_b, step.sinks = p.sinks;
  step.scale = p.scale, step.softcap = p.softcap;
  step.out = p.out, step.lse = p.lse, step.norm = p.norm;
  step.num_threads = p.num_threads, step.interrupted = p.interrupted;
  run(attnfast::cpu::kernels().attention_decode, step, "attention: no memory for the forward's");
}

void run_forward(const ForwardParams& p) {
  if (is_a_step(p)) {
    run_step(p);
  } else {
    run(attnfast::cpu::kernels().attention_fwd, p, "attention: no memory for the forward's");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cpu_fwd(ATTNFAST_INPUTS) {
  ForwardParams p;
  SmallTensors small;
  fill_problem(&p, &small, ATTNFAST_INPUT_NAMES);
  const int64_t B = q.size(0), H = p.H, T = q.size(2), S = k.size(2);
  const int64_t rows = p.cu_seqlens_q ? max_seqlen_q : T;  // of the weights
  const int64_t columns = p.cu_seqlens_q ? max_seqlen_k : S;
  Tensor out = empty_in_order(q, p.D_v);
  Tensor lse = empty(q, ScalarType::Float, {B, H, T});
  Tensor norm = empty(q, ScalarType::Float, {2, B, H, T});
  Tensor statistics = stats ? empty(q, ScalarType::Float, {4, B, H, T}) : nothing(lse);
  Tensor received = stats == 2 ? empty(q, ScalarType::Float, {B, H, S}) : nothing(lse);
  Tensor probabilities = weights == 0   ? nothing(q)
                         : weights == 1 ? empty(q, q.scalar_type(), {p.B, rows, columns})
                                        : empty(q, q.scalar_type(), {p.B, H, rows, columns});
  if (weights && (p.T < rows || p.S < columns)) torch::stable::zero_(probabilities);
  if (has_slack(p, T, S)) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    torch::stable::zero_(norm);
    if (stats) {
      torch::stable::zero_(statistics);
      std::fill_n(static_cast<float*>(statistics.mutable_data_ptr()), B * H * T,  // max_logit
                  -std::numeric_limits<float>::infinity());
    }
    if (stats == 2) torch::stable::zero_(received);
  }
  p.out = write(out);
  if (p.cu_seqlens_q) p.out.b = 0;
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.lse_stride_b = H * T, p.lse_stride_h = T;
  p.norm = static_cast<float*>(norm.mutable_data_ptr()), p.norm_plane = B * H * T;
  if (stats) {
    p.max_logit = static_cast<float*>(statistics.mutable_data_ptr());
    p.entropy = p.max_logit + B * H * T;
    p.reach = p.entropy + B * H * T;
    p.focus = p.reach + B * H * T;
  }
  if (stats == 2) {
    p.received = static_cast<float*>(received.mutable_data_ptr());
    p.received_stride_b = H * S, p.received_stride_h = S;
  }
  p.weights_mode = static_cast<Weights>(weights);
  if (weights) {
    p.weights = MutableView{probabilities.mutable_data_ptr(),
                            (weights == 1 ? 1 : H) * rows * columns,
                            weights == 1 ? 0 : rows * columns,
                            columns,
                            1,
                            dtype_of(probabilities)};
  }
  run_forward(p);
  return {out, lse, norm, statistics, received, probabilities};
}

// A layer's self-attention without gradients, from its packed projection (B, T, 3, H, D), or
// (T, B, 3, H, D), to the merged heads (B, T, H, D) or (T, B, H, D): cpu_fwd without ten views.
std::tuple<Tensor, Tensor> cpu_self_attention(const Tensor& packed, int64_t heads, bool batch_first,
                                              OptionalTensor mask, OptionalTensor bias, bool causal,
                                              int64_t weights) {
  STD_TORCH_CHECK(
      packed.dim() == 3 && heads > 0 && packed.size(2) % (3 * heads) == 0 && packed.is_contiguous(),
      "attention: packed must be contiguous, with 3 * heads * D features");
  ForwardParams p;
  const int64_t width = packed.size(2) / 3, D = width / heads;
  p.B = packed.size(batch_first ? 0 : 1), p.T = p.S = packed.size(batch_first ? 1 : 0);
  p.H = p.H_kv = heads, p.D = p.D_v = D;
  const int64_t b = (batch_first ? p.T : 1) * width, t = (batch_first ? 1 : p.B) * width;
  const DType type = dtype_of(packed);
  const auto* data = data_of<char>(packed, "packed");
  const int64_t bytes = width * (type == DType::kFloat32 ? 4 : 2);
  p.q = View{data, 3 * b, D, 3 * t, 1, type};
  p.k = View{data + bytes, 3 * b, D, 3 * t, 1, type};
  p.v = View{data + 2 * bytes, 3 * b, D, 3 * t, 1, type};
  const std::array<int64_t, 4> scores{p.B, p.H, p.T, p.S};
  p.mask = read_scores(mask, "mask", scores), p.bias = read_scores(bias, "bias", scores);
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(D))), p.causal = causal;
  share_out(&p, pairs_of(p));

  Tensor out = empty(packed, packed.scalar_type(), {packed.size(0), packed.size(1), width});
  Tensor probabilities = weights == 0   ? nothing(packed)
                         : weights == 1 ? empty(packed, packed.scalar_type(), {p.B, p.T, p.S})
                                        : empty(packed, packed.scalar_type(), {p.B, p.H, p.T, p.S});
  const int64_t queries = p.B * p.H * p.T;
  const Tensor rows = empty(packed, ScalarType::Float, {3, queries});  // lse and norm
  p.out = MutableView{out.mutable_data_ptr(), b, D, t, 1, type};
  p.lse = static_cast<float*>(rows.mutable_data_ptr());
  p.lse_stride_b = p.H * p.T, p.lse_stride_h = p.T;
  p.norm = p.lse + queries, p.norm_plane = queries;
  p.weights_mode = static_cast<Weights>(weights);
  const int64_t square = p.T * p.S, per_head = weights == 2 ? square : 0;
  if (weights) {
    p.weights = MutableView{probabilities.mutable_data_ptr(),
                            weights == 1 ? square : p.H * square,
                            per_head,
                            p.S,
                            1,
                            type};
  }
  run_forward(p);
  return {out, probabilities};
}

// A number per query (B, H, T), contiguous in fp32.
const float* rows_of(const OptionalTensor& x, const char* name, std::vector<Tensor>* kept) {
  if (!x) return nullptr;
  const auto* data = data_of<float>(*x, name);
  if (x->is_contiguous() && x->scalar_type() == ScalarType::Float) return data;
  Tensor copy = empty(*x, ScalarType::Float, {x->size(0), x->size(1), x->size(2)});
  torch::stable::copy_(copy, *x);
  kept->push_back(copy);
  return static_cast<const float*>(copy.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_bwd(
    const Tensor& grad_out, OptionalTensor grad_lse, OptionalTensor grad_entropy,
    OptionalTensor grad_weights, const Tensor& out, const Tensor& norm, OptionalTensor entropy,
    bool need_dbias, bool need_dsinks, ATTNFAST_INPUTS) {
  BackwardParams p;
  SmallTensors small;
  std::vector<Tensor> kept;
  fill_problem(&p, &small, ATTNFAST_INPUT_NAMES);
  const int64_t H = p.H, T = q.size(2);
  const Tensor d_o = with_rows(grad_out, "grad_out");
  Tensor dq = empty_in_order(q, q.size(3)), dk = empty_in_order(k, k.size(3)),
         dv = empty_in_order(v, v.size(3));
  if (has_slack(p, T, k.size(2)))
    torch::stable::zero_(dq), torch::stable::zero_(dk), torch::stable::zero_(dv);
  p.out = read(out, "out"), p.grad_out = read(d_o, "grad_out");
  p.dq = write(dq), p.dk = write(dk), p.dv = write(dv);
  if (p.cu_seqlens_q) p.out.b = p.grad_out.b = p.dq.b = p.dk.b = p.dv.b = 0;
  p.lse_stride_b = H * T, p.lse_stride_h = T;
  const bool is_lse = norm.dim() == 3;  // all that torch's own operators keep
  STD_TORCH_CHECK(norm.is_contiguous() && (is_lse || (norm.dim() == 4 && norm.size(0) == 2)),
                  "attention: norm must be what the forward returned");
  p.norm = data_of<float>(norm, "norm");
  p.norm_plane = is_lse ? 0 : norm.stride(0);
  p.grad_lse = rows_of(grad_lse, "grad_lse", &kept);
  p.entropy = rows_of(entropy, "entropy", &kept);
  p.grad_entropy = rows_of(grad_entropy, "grad_entropy", &kept);
  p.weights_mode = static_cast<Weights>(weights);
  if (grad_weights) {
    const auto stride = [&](int64_t d) {
      return grad_weights->size(d) == 1 ? 0 : grad_weights->stride(d);
    };
    p.grad_weights = weights == 1 ? View{data_of(*grad_weights, "grad_weights"),
                                         stride(0),
                                         0,
                                         stride(1),
                                         stride(2),
                                         dtype_of(*grad_weights)}
                                  : read(*grad_weights, "grad_weights");
  }
  Tensor dbias = nothing(q), dsinks = nothing(q);
  if (need_dbias) {
    dbias = empty(*bias, bias->scalar_type(),
                  {bias->size(0), bias->size(1), bias->size(2), bias->size(3)});
    if (p.cu_seqlens_q && (p.T < bias->size(2) || p.S < bias->size(3))) torch::stable::zero_(dbias);
    p.dbias = write(dbias);
  }
  std::vector<float> sink_sums(need_dsinks ? H : 0);
  if (need_dsinks) {
    dsinks = empty(*sinks, sinks->scalar_type(), {H});
    p.dsinks = sink_sums.data();
  }
  run(attnfast::cpu::kernels().attention_bwd, p, "attention: no memory for the backward's");
  for (size_t h = 0; h < sink_sums.size(); ++h) set_element(dsinks, h, sink_sums[h]);
  return {dq, dk, dv, dbias, dsinks};
}

std::tuple<Tensor, Tensor> cpu_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                      const Tensor& cache_seqlens, OptionalTensor page_table,
                                      OptionalTensor bias, OptionalTensor alibi_slopes,
                                      OptionalTensor sinks, double scale, int64_t window_left,
                                      int64_t window_right, double softcap) {
  DecodeParams p;
  SmallTensors small;
  check_sizes(q, k_cache, v_cache, "k_cache", "v_cache", page_table);
  p.B = q.size(0), p.H = q.size(1), p.T = q.size(2), p.D = q.size(3), p.D_v = v_cache.size(3);
  p.q = read(q, "q"), p.k = read(k_cache, "k_cache"), p.v = read(v_cache, "v_cache");
  small.cache_seqlens = ints_of(cache_seqlens, "cache_seqlens");
  p.cache_seqlens = small.cache_seqlens.data();
  if (page_table) {  // pages (P, page, H_kv, D)
    small.page_table = ints_of(*page_table, "page_table");
    p.page_table = small.page_table.data();
    p.num_pages = k_cache.size(0), p.page_size = k_cache.size(1), p.H_kv = k_cache.size(2);
    p.pages_per_sequence = page_table->size(1);
    p.S = p.pages_per_sequence * p.page_size;
    std::swap(p.k.h, p.k.t), std::swap(p.v.h, p.v.t);
  } else {
    p.H_kv = k_cache.size(1), p.S = k_cache.size(2);
  }
  check_counts(p.B, p.H, alibi_slopes, sinks);
  check_count(cache_seqlens, "cache_seqlens", p.B);
  p.bias = read_scores(bias, "bias", {p.B, p.H, p.T, p.S});
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t length = small.cache_seqlens[b];
    STD_TORCH_CHECK(length >= 0 && length <= p.S,
                    "decode_attention: cache_seqlens must lie in [0, ", p.S,
                    "], the capacity of the cache, got ", length, " at index ", b);
    const int64_t pages = p.page_size ? (length + p.page_size - 1) / p.page_size : 0;
    for (int64_t i = 0; i < pages; ++i) {
      const int32_t page = small.page_table[b * p.pages_per_sequence + i];
      STD_TORCH_CHECK(page >= 0 && page < p.num_pages,
                      "decode_attention: page_table must hold pages in [0, ", p.num_pages,
                      "), got ", page, " at (", b, ", ", i, ")");
    }
  }
  if (alibi_slopes) {
    small.slopes = floats_of(*alibi_slopes, "alibi_slopes");
    p.alibi_slopes = small.slopes.data();
    p.alibi_stride_b = alibi_slopes->dim() == 2 && alibi_slopes->size(0) > 1 ? p.H : 0;
  }
  if (sinks) {
    small.sinks = floats_of(*sinks, "sinks");
    p.sinks = small.sinks.data();
  }
  p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
  p.window_left = window_left, p.window_right = window_right;
  Tensor out = empty_in_order(q, p.D_v);
  Tensor lse = empty(q, ScalarType::Float, {p.B, p.H, p.T});
  p.out = write(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  double pairs = 0.0;
  for (const int32_t length : small.cache_seqlens) pairs += static_cast<double>(length) * p.T;
  share_out(&p, pairs);
  run(attnfast::cpu::kernels().attention_decode, p,
      "decode_attention: no memory for the decoding's");
  return {out, lse};
}

std::string cpu_isa() { return attnfast::cpu::kernels().name; }
std::string cpu_isas() { return attnfast::cpu::runnable_isas(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnfast, CPU, m) {
  m.impl("cpu_fwd", ATTNFAST_BOX(cpu_fwd));
  m.impl("cpu_bwd", ATTNFAST_BOX(cpu_bwd));
  m.impl("cpu_decode", ATTNFAST_BOX(cpu_decode));
  m.impl("cpu_self_attention", ATTNFAST_BOX(cpu_self_attention));
}

STABLE_TORCH_LIBRARY_IMPL(attnfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", ATTNFAST_BOX(cpu_isa));
  m.impl("cpu_isas", ATTNFAST_BOX(cpu_isas));
}
