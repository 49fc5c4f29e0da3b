// Decoding, of one head dim, ATTNFAST_HEAD_DIM: few queries over many keys, which blocks and,
// within a block, warps share out (Flash-Decoding); decode_combine.cu puts the parts together.
//   s = scale * q k^T    m = max s    l = sum of exp(s - m)    partial = sum of exp(s - m) v
// Grid:   (batch entry, key head, block of kRows queries, split of the keys); the queries of all
//         heads that share a key head lie in one tile: row = head * T + t
// Memory: q, one tile of k and one of v in shared memory, v arriving during q k^T; each warp has a
//         quarter of the tile's keys, and m, l and acc of its own in registers, which the warps
//         then add up by way of shared memory
// Limits: D and D_v up to ATTNFAST_HEAD_DIM; bf16, fp16
// Scores: made here and not by scores.h, whose tiles belong to one head: here each row has its own
#include "arguments.h"
#include "decode_rows.h"
#include "decode_shape.h"
#include "launch.h"
#include "scores.h"

namespace attnfast::cuda {

template <class Element, int kD, bool kSmall>
ATTNFAST_KERNEL ATTNFAST_LAUNCH_BOUNDS((DecodeShape<kD, kSmall>::kThreads), 1)
    attention_decode_kernel(ATTNFAST_PARAMS DecodeArguments a) {
  using Shape = DecodeShape<kD, kSmall>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kThreads = Shape::kThreads;
  constexpr int kN = Shape::kOwnKeys / 8;
  if (!has_code<Element, Shape::kOnTuring, !kSmall>()) return;
  const DecodeParams& p = a.p;

  // Setup
  int64_t index = block_index();
  const int64_t split = index % a.splits;
  index /= a.splits;
  const int row_block = static_cast<int>(index % a.row_blocks) * kRows;
  index /= a.row_blocks;
  const int h_kv = static_cast<int>(index % p.H_kv), b = static_cast<int>(index / p.H_kv);
  const int T = static_cast<int>(p.T), group = static_cast<int>(p.H / p.H_kv);
  const int length = min_of(max_of(load_global(p.cache_seqlens + b), 0), static_cast<int>(p.S));
  const int64_t part = keys_per_split(length), first = split * part;
  if (first >= length) return;
  const int shift = length - T;  // query t stands at t + shift
  int64_t left = p.window_left;
  if (p.windows) {  // the farthest of these rows' heads
    const int last_row = min_of(row_block + kRows, group * T) - 1;
    for (int h = row_block / T, first_h = h; h <= last_row / T; ++h) {
      const int64_t own = load_global(p.windows + 2 * (h_kv * group + h));
      left = h == first_h ? own : left < 0 || own < 0 ? -1 : max_of(left, own);
    }
  }
  const int reach_begin = left < 0 ? 0 : static_cast<int>(max_of<int64_t>(shift - left, 0));
  const int key_begin = max_of(static_cast<int>(first), reach_begin / kKeys * kKeys);
  const int key_end = static_cast<int>(min_of<int64_t>(first + part, length));
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;

  const uint32_t q_tile = shared_memory(), k_tile = q_tile + kRows * kD * 2;
  const uint32_t v_tile = k_tile + kKeys * kD * 2, own = warp * Shape::kOwnKeys * kD * 2;
  const PackedQueries<Element> q{
      static_cast<const Element*>(p.q.data) + b * p.q.b + h_kv * group * p.q.h,
      p.q.h,
      p.q.t,
      T,
      group * T,
      static_cast<int>(p.D),
      a.q_aligned};
  const auto k = cached<Element>(p, p.k, b, h_kv, reach_begin, length, p.D, a.k_aligned);
  const auto v = cached<Element>(p, p.v, b, h_kv, reach_begin, length, p.D_v, a.v_aligned);

  const Scaling& units = a.units;
  int t[2];          // of the lane's two rows
  int row_begin[2];  // the first keys that they attend
  float slope[2] = {};
  int64_t bias_at[2], mask_at[2];
  ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = min_of(row_block + r * 8 + lane / 4, group * T - 1);
    const int h = h_kv * group + row / T;
    t[r] = row % T;
    const int64_t reach = p.windows ? load_global(p.windows + 2 * h) : p.window_left;
    row_begin[r] = reach < 0 ? 0 : static_cast<int>(max_of<int64_t>(t[r] + shift - reach, 0));
    if (p.alibi_slopes) {
      slope[r] = units.natural * load_global(p.alibi_slopes + b * p.alibi_stride_b + h);
    }
    bias_at[r] = b * p.bias.b + h * p.bias.h + t[r] * p.bias.t;
    mask_at[r] = b * p.mask.b + h * p.mask.h + t[r] * p.mask.t;
  }

  const auto* mask = static_cast<const uint8_t*>(p.mask.data);
  float acc[1][kD / 8][4] = {}, m[2] = {-kInfinity, -kInfinity}, l[2] = {};

  // Load q, and the first k
  if (key_begin < key_end) {
    load_tile<kD, kRows, kThreads, true>(q_tile, q, row_block);
    load_tile<kD, kKeys, kThreads, true>(k_tile, k, key_begin);
  }
  commit_copies();

  // Keys, tile by tile
  for (int tile = key_begin; tile < key_end; tile += kKeys) {
    wait_copies<0>();
    sync_block();  // q and k are here, and no warp reads v any more
    load_tile<kD, kKeys, kThreads, true>(v_tile, v, tile);
    commit_copies();

    // Scores
    const int s0 = tile + warp * Shape::kOwnKeys;  // the warp's first key
    float s[1][kN][4] = {};
    multiply_rows_by_rows<Element, kD>(s, q_tile, k_tile + own, lane);
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
    const uint32_t live = p.bias.data || p.mask.data ? live_columns(s) : ~0u;

    wait_copies<0>();
    sync_block();  // v is here, and no warp reads k any more
    if (tile + kKeys < key_end) load_tile<kD, kKeys, kThreads, true>(k_tile, k, tile + kKeys);
    commit_copies();

    // Softmax
    ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
      float top = m[r];
      ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
        top = fmaxf(top, fmaxf(s[0][n][2 * r], s[0][n][2 * r + 1]));
      }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float base = top == -kInfinity ? 0.0f : top;
      const float rescale = exp2_fast((m[r] - base) * units.to_log2);
      m[r] = top, l[r] *= rescale;
      ATTNFAST_UNROLL for (int n = 0; n < kD / 8; ++n) {
        acc[0][n][2 * r] *= rescale, acc[0][n][2 * r + 1] *= rescale;
      }
      ATTNFAST_UNROLL for (int n = 0; n < kN; ++n) {
        ATTNFAST_UNROLL for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[0][n][e] = exp2_fast((s[0][n][e] - base) * units.to_log2);
          l[r] += s[0][n][e];
        }
      }
    }
    // Output
    add_registers_times_rows<Element, kD, true>(acc, s, v_tile + own, live, lane);
  }

  // Store: the warps' sums, [warp][row][kD] in the place of k and v, [warp][row] in that of q
  sync_block();  // no warp reads the tiles any more
  const auto place_of = [&](int w, int row, int pair) {
    constexpr int kGroups = kD % 64 ? 3 : 7;  // so that rows fall into different banks
    return k_tile + ((w * kRows + row) * kD + (pair ^ (row & kGroups) * 4) * 2) * 4;
  };
  ATTNFAST_UNROLL for (int r = 0; r < 2; ++r) {
    l[r] += shuffle_xor(l[r], 1);
    l[r] += shuffle_xor(l[r], 2);
    const int row = r * 8 + lane / 4;
    if (lane % 4 == 0) store_shared(q_tile + (warp * kRows + row) * 8, Floats2{m[r], l[r]});
    ATTNFAST_UNROLL for (int n = 0; n < kD / 8; ++n) {
      store_shared(place_of(warp, row, n * 4 + lane % 4),
                   Floats2{acc[0][n][2 * r], acc[0][n][2 * r + 1]});
    }
  }
  sync_block();
  for (int i = thread_index(); i < kRows * kD / 2; i += kThreads) {
    const int row = i / (kD / 2), column = i % (kD / 2) * 2, packed = row_block + row;
    if (packed >= group * T) break;
    Floats2 of[Shape::kWarps], total{0.0f, 0.0f};
    float top = -kInfinity, l_all = 0.0f;
    ATTNFAST_UNROLL for (int w = 0; w < Shape::kWarps; ++w) {
      of[w] = load_shared<Floats2>(q_tile + (w * kRows + row) * 8);
      top = fmaxf(top, of[w].x);
    }
    const float base = top == -kInfinity ? 0.0f : top;
    ATTNFAST_UNROLL for (int w = 0; w < Shape::kWarps; ++w) {
      const float rescale = exp2_fast((of[w].x - base) * units.to_log2);
      const auto x = load_shared<Floats2>(place_of(w, row, column / 2));
      l_all += rescale * of[w].y, total.x += rescale * x.x, total.y += rescale * x.y;
    }
    const int64_t rows = p.B * p.H * T;
    const int64_t at = split * rows + (b * p.H + h_kv * group + packed / T) * T + packed % T;
    if (column == 0) store_global(a.softmax + at, Floats2{top, l_all});
    if (column < p.D_v) store_global(a.partial + at * p.D_v + column, total.x);
    if (column + 1 < p.D_v) store_global(a.partial + at * p.D_v + column + 1, total.y);
  }
}

namespace {

template <class Element, bool kSmall = false>
void run(const DecodeArguments& arguments, Stream stream) {
  using Shape = DecodeShape<ATTNFAST_HEAD_DIM, kSmall>;
  if constexpr (!Shape::kOnTuring && std::is_same_v<Element, Float16>) {
    if (on_turing(stream)) return run<Element, true>(arguments, stream);
  }
  DecodeArguments a = arguments;
  a.row_blocks = (a.p.H / a.p.H_kv * a.p.T + Shape::kRows - 1) / Shape::kRows;
  launch<DecodeArguments>(kernel_name<Element, ATTNFAST_HEAD_DIM, false>("attention_decode"),
                          attention_decode_kernel<Element, ATTNFAST_HEAD_DIM, kSmall>,
                          a.p.B * a.p.H_kv * a.row_blocks * a.splits, Shape::kThreads,
                          Shape::kSharedBytes, stream, a);
}

}  // namespace

template <>
void run_attention_decode<ATTNFAST_HEAD_DIM>(const DecodeArguments& a, Stream stream) {
  a.p.q.dtype == DType::kFloat16 ? run<Float16>(a, stream) : run<BFloat16>(a, stream);
}

}  // namespace attnfast::cuda
