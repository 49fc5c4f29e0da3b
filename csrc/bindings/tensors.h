// Tensors of torch's stable ABI (2.10 and later) as views, and new ones: what the bindings share.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>

#include "../params.h"
#include "memory.h"

// The operators' namespace: another for builds that live beside this one in a process (make hub).
#ifndef ATTNFAST_OPERATORS
#define ATTNFAST_OPERATORS attnfast
#endif

// Why a call of torch's failed: of torch 2.13 and later.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace attnfast::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Bool:
      return DType::kBool;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false,
                      "attention: tensors must be float32, bfloat16, float16, float64 or bool");
      return DType::kFloat32;
  }
}

// Strides of a 4-D tensor; dimensions of size 1 broadcast.
template <class AnyView, class Pointer>
AnyView view_of(const Tensor& x, Pointer data) {
  const auto stride = [&](int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d); };
  return AnyView{data, stride(0), stride(1), stride(2), stride(3), dtype_of(x)};
}

// Where a tensor that was given begins. Its storage may have been given back (FSDP, offloading), or
// have become smaller: nothing of torch looks at that for us.
template <class Number = void>
const Number* data_of(const Tensor& x, const char* name) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t last = x.storage_offset();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return nullptr;
    last += (sizes[d] - 1) * strides[d];
  }
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  const int64_t needed = (last + 1) * x.element_size();
  STD_TORCH_CHECK(needed <= bytes, "attention: ", name, " must have its memory, got a storage of ",
                  bytes, " bytes where ", needed, " are needed");
  return static_cast<const Number*>(x.const_data_ptr());
}

inline View read(const Tensor& x, const char* name) { return view_of<View>(x, data_of(x, name)); }
inline MutableView write(const Tensor& x) { return view_of<MutableView>(x, x.mutable_data_ptr()); }

inline std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (const int64_t size : x.sizes()) text += std::to_string(size) + ", ";
  return text.substr(0, text.size() - 2) + ")";
}

// Rows up to here, and offsets up to twice as many, keep every sum of positions within 32 bits; a
// window of four times as many reaches from any of them to any other.
constexpr int64_t kMaxRows = int64_t{1} << 28, kMaxOffset = 2 * kMaxRows;

// Rows of q, k, v and their gradients are walked by pointer: their last stride must be 1.
inline bool has_rows(const Tensor& x) { return x.size(3) <= 1 || x.stride(3) == 1; }
inline void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && has_rows(x), "attention: ", name,
                  " must be 4-D with last stride 1");
  STD_TORCH_CHECK(x.size(2) <= kMaxRows, "attention: ", name, " must have at most ", kMaxRows,
                  " rows, got ", x.size(2));
}

// Sizes are checked in Python; but those that an exported program leaves open are known only here.
inline void check_count(const OptionalTensor& x, const char* name, int64_t count) {
  STD_TORCH_CHECK(!x || x->numel() == count, "attention: ", name, " must have ", count,
                  " elements, got ", x ? x->numel() : 0);
}

inline void check_longest(const char* name, int64_t longest) {
  STD_TORCH_CHECK(longest >= 0, "attention: ", name, " must be at least 0, got ", longest);
}

// Keys and values (B, H_kv, S, D), or pages (P, page, H_kv, D).
inline void check_sizes(const Tensor& q, const Tensor& k, const Tensor& v, const char* k_name,
                        const char* v_name, const OptionalTensor& page_table) {
  check_rows(q, "q"), check_rows(k, k_name), check_rows(v, v_name);
  const int64_t H_kv = k.size(page_table ? 2 : 1);
  STD_TORCH_CHECK((page_table || k.size(0) == q.size(0)) && k.size(3) == q.size(3) && H_kv > 0 &&
                      q.size(1) % H_kv == 0,
                  "attention: ", k_name, " must fit q ", shape_of(q), ", got ", shape_of(k));
  STD_TORCH_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
                  "attention: ", v_name, " must fit ", k_name, " ", shape_of(k), ", got ",
                  shape_of(v));
  if (!page_table) return;
  STD_TORCH_CHECK(page_table->size(0) == q.size(0) && page_table->size(1) * k.size(1) <= kMaxRows,
                  "attention: page_table must be (B, n) = (", q.size(0), ", *), of at most ",
                  kMaxRows, " keys, got ", shape_of(*page_table), " of pages of ", k.size(1));
}

// A mask or bias, of which every size is 1 or that of the scores (B, H, T, S).
inline View read_scores(const OptionalTensor& x, const char* name,
                        const std::array<int64_t, 4>& full) {
  if (!x) return View{};
  bool fits = x->dim() == 4;
  for (int d = 0; fits && d < 4; ++d) fits = x->size(d) == 1 || x->size(d) == full[d];
  STD_TORCH_CHECK(fits, "attention: ", name, " must be broadcastable to (", full[0], ", ", full[1],
                  ", ", full[2], ", ", full[3], "), got ", shape_of(*x));
  return read(*x, name);
}

// Raises a MemoryError; of a GPU's memory a RuntimeError, out of which attnfast/autograd.py makes
// torch.OutOfMemoryError.
[[noreturn]] inline void no_tensor(const Tensor& like, ScalarType type, const int64_t* sizes,
                                   int64_t dim) {
  const bool is_wide = type == ScalarType::Double || type == ScalarType::Long;
  const bool is_half = type == ScalarType::Half || type == ScalarType::BFloat16;
  double bytes = is_wide ? 8 : is_half ? 2 : 4;
  for (int64_t d = 0; d < dim; ++d) bytes *= static_cast<double>(sizes[d]);
  const std::string wanted = mebibytes(bytes) + " of shape " + in_parentheses(sizes, dim);
  if (like.is_cpu()) throw NoMemory(("attention: no memory for a tensor: " + wanted).c_str());
  const std::string reason = torch_exception_get_what_without_backtrace
                                 ? torch_exception_get_what_without_backtrace()
                                 : "out of memory";
  throw std::runtime_error("attnfast: no tensor of " + wanted + ": " + reason);
}

// An empty tensor on the device of `like`. Straight from the C shim: calls through the dispatcher
// cost a microsecond each, and a call of attention makes five tensors.
inline Tensor empty_strided(const Tensor& like, ScalarType type, const int64_t* sizes,
                            const int64_t* strides, int64_t dim) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(type), device_type,
                               device_index, &handle) != AOTI_TORCH_SUCCESS)
    no_tensor(like, type, sizes, dim);
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, ScalarType type, std::initializer_list<int64_t> sizes) {
  std::array<int64_t, 4> strides;
  int64_t next = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = next;
    next *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  return empty_strided(like, type, sizes.begin(), strides.data(), sizes.size());
}

// Dense rows of `last` elements, the first three dimensions in the memory order of `like`.
inline Tensor empty_in_order(const Tensor& like, int64_t last) {
  std::array<int64_t, 3> order{0, 1, 2};
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return like.stride(a) > like.stride(b); });
  const std::array<int64_t, 4> sizes{like.size(0), like.size(1), like.size(2), last};
  std::array<int64_t, 4> strides{0, 0, 0, 1};
  int64_t next = std::max<int64_t>(last, 1);
  for (int i = 2; i >= 0; --i) {
    strides[order[i]] = next;
    next *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return empty_strided(like, like.scalar_type(), sizes.data(), strides.data(), 4);
}

// The sizes of another tensor, dense.
inline Tensor empty_like(const Tensor& x, ScalarType type) {
  const auto sizes = x.sizes();
  std::array<int64_t, 4> strides;
  int64_t next = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = next;
    next *= std::max<int64_t>(sizes[i], 1);
  }
  return empty_strided(x, type, sizes.data(), strides.data(), sizes.size());
}

inline Tensor nothing(const Tensor& like) { return empty(like, like.scalar_type(), {0}); }

// The operators' arguments, in the order of attnfast/call.py: a record as parameters, and as what
// is handed on.
#define ATTNFAST_PARAMETER(name, absent) double name,
#define ATTNFAST_NAME(name, absent) name,
#define ATTNFAST_INPUTS                                                                        \
  const Tensor &q, const Tensor &k, const Tensor &v, OptionalTensor mask, OptionalTensor bias, \
      OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor align,                 \
      OptionalTensor dropout_seed, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,   \
      OptionalTensor indices, OptionalTensor windows, OptionalTensor block_starts,             \
      OptionalTensor block_index, OptionalTensor block_bits,                                   \
      ATTNFAST_SCORE_OPTIONS(ATTNFAST_PARAMETER) bool causal, int64_t window_left,             \
      int64_t window_right, int64_t align_offset, bool align_bottom_right, double dropout_p,   \
      int64_t weights, int64_t stats, bool deterministic, int64_t max_seqlen_q,                \
      int64_t max_seqlen_k
#define ATTNFAST_INPUT_NAMES                                                                 \
  q, k, v, mask, bias, alibi_slopes, sinks, align, dropout_seed, cu_seqlens_q, cu_seqlens_k, \
      indices, windows, block_starts, block_index, block_bits,                               \
      ATTNFAST_SCORE_OPTIONS(ATTNFAST_NAME) causal, window_left, window_right, align_offset, \
      align_bottom_right, dropout_p, weights, stats, deterministic, max_seqlen_q, max_seqlen_k
#define ATTNFAST_UPSTREAM                                                                         \
  const Tensor &grad_out, OptionalTensor grad_lse, OptionalTensor grad_entropy,                   \
      OptionalTensor grad_weights, const Tensor &out, const Tensor &norm, OptionalTensor entropy, \
      bool need_dbias, bool need_dsinks
#define ATTNFAST_UPSTREAM_NAMES \
  grad_out, grad_lse, grad_entropy, grad_weights, out, norm, entropy, need_dbias, need_dsinks
#define ATTNFAST_POOLING                                                              \
  const Tensor &norm, OptionalTensor tokens_q, OptionalTensor tokens_k, int64_t kind, \
      int64_t rows, int64_t columns
#define ATTNFAST_POOLING_NAMES norm, tokens_q, tokens_k, kind, rows, columns
#define ATTNFAST_DECODE_INPUTS                                                                \
  const Tensor &q, const Tensor &k_cache, const Tensor &v_cache, const Tensor &cache_seqlens, \
      OptionalTensor page_table, OptionalTensor bias, OptionalTensor alibi_slopes,            \
      OptionalTensor sinks, OptionalTensor mask, OptionalTensor windows,                      \
      ATTNFAST_SCORE_OPTIONS(ATTNFAST_PARAMETER) int64_t window_left, int64_t window_right,   \
      bool received
#define ATTNFAST_DECODE_INPUT_NAMES                                                         \
  q, k_cache, v_cache, cache_seqlens, page_table, bias, alibi_slopes, sinks, mask, windows, \
      ATTNFAST_SCORE_OPTIONS(ATTNFAST_NAME) window_left, window_right, received

}  // namespace attnfast::bindings
