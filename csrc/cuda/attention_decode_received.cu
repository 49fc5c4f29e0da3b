// What each key of a cache receives, of one head dim, ATTNFAST_HEAD_DIM: a second pass over the
// scores of decoding, after attention_decode.cu.
//   received      sum over a head's queries of p = exp(s - m) / l
// Grid:   (batch entry, key head, block of keys); the queries of all heads that share a key head
//         pass in tiles of kRows, row = head * T + t, and are added up one by one
// Memory: one tile of k and one of q in shared memory, a quarter of the keys for each warp; its p in
//         the place of v; m and l from the splits' own
// Limits: D and D_v up to ATTNFAST_HEAD_DIM; bf16, fp16
#include "arguments.h"
#include "decode_rows.h"
#include "decode_shape.h"
#include "launch.h"
#include "scores.h"

namespace attnfast::cuda {
namespace {

// A lane's two rows of 16 packed queries from row_block on, and what changes their scores: as
// attention_decode.cu has it, whose code is up to 40 instructions longer if it takes this from here.
struct DecodeScores {
  int t[2];
  int row_begin[2];  // the first keys that they attend
  float slope[2] = {};
  int64_t bias_at[2], mask_at[2];

  ATTNFAST_DEVICE DecodeScores(const DecodeArguments& a, int b, int h_kv, int row_block, int shift,
                               int lane) {
    const DecodeParams& p = a.p;
    const int T = static_cast<int>(p.T), group = static_cast<int>(p.H / p.H_kv);
    ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
      const int row = min_of(row_block + r * 8 + lane / 4, group * T - 1);
      const int h = h_kv * group + row / T;
      t[r] = row % T;
      const int64_t reach = p.windows ? load_global(p.windows + 2 * h) : p.window_left;
      row_begin[r] = reach < 0 ? 0 : static_cast<int>(max_of<int64_t>(t[r] + shift - reach, 0));
      if (p.alibi_slopes) {
        slope[r] = a.units.natural * load_global(p.alibi_slopes + b * p.alibi_stride_b + h);
      }
      bias_at[r] = b * p.bias.b + h * p.bias.h + t[r] * p.bias.t;
      mask_at[r] = b * p.mask.b + h * p.mask.h + t[r] * p.mask.t;
    }
  }

  // Products q k^T with the keys from s0 on to scores, -inf where a query may not attend.
  template <int kN>
  ATTNFAST_DEVICE void apply(float (&s)[1][kN][4], const DecodeArguments& a, int s0, int key_end,
                             int length, int shift, int lane) const {
    const DecodeParams& p = a.p;
    const Scaling& units = a.units;
    const auto* mask = static_cast<const uint8_t*>(p.mask.data);
    ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
      ATTNFAST_UNROLL for (int e = 0; e < 4; ++e) {
        const int r = e / 2, key = s0 + n * 8 + lane % 4 * 2 + e % 2, ahead = key - t[r] - shift;
        float x = s[0][n][e] * units.factor;
        if (units.softcap > 0.0f) x = units.softcap * tanhf(x * units.uncap);
        x -= slope[r] * fabsf(static_cast<float>(ahead));
        const bool out_of_reach =
            p.mask.data ? key >= shift && key < length &&
                              !load_global(mask + mask_at[r] + (key - shift) * p.mask.d)
                        : ahead > 0;
        if (key >= key_end || out_of_reach || key < row_begin[r]) {
          x = -kInfinity;
        } else if (p.bias.data) {
          const float addend = load_addend(p.bias, bias_at[r] + key * p.bias.d);
          x = addend == -kInfinity ? addend : fmaf(addend, units.natural, x);
        }
        s[0][n][e] = x;
      }
    }
  }
};

// A row's softmax, of all splits and the sink: four lanes have the same row.
struct RowSoftmax {
  float base, factor;  // exp(s - base) * factor

  ATTNFAST_DEVICE RowSoftmax(const DecodeArguments& a, int64_t row, int h, int64_t splits,
                             int lane) {
    const int64_t rows = a.p.B * a.p.H * a.p.T;
    const float to_log2 = a.units.to_log2;
    const float sink = a.p.sinks ? a.units.natural * load_global(a.p.sinks + h) : -kInfinity;
    float top = sink, l = 0.0f;
    for (int64_t i = lane % 4; i < splits; i += 4) {
      top = fmaxf(top, load_global(a.softmax + i * rows + row).x);
    }
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    base = top == -kInfinity ? 0.0f : top;
    for (int64_t i = lane % 4; i < splits; i += 4) {
      const Floats2 of = load_global(a.softmax + i * rows + row);
      l += exp2_fast((of.x - base) * to_log2) * of.y;
    }
    l += shuffle_xor(l, 1);
    l += shuffle_xor(l, 2);
    if (a.p.sinks) l += exp2_fast((sink - base) * to_log2);
    factor = l == 0.0f ? 0.0f : 1.0f / l;
  }
};

}  // namespace

template <class Element, int kD, bool kSmall>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((DecodeShape<kD, kSmall>::kThreads), 1)
    attention_decode_received_kernel(ATTNFAST_PARAMS DecodeArguments a) {
  using Shape = DecodeShape<kD, kSmall>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kThreads = Shape::kThreads;
  constexpr int kOwn = Shape::kOwnKeys;
  if (!has_code<Element, Shape::kOnTuring, !kSmall>()) return;
  const DecodeParams& p = a.p;

  // Setup
  const int64_t key_blocks = (p.S + kKeys - 1) / kKeys, index = block_index() / key_blocks;
  const int h_kv = static_cast<int>(index % p.H_kv), b = static_cast<int>(index / p.H_kv);
  const int T = static_cast<int>(p.T), group = static_cast<int>(p.H / p.H_kv);
  const int length = min_of(max_of(load_global(p.cache_seqlens + b), 0), static_cast<int>(p.S));
  const int shift = length - T;  // query t stands at t + shift
  const int64_t splits = min_of(splits_of(length), a.splits);
  int64_t left = p.windows ? 0 : p.window_left;
  for (int h = h_kv * group; p.windows && h < (h_kv + 1) * group && left >= 0; ++h) {
    const int64_t own = load_global(p.windows + 2 * h);
    left = own < 0 ? -1 : max_of(left, own);
  }
  const int begin = left < 0 ? 0 : static_cast<int>(max_of<int64_t>(shift - left, 0));
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int first = static_cast<int>(block_index() % key_blocks) * kKeys, s0 = first + warp * kOwn;

  const uint32_t q_tile = shared_memory(), k_tile = q_tile + kRows * kD * 2;
  const uint32_t own_k = k_tile + warp * kOwn * kD * 2;
  const uint32_t own_p = k_tile + kKeys * kD * 2 + warp * kRows * kOwn * 4;
  const PackedQueries<Element> q{
      static_cast<const Element*>(p.q.data) + b * p.q.b + h_kv * group * p.q.h,
      p.q.h,
      p.q.t,
      T,
      group * T,
      static_cast<int>(p.D),
      a.q_aligned};
  const auto k = cached<Element>(p, p.k, b, h_kv, begin, length, p.D, a.k_aligned);
  load_tile<kD, kKeys, kThreads, true>(k_tile, k, first);

  // Rows, tile by tile; a lane adds up one key's
  float sum = 0.0f;
  for (int row_block = 0; row_block < group * T; row_block += kRows) {
    sync_block();  // no warp reads q any more
    load_tile<kD, kRows, kThreads, true>(q_tile, q, row_block);
    commit_copies();
    const DecodeScores scores(a, b, h_kv, row_block, shift, lane);
    wait_copies<0>();
    sync_block();

    // Scores
    float s[1][kOwn / 8][4] = {};
    multiply_rows_by_rows<Element, kD>(s, q_tile, own_k, lane);
    scores.apply(s, a, s0, length, length, shift, lane);

    // Probabilities
    ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
      const int tile_row = r * 8 + lane / 4, row = min_of(row_block + tile_row, group * T - 1);
      const int h = h_kv * group + row / T;
      const RowSoftmax softmax(a, (b * p.H + h) * T + row % T, h, splits, lane);
      ATTNFAST_UNROLL for (int n = 0; n < kOwn / 8; ++n) {
        const auto of = [&](float x) {
          return exp2_fast((x - softmax.base) * a.units.to_log2) * softmax.factor;
        };
        store_shared(own_p + (tile_row * kOwn + n * 8 + lane % 4 * 2) * 4,
                     Floats2{of(s[0][n][2 * r]), of(s[0][n][2 * r + 1])});
      }
    }
    sync_warp();

    // Store: each head after its last row
    const int key = s0 + lane, rows = min_of(kRows, group * T - row_block);
    for (int r = 0; r < rows && lane < kOwn && key < p.S; ++r) {
      sum += load_shared<float>(own_p + (r * kOwn + lane) * 4);
      if ((row_block + r + 1) % T) continue;
      const int64_t head = b * p.H + h_kv * group + (row_block + r) / T;
      store_global(p.received + head * p.S + key, key < length ? sum : 0.0f);
      sum = 0.0f;
    }
  }
}

namespace {

template <class Element, bool kSmall = false>
void run(const DecodeArguments& a, Stream stream) {
  using Shape = DecodeShape<ATTNFAST_HEAD_DIM, kSmall>;
  static_assert(Shape::kRows * 4 <= ATTNFAST_HEAD_DIM * 2, "probabilities take the place of v");
  if constexpr (!Shape::kOnTuring && std::is_same_v<Element, Float16>) {
    if (on_turing(stream)) return run<Element, true>(a, stream);
  }
  launch<DecodeArguments>(
      kernel_name<Element, ATTNFAST_HEAD_DIM, false>("attention_decode_received"),
      attention_decode_received_kernel<Element, ATTNFAST_HEAD_DIM, kSmall>,
      a.p.B * a.p.H_kv * ((a.p.S + Shape::kKeys - 1) / Shape::kKeys), Shape::kThreads,
      Shape::kSharedBytes, stream, a);
}

}  // namespace

template <>
void run_attention_decode_received<ATTNFAST_HEAD_DIM>(const DecodeArguments& a, Stream stream) {
  a.p.q.dtype == DType::kFloat16 ? run<Float16>(a, stream) : run<BFloat16>(a, stream);
}

}  // namespace attnfast::cuda
