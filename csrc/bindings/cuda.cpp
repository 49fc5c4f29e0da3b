// torch.ops.attnfast.cuda_*: tensors in, parameter structs with device pointers out, through
// torch's stable ABI (2.10 and later). Nothing here waits for the device.
//
// The schemas are defined in attnfast/ops.py, which also checks shapes and dtypes. Values inside
// tensors are not read on the host: the kernels clamp what indexes memory.
#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "../cuda/kernels.h"
#include "device.h"
#include "tensors.h"

namespace {

using namespace attnfast::bindings;
using attnfast::BackwardParams;
using attnfast::DecodeParams;
using attnfast::ForwardParams;
using attnfast::MutableView;
using attnfast::Problem;
using attnfast::View;
using attnfast::Weights;
using attnfast::cuda::DeviceSeed;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// int64 with all that int32 lacks at its ends, where copying would wrap.
Tensor saturated(const Tensor& x) {
  const auto end = [&](int32_t value) {
    Tensor of = empty(x, ScalarType::Long, {1});
    torch::stable::fill_(of, value);
    return torch::stable::detail::from(OptionalTensor(of));
  };
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), end(INT32_MIN), end(INT32_MAX)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::clamp", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A distance between rows, so that sums of a few do not overflow.
int64_t bounded(int64_t x) {
  constexpr int64_t kFar = int64_t{1} << 60;
  return std::min(std::max(x, -kFar), kFar);
}

// Small tensors as the kernels read them, which live as long as the call.
class Kept {
 public:
  explicit Kept(DeviceCall* call) : call_(call) {}

  // A dense copy of that type, unless x is one.
  template <class Number>
  const Number* numbers(const Tensor& x, ScalarType type, const char* name) {
    data_of(x, name);
    Tensor dense = x;
    if (!x.is_contiguous() || x.scalar_type() != type) {
      dense = x.dim() == 2 ? empty(x, type, {x.size(0), x.size(1)}) : empty(x, type, {x.size(0)});
      torch::stable::copy_(dense, x.scalar_type() == ScalarType::Long ? saturated(x) : x);
    }
    tensors_.push_back(dense);
    call_->reads(dense, name);
    return static_cast<const Number*>(dense.const_data_ptr());
  }

 private:
  DeviceCall* call_;
  std::vector<Tensor> tensors_;
};

void fill_problem(Problem* p, DeviceSeed* seed, DeviceCall* call, Kept* kept, ATTNFAST_INPUTS) {
  (void)weights, (void)stats, (void)deterministic;  // the kernels are deterministic always
  check_sizes(q, k, v, "k", "v", std::nullopt);
  p->B = q.size(0), p->H = q.size(1), p->T = q.size(2), p->D = q.size(3);
  p->H_kv = k.size(1), p->S = k.size(2), p->D_v = v.size(3);
  p->q = read(q, "q"), p->k = read(k, "k"), p->v = read(v, "v");
  call->reads(q, "q"), call->reads(k, "k"), call->reads(v, "v");
  call->reads(mask, "mask"), call->reads(bias, "bias");
  if (alibi_slopes) {
    p->alibi_slopes = kept->numbers<float>(*alibi_slopes, ScalarType::Float, "alibi_slopes");
    p->alibi_stride_b = alibi_slopes->dim() == 2 && alibi_slopes->size(0) > 1 ? p->H : 0;
  }
  if (sinks) p->sinks = kept->numbers<float>(*sinks, ScalarType::Float, "sinks");
  if (cu_seqlens_q) {
    p->cu_seqlens_q = kept->numbers<int32_t>(*cu_seqlens_q, ScalarType::Int, "cu_seqlens_q");
    p->cu_seqlens_k = kept->numbers<int32_t>(*cu_seqlens_k, ScalarType::Int, "cu_seqlens_k");
    p->B = cu_seqlens_q->size(0) - 1;
    p->T = std::min(p->T, max_seqlen_q), p->S = std::min(p->S, max_seqlen_k);
    p->q.b = p->k.b = p->v.b = 0;
  }
  check_counts(p->B, p->H, alibi_slopes, sinks);
  check_count(align, "align", p->B), check_count(dropout_seed, "dropout_seed", 2);
  const bool packed = p->cu_seqlens_q;  // T and S may be less than the maxima
  const std::array<int64_t, 4> scores{packed ? 1 : p->B, p->H, packed ? max_seqlen_q : p->T,
                                      packed ? max_seqlen_k : p->S};
  p->mask = read_scores(mask, "mask", scores), p->bias = read_scores(bias, "bias", scores);
  if (align) p->align_per_batch = kept->numbers<int32_t>(*align, ScalarType::Int, "align");
  p->align_offset = bounded(align_offset), p->align_bottom_right = align_bottom_right;
  p->scale = static_cast<float>(scale), p->causal = causal;
  p->window_left = bounded(window_left), p->window_right = bounded(window_right);
  p->softcap = static_cast<float>(softcap);
  p->dropout_p = dropout_p;
  if (dropout_seed) {
    call->reads(dropout_seed, "dropout_seed");
    seed->seed = data_of<int64_t>(*dropout_seed, "dropout_seed");
    seed->stride = dropout_seed->stride(0);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cuda_fwd(ATTNFAST_INPUTS) {
  ForwardParams p;
  DeviceSeed seed;
  DeviceCall call(q);
  Kept kept(&call);
  fill_problem(&p, &seed, &call, &kept, ATTNFAST_INPUT_NAMES);
  const int64_t B = q.size(0), H = p.H, T = q.size(2);
  const int64_t rows = p.cu_seqlens_q ? max_seqlen_q : T;  // of the weights
  const int64_t columns = p.cu_seqlens_q ? max_seqlen_k : p.S;
  Tensor out = empty_in_order(q, p.D_v);
  Tensor lse = empty(q, ScalarType::Float, {B, H, T});
  Tensor norm = empty(q, ScalarType::Float, {2, B, H, T});
  Tensor statistics = stats ? empty(q, ScalarType::Float, {4, B, H, T}) : nothing(lse);
  Tensor received = stats == 2 ? empty(q, ScalarType::Float, {B, H, k.size(2)}) : nothing(lse);
  Tensor probabilities = weights == 0   ? nothing(q)
                         : weights == 1 ? empty(q, q.scalar_type(), {p.B, rows, columns})
                                        : empty(q, q.scalar_type(), {p.B, H, rows, columns});
  call.writes(out, "out"), call.writes(lse, "lse"), call.writes(norm, "norm");
  call.writes(statistics, "stats");
  call.writes(received, "received"), call.writes(probabilities, "weights");
  if (p.cu_seqlens_q) {  // rows past the last sequence
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -kInfinity);
    torch::stable::zero_(norm);
    Tensor log2_l = torch::stable::select(norm, 0, 1);
    torch::stable::fill_(log2_l, kInfinity);
    if (stats) {
      torch::stable::zero_(statistics);
      Tensor max_logit = torch::stable::select(statistics, 0, 0);
      torch::stable::fill_(max_logit, -kInfinity);
    }
    if (stats == 2) torch::stable::zero_(received);
  }
  if (weights && (p.T < rows || p.S < columns)) torch::stable::zero_(probabilities);
  p.out = write(out);
  if (p.cu_seqlens_q) p.out.b = 0;
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.norm = static_cast<float*>(norm.mutable_data_ptr());
  p.norm_plane = B * H * T;
  p.lse_stride_b = H * T, p.lse_stride_h = T;
  if (stats) {
    p.max_logit = static_cast<float*>(statistics.mutable_data_ptr());
    p.entropy = p.max_logit + B * H * T;
    p.reach = p.entropy + B * H * T;
    p.focus = p.reach + B * H * T;
  }
  if (stats == 2) {
    p.received = static_cast<float*>(received.mutable_data_ptr());
    p.received_stride_b = H * k.size(2), p.received_stride_h = k.size(2);
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
  attnfast::cuda::attention_fwd(p, seed, T, k.size(2), call.stream());
  return {out, lse, norm, statistics, received, probabilities};
}

// fp32 rows laid out like lse, or planes of them, dense.
const float* rows_of(const OptionalTensor& x, DeviceCall* call, std::vector<Tensor>* kept,
                     const char* name) {
  if (!x) return nullptr;
  data_of(*x, name);
  Tensor dense = *x;
  if (!x->is_contiguous() || x->scalar_type() != ScalarType::Float) {
    dense = x->dim() == 4
                ? empty(*x, ScalarType::Float, {x->size(0), x->size(1), x->size(2), x->size(3)})
                : empty(*x, ScalarType::Float, {x->size(0), x->size(1), x->size(2)});
    torch::stable::copy_(dense, *x);
  }
  kept->push_back(dense);
  call->reads(dense, name);
  return static_cast<const float*>(dense.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_bwd(
    const Tensor& grad_out, OptionalTensor grad_lse, OptionalTensor grad_entropy,
    OptionalTensor grad_weights, const Tensor& out, const Tensor& norm, OptionalTensor entropy,
    bool need_dbias, bool need_dsinks, ATTNFAST_INPUTS) {
  BackwardParams p;
  DeviceSeed seed;
  DeviceCall call(q);
  Kept kept(&call);
  std::vector<Tensor> rows;
  fill_problem(&p, &seed, &call, &kept, ATTNFAST_INPUT_NAMES);
  const int64_t H = p.H, T = q.size(2);
  const Tensor d_o = with_rows(grad_out, "grad_out");
  Tensor dq = empty_in_order(q, q.size(3)), dk = empty_in_order(k, k.size(3)),
         dv = empty_in_order(v, v.size(3));
  call.reads(out, "out"), call.reads(d_o, "grad_out");
  call.writes(dq, "dq"), call.writes(dk, "dk"), call.writes(dv, "dv");
  p.out = read(out, "out"), p.grad_out = read(d_o, "grad_out");
  p.dq = write(dq), p.dk = write(dk), p.dv = write(dv);
  if (p.cu_seqlens_q) {
    p.out.b = p.grad_out.b = p.dq.b = p.dk.b = p.dv.b = 0;
    torch::stable::zero_(dq), torch::stable::zero_(dk), torch::stable::zero_(dv);
  }
  p.lse_stride_b = H * T, p.lse_stride_h = T;
  p.norm = rows_of(norm, &call, &rows, "norm");
  p.norm_plane = q.size(0) * H * T;
  p.grad_lse = rows_of(grad_lse, &call, &rows, "grad_lse");
  p.entropy = rows_of(entropy, &call, &rows, "entropy");
  p.grad_entropy = rows_of(grad_entropy, &call, &rows, "grad_entropy");
  p.weights_mode = static_cast<Weights>(weights);
  call.reads(grad_weights, "grad_weights");
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
  int64_t bias_sizes[4] = {1, 1, 1, 1};
  if (need_dbias) {
    for (int64_t d = 0; d < 4; ++d) bias_sizes[d] = bias->size(d);
    dbias = empty(*bias, bias->scalar_type(),
                  {bias->size(0), bias->size(1), bias->size(2), bias->size(3)});
    call.writes(dbias, "dbias");
    p.dbias = write(dbias);
  }
  Tensor sink_sums = nothing(norm);
  if (need_dsinks) {
    sink_sums = empty(norm, ScalarType::Float, {H});
    call.writes(sink_sums, "dsinks");
    p.dsinks = static_cast<float*>(sink_sums.mutable_data_ptr());
  }
  Tensor scratch = empty(norm, ScalarType::Float, {attnfast::cuda::backward_scratch(p)});
  call.writes(scratch, "scratch");
  attnfast::cuda::attention_bwd(p, seed, T, k.size(2), bias_sizes,
                                static_cast<float*>(scratch.mutable_data_ptr()), call.stream());
  if (need_dsinks) {
    dsinks = sink_sums;
    if (sinks->scalar_type() != ScalarType::Float) {
      dsinks = empty(*sinks, sinks->scalar_type(), {H});
      torch::stable::copy_(dsinks, sink_sums);
    }
  }
  return {dq, dk, dv, dbias, dsinks};
}

std::tuple<Tensor, Tensor> cuda_decode(const Tensor& q, const Tensor& k_cache,
                                       const Tensor& v_cache, const Tensor& cache_seqlens,
                                       OptionalTensor page_table, OptionalTensor bias,
                                       OptionalTensor alibi_slopes, OptionalTensor sinks,
                                       double scale, int64_t window_left, int64_t window_right,
                                       double softcap) {
  DecodeParams p;
  DeviceCall call(q);
  Kept kept(&call);
  check_sizes(q, k_cache, v_cache, "k_cache", "v_cache", page_table);
  p.B = q.size(0), p.H = q.size(1), p.T = q.size(2), p.D = q.size(3), p.D_v = v_cache.size(3);
  p.q = read(q, "q"), p.k = read(k_cache, "k_cache"), p.v = read(v_cache, "v_cache");
  call.reads(q, "q"), call.reads(k_cache, "k_cache"), call.reads(v_cache, "v_cache");
  call.reads(bias, "bias");
  p.cache_seqlens = kept.numbers<int32_t>(cache_seqlens, ScalarType::Int, "cache_seqlens");
  if (page_table) {  // pages (P, page, H_kv, D)
    p.page_table = kept.numbers<int32_t>(*page_table, ScalarType::Int, "page_table");
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
  if (alibi_slopes) {
    p.alibi_slopes = kept.numbers<float>(*alibi_slopes, ScalarType::Float, "alibi_slopes");
    p.alibi_stride_b = alibi_slopes->dim() == 2 && alibi_slopes->size(0) > 1 ? p.H : 0;
  }
  if (sinks) p.sinks = kept.numbers<float>(*sinks, ScalarType::Float, "sinks");
  p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
  p.window_left = bounded(window_left), p.window_right = bounded(window_right);
  Tensor out = empty_in_order(q, p.D_v);
  Tensor lse = empty(q, ScalarType::Float, {p.B, p.H, p.T});
  Tensor scratch = empty(q, ScalarType::Float, {attnfast::cuda::decode_scratch(p)});
  call.writes(out, "out"), call.writes(lse, "lse"), call.writes(scratch, "scratch");
  p.out = write(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  attnfast::cuda::attention_decode(p, static_cast<float*>(scratch.mutable_data_ptr()),
                                   call.stream());
  return {out, lse};
}

#ifndef ATTNFAST_EMULATOR
// Why the GPU of that index cannot run the kernels, or "".
std::string cuda_unusable(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return attnfast::cuda::unusable();
}
#endif

}  // namespace

#ifdef ATTNFAST_EMULATOR
STABLE_TORCH_LIBRARY_IMPL(attnfast, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(attnfast, CompositeExplicitAutograd, m) {
  m.impl("cuda_unusable", ATTNFAST_BOX(cuda_unusable));
}

STABLE_TORCH_LIBRARY_IMPL(attnfast, CUDA, m) {
#endif
  m.impl("cuda_fwd", ATTNFAST_BOX(cuda_fwd));
  m.impl("cuda_bwd", ATTNFAST_BOX(cuda_bwd));
  m.impl("cuda_decode", ATTNFAST_BOX(cuda_decode));
}
