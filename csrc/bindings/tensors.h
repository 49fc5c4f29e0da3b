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

#include "../params.h"

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
inline View read(const Tensor& x) { return view_of<View>(x, x.const_data_ptr()); }
inline View read(const OptionalTensor& x) { return x ? read(*x) : View{}; }
inline MutableView write(const Tensor& x) { return view_of<MutableView>(x, x.mutable_data_ptr()); }

// The rows of q, k, v and their gradients are walked by pointer: their last stride must be 1.
inline void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.size(3) <= 1 || x.stride(3) == 1), "attention: ", name,
                  " must be 4-D with last stride 1");
}

// An empty tensor on the device of `like`. Straight from the C shim: calls through the dispatcher
// cost a microsecond each, and a call of attention makes five tensors.
inline Tensor empty_strided(const Tensor& like, ScalarType type, const int64_t* sizes,
                            const int64_t* strides, int64_t dim) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(type),
                                                  device_type, device_index, &handle));
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

inline Tensor nothing(const Tensor& like) { return empty(like, like.scalar_type(), {0}); }

// The arguments of forward, in the order of ops.py; backward has them after its own.
#define ATTNFAST_INPUTS                                                                           \
  const Tensor &q, const Tensor &k, const Tensor &v, OptionalTensor mask, OptionalTensor bias,    \
      OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor align,                    \
      OptionalTensor dropout_seed, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,      \
      double scale, bool causal, int64_t window_left, int64_t window_right, int64_t align_offset, \
      bool align_bottom_right, double softcap, double dropout_p, int64_t weights, int64_t stats,  \
      bool deterministic, int64_t max_seqlen_q, int64_t max_seqlen_k
#define ATTNFAST_INPUT_NAMES                                                                 \
  q, k, v, mask, bias, alibi_slopes, sinks, align, dropout_seed, cu_seqlens_q, cu_seqlens_k, \
      scale, causal, window_left, window_right, align_offset, align_bottom_right, softcap,   \
      dropout_p, weights, stats, deterministic, max_seqlen_q, max_seqlen_k

}  // namespace attnfast::bindings
