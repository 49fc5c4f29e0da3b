// A call's tensors as what kernels read, the same for the CPU's and the CUDA kernels. A backend's
// `Call` is told of every tensor that they read or write.
#pragma once
#include <array>
#include <utility>
#include <vector>

#include "tensors.h"

// Whole records are handed on, of which a function uses what it needs.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"

namespace attnfast::bindings {

// int64 with all that int32 lacks at its ends, where copying would wrap.
inline Tensor saturated(const Tensor& x) {
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
inline int64_t bounded(int64_t x) {
  constexpr int64_t kFar = int64_t{1} << 60;
  return std::min(std::max(x, -kFar), kFar);
}

// Small tensors as kernels read them, dense and of one type, which live as long as the call.
template <class Call>
class Kept {
 public:
  explicit Kept(Call* call) : call(call) {}

  const float* floats(const OptionalTensor& x, const char* name) {
    return static_cast<const float*>(numbers(x, ScalarType::Float, name));
  }
  const int32_t* ints(const OptionalTensor& x, const char* name) {
    STD_TORCH_CHECK(
        !x || x->scalar_type() == ScalarType::Int || x->scalar_type() == ScalarType::Long,
        "attention: ", name, " must be int32 or int64");
    return static_cast<const int32_t*>(numbers(x, ScalarType::Int, name));
  }

  // x, or if its rows are expanded or transposed a copy of it.
  Tensor rows(const Tensor& x, const char* name) {
    Tensor walked = x;
    if (!has_rows(x)) {
      data_of(x, name);
      walked = empty_in_order(x, x.size(3));
      torch::stable::copy_(walked, x);
    }
    tensors_.push_back(walked);
    call->reads(walked, name);
    return walked;
  }

  Call* const call;

 private:
  const void* numbers(const OptionalTensor& x, ScalarType type, const char* name) {
    if (!x) return nullptr;
    data_of(*x, name);
    Tensor dense = *x;
    if (!x->is_contiguous() || x->scalar_type() != type) {
      dense = empty_like(*x, type);
      torch::stable::copy_(dense, x->scalar_type() == ScalarType::Long ? saturated(*x) : *x);
    }
    tensors_.push_back(dense);
    call->reads(dense, name);
    return dense.const_data_ptr();
  }

  std::vector<Tensor> tensors_;
};

// What decoding has in common with the rest.
template <class Params, class Call>
void fill_score_options(Params* p, Kept<Call>* kept, const OptionalTensor& alibi_slopes,
                        const OptionalTensor& sinks,
                        ATTNFAST_SCORE_OPTIONS(ATTNFAST_PARAMETER) int64_t window_left,
                        int64_t window_right, const OptionalTensor& windows) {
  const bool shared = !alibi_slopes || alibi_slopes->dim() < 2 || alibi_slopes->size(0) == 1;
  check_count(alibi_slopes, "alibi_slopes", shared ? p->H : p->B * p->H);
  check_count(sinks, "sinks", p->H);
  p->alibi_slopes = kept->floats(alibi_slopes, "alibi_slopes");
  p->alibi_stride_b = shared ? 0 : p->H;
  p->sinks = kept->floats(sinks, "sinks");
#define ATTNFAST_FILL(name, absent) p->name = static_cast<float>(name);
  ATTNFAST_SCORE_OPTIONS(ATTNFAST_FILL)
#undef ATTNFAST_FILL
  p->window_left = bounded(window_left), p->window_right = bounded(window_right);
  check_count(windows, "window", 2 * p->H);
  p->windows = kept->ints(windows, "window");
}

// A block mask of scores of these sizes.
template <class Call>
BlockMask fill_blocks(Kept<Call>* kept, const std::array<int64_t, 4>& scores,
                      const OptionalTensor& starts, const OptionalTensor& index,
                      const OptionalTensor& bits) {
  BlockMask mask;
  if (!starts) return mask;
  STD_TORCH_CHECK(index && bits && bits->dim() == 3 && starts->dim() == 3 && index->dim() == 2,
                  "attention: block_starts must be given with block_index and block_bits");
  mask.size = bits->size(1);
  STD_TORCH_CHECK((mask.size == 64 || mask.size == 128) && bits->size(2) == mask.size / 32,
                  "attention: block_bits must be (blocks, size, size / 32) of size 64 or 128, got ",
                  shape_of(*bits));
  const auto lines = [&](int64_t rows) { return 2 * ((rows + mask.size - 1) / mask.size) + 1; };
  const int64_t columns = lines(scores[3]);
  mask.column_starts = lines(scores[2]);
  const auto shared = [&](int d) { return starts->size(d) == 1; };
  STD_TORCH_CHECK((shared(0) || starts->size(0) == scores[0]) &&
                      (shared(1) || starts->size(1) == scores[1]) &&
                      starts->size(2) == mask.column_starts + columns,
                  "attention: block_starts must be (", scores[0], " or 1, ", scores[1], " or 1, ",
                  mask.column_starts + columns, "), got ", shape_of(*starts));
  STD_TORCH_CHECK(index->size(0) == 4, "attention: block_index must be (4, entries), got ",
                  shape_of(*index));
  const int64_t entries = index->size(1);
  mask.starts = kept->ints(starts, "block_starts");
  mask.h = shared(1) ? 0 : starts->size(2);
  mask.b = shared(0) ? 0 : starts->size(1) * starts->size(2);
  mask.keys = kept->ints(index, "block_index");
  mask.slots = mask.keys + entries, mask.queries = mask.slots + entries;
  mask.column_slots = mask.queries + entries;
  mask.bits = kept->ints(bits, "block_bits");
  return mask;
}

// Everything of a problem but the seed of dropout, which lies where the backend reads it. Varlen: T
// and S are the maxima given, or all rows if that is less.
template <class Call>
void fill_params(AttentionParams* p, Kept<Call>* kept, bool seeds_have_place, ATTNFAST_INPUTS) {
  check_sizes(q, k, v, "k", "v", std::nullopt);
  p->B = q.size(0), p->H = q.size(1), p->T = q.size(2), p->D = q.size(3);
  p->H_kv = k.size(1), p->S = k.size(2), p->D_v = v.size(3);
  p->q = read(q, "q"), p->k = read(k, "k"), p->v = read(v, "v");
  kept->call->reads(q, "q"), kept->call->reads(k, "k"), kept->call->reads(v, "v");
  kept->call->reads(mask, "mask"), kept->call->reads(bias, "bias");
  const bool packed = cu_seqlens_q.has_value();  // T and S may be less than the maxima
  if (packed) {
    p->B = cu_seqlens_q->numel() - 1;
    STD_TORCH_CHECK(p->B >= 0, "attention: cu_seqlens_q must start with 0, got nothing");
    STD_TORCH_CHECK(cu_seqlens_k, "attention: cu_seqlens_k must be given with cu_seqlens_q");
    check_count(cu_seqlens_k, "cu_seqlens_k", p->B + 1);
    check_longest("max_seqlen_q", max_seqlen_q), check_longest("max_seqlen_k", max_seqlen_k);
    p->cu_seqlens_q = kept->ints(cu_seqlens_q, "cu_seqlens_q");
    p->cu_seqlens_k = kept->ints(cu_seqlens_k, "cu_seqlens_k");
    p->T = std::min(p->T, max_seqlen_q), p->S = std::min(p->S, max_seqlen_k);
    p->q.b = p->k.b = p->v.b = 0;
  }
  check_count(align, "align", p->B);
  if (!(dropout_seed && seeds_have_place && dropout_seed->numel() == 6))
    check_count(dropout_seed, "dropout_seed", 2);
  const std::array<int64_t, 4> scores{packed ? 1 : p->B, p->H, packed ? max_seqlen_q : p->T,
                                      packed ? max_seqlen_k : p->S};
  p->mask = read_scores(mask, "mask", scores), p->bias = read_scores(bias, "bias", scores);
  const std::array<int64_t, 4> of_sequences{p->B, p->H, scores[2], scores[3]};
  p->blocks = fill_blocks(kept, of_sequences, block_starts, block_index, block_bits);
  if (indices) {
    STD_TORCH_CHECK(!packed, "attention: indices must be left out with cu_seqlens_q");
    STD_TORCH_CHECK(indices->dim() == 4 && indices->size(0) == p->B &&
                        (indices->size(1) == 1 || indices->size(1) == p->H_kv) &&
                        indices->size(2) == p->T,
                    "attention: indices must be (B, 1 | H_kv, T, K) = (", p->B, ", 1 | ", p->H_kv,
                    ", ", p->T, ", *), got ", shape_of(*indices));
    STD_TORCH_CHECK(!windows, "attention: window must be (left, right) with indices");
    p->index_heads = indices->size(1), p->K = indices->size(3);
    p->indices = kept->ints(indices, "indices");
  }
  p->align_per_batch = kept->ints(align, "align");
  p->align_offset = bounded(align_offset), p->align_bottom_right = align_bottom_right;
  p->causal = causal, p->dropout_p = dropout_p;
  fill_score_options(p, kept, alibi_slopes, sinks,
                     ATTNFAST_SCORE_OPTIONS(ATTNFAST_NAME) window_left, window_right, windows);
}

template <class Call>
void fill_decode(DecodeParams* p, Kept<Call>* kept, ATTNFAST_DECODE_INPUTS) {
  check_sizes(q, k_cache, v_cache, "k_cache", "v_cache", page_table);
  p->B = q.size(0), p->H = q.size(1), p->T = q.size(2), p->D = q.size(3), p->D_v = v_cache.size(3);
  p->q = read(q, "q"), p->k = read(k_cache, "k_cache"), p->v = read(v_cache, "v_cache");
  kept->call->reads(q, "q"), kept->call->reads(k_cache, "k_cache");
  kept->call->reads(v_cache, "v_cache"), kept->call->reads(bias, "bias");
  check_count(cache_seqlens, "cache_seqlens", p->B);
  p->cache_seqlens = kept->ints(cache_seqlens, "cache_seqlens");
  p->page_table = kept->ints(page_table, "page_table");
  p->H_kv = k_cache.size(1), p->S = k_cache.size(2);
  if (page_table) {  // pages (P, page, H_kv, D)
    std::swap(p->H_kv, p->S);
    p->num_pages = k_cache.size(0), p->page_size = k_cache.size(1);
    p->pages_per_sequence = page_table->size(1);
    p->S = p->pages_per_sequence * p->page_size;
    std::swap(p->k.h, p->k.t), std::swap(p->v.h, p->v.t);
  }
  kept->call->reads(mask, "mask");
  p->bias = read_scores(bias, "bias", {p->B, p->H, p->T, p->S});
  p->mask = read_scores(mask, "mask", {p->B, p->H, p->T, p->T});
  fill_score_options(p, kept, alibi_slopes, sinks,
                     ATTNFAST_SCORE_OPTIONS(ATTNFAST_NAME) window_left, window_right, windows);
}

}  // namespace attnfast::bindings

#pragma GCC diagnostic pop
