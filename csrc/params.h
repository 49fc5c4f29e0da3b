// The plain structs that every native kernel takes: pointers, sizes, strides, options. No torch
// here.
//
// Strides count elements. A stride of zero broadcasts. Sizes: B batch, H query heads, H_kv key
// heads, T queries, S keys, D head dim of q and k, D_v head dim of v.
#pragma once
#include <cstdint>

namespace attnfast {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kBool, kFloat64 };

// A read-only (B, H, rows, columns) tensor; data is null where the call has no such tensor.
struct View {
  const void* data = nullptr;
  int64_t b = 0, h = 0, t = 0, d = 0;
  DType dtype = DType::kFloat32;
};

// The same, writable.
struct MutableView {
  void* data = nullptr;
  int64_t b = 0, h = 0, t = 0, d = 0;
  DType dtype = DType::kFloat32;
};

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The units in which a kernel has scores: each backend chooses them (cpu/head.h, cuda/arguments.h).
struct Units {
  float natural = 1.0f;  // units of 1 in natural logarithms: of what is added to scores
  float factor = 1.0f;   // units of 1 in a product q k^T
  float to_log2 = kLog2E, to_natural = 1.0f;  // from units

  // Units of which natural logarithms have `per_natural`.
  void choose(float per_natural) {
    natural = per_natural, to_log2 = kLog2E / per_natural, to_natural = 1.0f / per_natural;
  }
  // Scores stay products: the factor waits for the exponent.
  void keep_products() {
    to_log2 *= factor, to_natural *= factor;
    factor = 1.0f;
  }
};

enum class Weights : int32_t { kNone, kMean, kPerHead };

// The scratch of a CPU kernel that is only asked for it: bytes held, and the most at any time.
struct Footprint {
  int64_t held = 0, most = 0;
};

// The numbers that change a score alone, by name and by what leaves scores as they are, in the order
// of attnfast/call.py: members here, arguments of the operators in csrc/bindings.
#define ATTNFAST_SCORE_OPTIONS(each) each(scale, 1.0f) each(softcap, 0.0f)

// All that changes scores but tensors of their size and causality.
struct ScoreOptions {
#define ATTNFAST_MEMBER(name, absent) float name = absent;
  ATTNFAST_SCORE_OPTIONS(ATTNFAST_MEMBER)
#undef ATTNFAST_MEMBER
  int64_t window_left = -1;             // -1: unbounded
  int64_t window_right = -1;            // -1: unbounded
  const int32_t* windows = nullptr;     // [H][2], likewise: of each head, in place of these
  const float* alibi_slopes = nullptr;  // [B|1, H]
  int64_t alibi_stride_b = 0;
  const float* sinks = nullptr;  // [H] fp32, natural log units
};

// A bool mask in blocks of queries and keys: empty, full, or with bits.
struct BlockMask {
  // Where a line's entries begin and, in the next element, end: rows first, columns from
  // column_starts on. Null where the call has no such mask.
  const int32_t* starts = nullptr;
  int64_t b = 0, h = 0, column_starts = 0;          // strides of starts; 0 where all share it
  const int32_t *keys = nullptr, *slots = nullptr;  // of rows' entries; a slot of -1: full
  const int32_t *queries = nullptr, *column_slots = nullptr;  // of columns' entries
  const int32_t* bits = nullptr;  // [slots][size][size / 32]; full blocks have no slot, -1
  int64_t size = 0;               // queries and keys of a block
};

// What forward, backward and the second passes have in common.
struct AttentionParams : ScoreOptions {
  int64_t B, H, H_kv, T, S, D, D_v;  // varlen: B sequences, T and S the longest of them

  View q;     // (B, H, T, D)
  View k;     // (B, H_kv, S, D)
  View v;     // (B, H_kv, S, D_v)
  View mask;  // (B|1, H|1, T|1, S|1) bool, true = attend
  View bias;  // (B|1, H|1, T|1, S|1) float, added to the scaled scores
  BlockMask blocks;

  // t' = t + align: an offset for all, or one per batch entry; bottom_right adds S_b - T_b.
  const int32_t* align_per_batch = nullptr;  // [B]
  int64_t align_offset = 0;
  bool align_bottom_right = false;

  // varlen: rows of sequence b are cu_seqlens[b] .. cu_seqlens[b + 1]; q.b, k.b, v.b are then zero.
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1]
  const int32_t* cu_seqlens_k = nullptr;  // [B + 1]

  // Lists of the only keys that queries attend, -1 for none; within -1 .. S - 1.
  const int32_t* indices = nullptr;  // [B, index_heads, T, K]
  int64_t index_heads = 0, K = 0;    // index_heads: 1 or H_kv; 0: there are no lists
  bool has_lists() const { return index_heads > 0; }

  bool causal = false;

  double dropout_p = 0.0;
  uint64_t dropout_seed = 0;
  uint64_t dropout_offset = 0;
  // Where the call stands in one of more heads and rows, whose mask it has a part of (CPU only).
  int64_t dropout_heads = 0, dropout_head = 0, dropout_query = 0, dropout_key = 0;

  int num_threads = 1;
  bool (*interrupted)() = nullptr;  // asked by the calling thread: whether to end; null: never
  Footprint* footprint = nullptr;   // given: nothing is computed, scratch is only counted
};

struct ForwardParams : AttentionParams {
  MutableView out;  // (B, H, T, D_v), the dtype of q

  // fp32 rows of length lse_stride_h per head: (B, H, T); varlen (1, H, total_q)
  float* lse = nullptr;
  float* norm =
      nullptr;  // two planes laid out like lse: a row's maximum m, and log2 l (docs/math.md)
  int64_t norm_plane = 0;
  float* max_logit = nullptr;  // null unless statistics are wanted; laid out like lse
  float* entropy = nullptr;
  float* reach = nullptr;
  float* focus = nullptr;
  int64_t lse_stride_b = 0, lse_stride_h = 0;

  float* received = nullptr;  // (B, H, S); varlen (1, H, total_k)
  int64_t received_stride_b = 0, received_stride_h = 0;

  Weights weights_mode = Weights::kNone;
  MutableView weights;  // (B, H, T, S), or (B, T, S) with h = 0; after dropout; the dtype of q
};

enum class Pooling : int32_t { kMean, kLargest, kByDistance };

// Probabilities in cells: see Pooling in attnfast/call.py.
struct PooledParams : AttentionParams {
  const float* norm = nullptr;  // two planes of the forward's
  int64_t norm_plane = 0, lse_stride_b = 0, lse_stride_h = 0;
  const int32_t* tokens_q = nullptr;  // [B, T], or of all sequences' queries; null: none
  const int32_t* tokens_k = nullptr;  // [B, S], likewise
  Pooling kind = Pooling::kMean;
  int64_t rows = 1, columns = 1;
  float* pooled = nullptr;  // [B, H, rows, columns]
};

struct BackwardParams : AttentionParams {
  View out;                     // (B, H, T, D_v)
  View grad_out;                // (B, H, T, D_v)
  const float* norm = nullptr;  // two planes of the forward's; with norm_plane 0, lse (CPU only)
  int64_t norm_plane = 0;
  bool norm_of_more = false;            // than these keys: m and l are not to be found anew
  const float* grad_lse = nullptr;      // null: zero; laid out like a plane of norm
  const float* entropy = nullptr;       // given with grad_entropy
  const float* grad_entropy = nullptr;  // null: zero
  int64_t lse_stride_b = 0, lse_stride_h = 0;

  Weights weights_mode = Weights::kNone;
  View grad_weights;  // (B, H, T, S); for the mean (B, T, S) with h = 0, divided by H here

  MutableView dq, dk, dv;   // the dtypes of q, k, v
  MutableView dbias;        // null unless wanted; the shape of bias, stride 0 where reduced
  float* dsinks = nullptr;  // [H], null unless wanted
};

// Few queries against a cache: query t of batch b stands at cache_seqlens[b] - T + t.
struct DecodeParams : ScoreOptions {
  int64_t B, H, H_kv, T, S, D, D_v;  // S: the capacity of the cache (pages * page size when paged)
  View q;                            // (B, H, T, D)
  View k, v;  // (B, H_kv, S, D|D_v); paged: b is the page's stride, t the row's
  View bias;  // (B|1, H|1, T|1, S|1)
  View
      mask;  // (B|1, H|1, T|1, T|1) bool: which of the last T keys are attended, not those up to t'
  const int32_t* cache_seqlens = nullptr;  // [B]
  const int32_t* page_table = nullptr;     // [B, pages_per_sequence]; null: contiguous
  int64_t page_size = 0, pages_per_sequence = 0, num_pages = 0;
  MutableView out;            // (B, H, T, D_v)
  float* lse = nullptr;       // (B, H, T)
  float* norm = nullptr;      // (2, B, H, T), null unless wanted
  float* received = nullptr;  // (B, H, S), null unless wanted
  int num_threads = 1;
  bool (*interrupted)() = nullptr;  // asked by the calling thread: whether to end; null: never
  Footprint* footprint = nullptr;   // given: nothing is computed, scratch is only counted
};

}  // namespace attnfast
