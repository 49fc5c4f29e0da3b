// Memory for a call's results, the same for the CPU's and the CUDA kernels, and the parameters of
// kernels that point there. What no kernel writes, rows of no sequence, is filled here.
#pragma once
#include <limits>
#include <tuple>

#include "fill.h"

// Whole records are handed on, of which a function uses what it needs.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"

namespace attnfast::bindings {

using ForwardTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using DecodeTensors = std::tuple<Tensor, Tensor, Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline void fill_plane(const Tensor& x, int64_t plane, double value) {
  Tensor one = torch::stable::select(x, 0, plane);
  torch::stable::fill_(one, value);
}

// Per head, or averaged over heads without that dimension, (B, T, S).
template <class AnyView, class Pointer>
AnyView weights_view(const Tensor& x, Pointer data) {
  const auto stride = [&](int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d); };
  if (x.dim() == 4) return view_of<AnyView>(x, data);
  return AnyView{data, stride(0), 0, stride(1), stride(2), dtype_of(x)};
}

// out, lse, norm, stats, received and weights, in this order; `slack`: some rows are of no
// sequence.
template <class Call>
ForwardTensors forward_results(ForwardParams* p, Call* call, bool slack, ATTNFAST_INPUTS) {
  const int64_t B = q.size(0), H = p->H, T = q.size(2), S = k.size(2);
  const int64_t rows = cu_seqlens_q ? max_seqlen_q : T;  // of the weights
  const int64_t columns = cu_seqlens_q ? max_seqlen_k : S;
  Tensor out = empty_in_order(q, p->D_v);
  Tensor lse = empty(q, ScalarType::Float, {B, H, T});
  Tensor norm = empty(q, ScalarType::Float, {2, B, H, T});
  Tensor statistics = stats ? empty(q, ScalarType::Float, {4, B, H, T}) : nothing(lse);
  Tensor received = stats == 2 ? empty(q, ScalarType::Float, {B, H, S}) : nothing(lse);
  Tensor probabilities = weights == 0   ? nothing(q)
                         : weights == 1 ? empty(q, q.scalar_type(), {p->B, rows, columns})
                                        : empty(q, q.scalar_type(), {p->B, H, rows, columns});
  call->writes(out, "out"), call->writes(lse, "lse"), call->writes(norm, "norm");
  call->writes(statistics, "stats"), call->writes(received, "received");
  call->writes(probabilities, "weights");
  if (slack) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -kInfinity);
    fill_plane(norm, 0, 0.0), fill_plane(norm, 1, kInfinity);
    if (stats) {
      torch::stable::zero_(statistics);
      fill_plane(statistics, 0, -kInfinity);  // max_logit
    }
    if (stats == 2) torch::stable::zero_(received);
  }
  if (weights && (p->T < rows || p->S < columns)) torch::stable::zero_(probabilities);
  p->out = write(out);
  if (cu_seqlens_q) p->out.b = 0;
  p->lse = floats(lse), p->lse_stride_b = H * T, p->lse_stride_h = T;
  p->norm = floats(norm), p->norm_plane = B * H * T;
  if (stats) {
    p->max_logit = floats(statistics);
    p->entropy = p->max_logit + B * H * T;
    p->reach = p->entropy + B * H * T;
    p->focus = p->reach + B * H * T;
  }
  if (stats == 2) {
    p->received = floats(received);
    p->received_stride_b = H * S, p->received_stride_h = S;
  }
  p->weights_mode = static_cast<Weights>(weights);
  if (weights)
    p->weights = weights_view<MutableView>(probabilities, probabilities.mutable_data_ptr());
  return {out, lse, norm, statistics, received, probabilities};
}

// What a backward reads beside the problem, and its results: dq, dk, dv, dbias and, in fp32,
// dsinks.
template <class Call>
BackwardTensors backward_results(BackwardParams* p, Kept<Call>* kept, bool slack, ATTNFAST_UPSTREAM,
                                 ATTNFAST_INPUTS) {
  Call* call = kept->call;
  const int64_t H = p->H, T = q.size(2);
  const Tensor d_o = kept->rows(grad_out, "grad_out");
  call->reads(out, "out"), call->reads(grad_weights, "grad_weights");
  p->out = read(out, "out"), p->grad_out = read(d_o, "grad_out");
  p->lse_stride_b = H * T, p->lse_stride_h = T;
  p->norm = kept->floats(norm, "norm");
  p->norm_plane = norm.dim() == 3 ? 0 : q.size(0) * H * T;  // 3: lse
  p->norm_of_more = norm.dim() == 4 && norm.size(0) == 3;
  p->grad_lse = kept->floats(grad_lse, "grad_lse");
  p->entropy = kept->floats(entropy, "entropy");
  p->grad_entropy = kept->floats(grad_entropy, "grad_entropy");
  p->weights_mode = static_cast<Weights>(weights);
  if (grad_weights)
    p->grad_weights = weights_view<View>(*grad_weights, data_of(*grad_weights, "grad_weights"));

  Tensor dq = empty_in_order(q, q.size(3)), dk = empty_in_order(k, k.size(3)),
         dv = empty_in_order(v, v.size(3));
  call->writes(dq, "dq"), call->writes(dk, "dk"), call->writes(dv, "dv");
  if (slack) torch::stable::zero_(dq), torch::stable::zero_(dk), torch::stable::zero_(dv);
  p->dq = write(dq), p->dk = write(dk), p->dv = write(dv);
  if (cu_seqlens_q) p->out.b = p->grad_out.b = p->dq.b = p->dk.b = p->dv.b = 0;
  Tensor dbias = nothing(q), dsinks = nothing(q);
  if (need_dbias) {
    dbias = empty_like(*bias, bias->scalar_type());
    call->writes(dbias, "dbias");
    if (p->T < bias->size(2) || p->S < bias->size(3)) torch::stable::zero_(dbias);
    p->dbias = write(dbias);
  }
  if (need_dsinks) {
    dsinks = empty(q, ScalarType::Float, {H});
    call->writes(dsinks, "dsinks");
    p->dsinks = floats(dsinks);
  }
  return {dq, dk, dv, dbias, dsinks};
}

// What pooling reads beside the problem, and its result.
template <class Call>
Tensor pooled_result(PooledParams* p, Kept<Call>* kept, ATTNFAST_POOLING, ATTNFAST_INPUTS) {
  constexpr int64_t kDistances = 66;
  const int64_t H = p->H, T = q.size(2);
  STD_TORCH_CHECK(!indices, "attention: indices must be left out where probabilities are pooled");
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Pooling::kByDistance),
                  "attention: kind must be 0, 1 or 2, got ", kind);
  p->kind = static_cast<Pooling>(kind);
  STD_TORCH_CHECK(rows >= 1 && columns >= 1 && rows <= kMaxRows && columns <= kMaxRows,
                  "attention: rows and columns must be from 1 to ", kMaxRows, ", got ", rows,
                  " and ", columns);
  STD_TORCH_CHECK(p->kind != Pooling::kByDistance || columns == kDistances,
                  "attention: columns must be ", kDistances, " for distances, got ", columns);
  STD_TORCH_CHECK(norm.dim() == 4 && norm.size(0) == 2 && norm.numel() == 2 * q.size(0) * H * T,
                  "attention: norm must be what the forward returned");
  check_count(tokens_q, "tokens_q", q.size(0) * T);
  check_count(tokens_k, "tokens_k", k.size(0) * k.size(2));
  STD_TORCH_CHECK(tokens_q.has_value() == tokens_k.has_value(),
                  "attention: tokens_q and tokens_k must be given together");
  p->norm = kept->floats(norm, "norm");
  p->lse_stride_b = H * T, p->lse_stride_h = T, p->norm_plane = q.size(0) * H * T;
  p->tokens_q = kept->ints(tokens_q, "tokens_q"), p->tokens_k = kept->ints(tokens_k, "tokens_k");
  p->rows = rows, p->columns = columns;
  Tensor pooled = empty(q, ScalarType::Float, {p->B, H, rows, columns});
  kept->call->writes(pooled, "pooled");
  p->pooled = floats(pooled);
  return pooled;
}

// x in another type, if it is not of that.
inline Tensor converted(const Tensor& x, ScalarType type) {
  if (x.scalar_type() == type) return x;
  Tensor copy = empty_like(x, type);
  torch::stable::copy_(copy, x);
  return copy;
}

template <class Call>
DecodeTensors decode_results(DecodeParams* p, Call* call, const Tensor& q, bool received) {
  Tensor out = empty_in_order(q, p->D_v);
  Tensor lse = empty(q, ScalarType::Float, {p->B, p->H, p->T});
  Tensor sums = received ? empty(q, ScalarType::Float, {p->B, p->H, p->S}) : nothing(lse);
  call->writes(out, "out"), call->writes(lse, "lse"), call->writes(sums, "received");
  p->out = write(out), p->lse = floats(lse);
  if (received) {
    p->received = floats(sums);
    if (p->T == 0) torch::stable::zero_(sums);
  }
  return {out, lse, sums};
}

}  // namespace attnfast::bindings

#pragma GCC diagnostic pop
