// The tiles of decoding: rows of queries against blocks of keys, which lie along the lanes.
//
// With few queries a tile of scores.h, whose lanes are queries, would be nearly empty. Scores here
// are [row][key]; a row's options are constants of its pass over a block, its positions a range of
// keys, and its bias one stretch of memory. What the two share is Scaling.
#pragma once
#include <type_traits>

#include "blocks.h"
#include "scores.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr Index kMaxRows = 32;           // query rows of one item
constexpr Index kMaxBlock = 128;         // keys whose scores are held at once
constexpr Index kBlockBytes = 16 << 10;  // of k or v rows in one block: half of a first-level cache
constexpr Index kMinPiece = 512;         // keys of one item
constexpr Index kMaxPieces = 64;         // items that a sequence's keys are cut into
// Rows of o times vectors of it that stay in registers, of which there are 32 with 16 lanes.
constexpr int kValueRows = 4, kValueVecs = kLanes == 16 ? 4 : 2;
// Whether products are on pairs of bf16: of a row's elements with q, and of two keys' with p.
template <class Element>
constexpr bool kOnPairs = kFastPairs && std::is_same_v<Element, BFloat16>;
// Otherwise bf16 is read in pairs and computed in fp32, the even elements apart from the odd ones:
// a shift and a mask for two vectors. Rows of q and o have them apart too.
template <class Element>
constexpr int kParts = !kOnPairs<Element> && std::is_same_v<Element, BFloat16> ? 2 : 1;
template <class Element>
constexpr Index kValueStep = kParts<Element> * kLanes;  // elements of v that are read at once
template <class Element>
constexpr Index kRowStep = kOnPairs<Element> ? 2 * kLanes : kValueStep<Element>;  // of k

// The keys of one batch entry that any of its queries attends to, and how they are cut.
struct Sequence {
  Index length, begin, piece, pieces;

  Sequence(const DecodeParams& p, Index b) : length(p.cache_seqlens[b]), begin(0) {
    if (p.window_left >= 0) begin = max_of(length - p.T - p.window_left, 0);
    const Index keys = max_of(length - begin, 0);
    piece = max_of(round_up((keys + kMaxPieces - 1) / kMaxPieces, kLanes), kMinPiece);
    pieces = (keys + piece - 1) / piece;
  }
};

// A row of D elements is read as `padded / step` vectors; the last one ends with the row and so
// overlaps the one before. Rows shorter than a vector are copied and padded first.
struct RowShape {
  Index D, step, padded, last;

  explicit RowShape(Index d, Index step = kLanes)
      : D(d), step(step), padded(max_of(round_up(d, step), step)), last(max_of(d - step, 0)) {}
  Index at(Index i) const { return min_of(i, last); }  // where the vector i .. i + step - 1 starts
};

// Where element i of a row of q or o lies.
template <class Element>
constexpr Index place(Index i) {
  constexpr Index kStep = kValueStep<Element>, kCount = kParts<Element>;
  return i / kStep * kStep + i % kStep % kCount * kLanes + i % kStep / kCount;
}

ATTNFAST_INLINE Vec load_pairs(const BFloat16* p) {
  Vec pairs;  // at no alignment of fp32
  memcpy(&pairs, p, sizeof pairs);
  return pairs;
}

// The kValueStep elements from p on in fp32, part by part.
template <class Element>
ATTNFAST_INLINE void load_parts(const Element* p, Vec* parts) {
  if constexpr (kParts<Element> == 2) {
    const UVec pairs = bit_cast<UVec>(load_pairs(p));
    parts[0] = bit_cast<Vec>(pairs << 16), parts[1] = bit_cast<Vec>(pairs & 0xffff0000u);
  } else {
    parts[0] = load(p);
  }
}

// The parts as consecutive elements again.
template <class Element>
ATTNFAST_INLINE void join_parts(Vec* parts) {
  if constexpr (kParts<Element> == 2) {
    float rows[2 * kLanes];
    for (Index i = 0; i < kLanes; ++i) rows[2 * i] = parts[0][i], rows[2 * i + 1] = parts[1][i];
    parts[0] = load(rows), parts[1] = load(rows + kLanes);
  }
}

// One query row of an item and what it may attend to.
struct Row {
  Index h, t, position;
  Index begin, end;   // keys
  Index masked_from;  // the last T, which a mask decides about
  const bool* mask;   // or null
  float slope;        // ALiBi's, in units; 0: none

  Row() {}  // of rows in an array, filled in one by one
  Row(const DecodeParams& p, const Sequence& sequence, Index b, Index h_kv, Index row,
      float natural) {
    h = h_kv * (p.H / p.H_kv) + row / p.T, t = row % p.T;
    position = sequence.length - p.T + t;
    const Index left = p.windows ? p.windows[2 * h] : p.window_left;
    begin = left < 0 ? 0 : max_of(position - left, 0);
    end = position + 1;
    mask = nullptr, masked_from = 0;
    if (p.mask.data) {
      mask = static_cast<const bool*>(p.mask.data) + b * p.mask.b + h * p.mask.h + t * p.mask.t;
      end = sequence.length, masked_from = sequence.length - p.T;
    }
    slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride_b + h] * natural : 0.0f;
  }
};

// Lane i of the result is the sum of r[i]'s lanes.
ATTNFAST_INLINE Vec sum_each(const Vec* r) {
#if ATTNFAST_LANES == 16
  Vec a[8], b[4], c[2];
  ATTNFAST_UNROLL for (int i = 0; i < 8; ++i) {
    a[i] =
        shuffle<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(r[2 * i], r[2 * i + 1]) +
        shuffle<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(r[2 * i], r[2 * i + 1]);
  }
  ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
    b[i] =
        shuffle<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a[2 * i], a[2 * i + 1]) +
        shuffle<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a[2 * i], a[2 * i + 1]);
  }
  ATTNFAST_UNROLL for (int i = 0; i < 2; ++i) {
    c[i] =
        shuffle<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(b[2 * i], b[2 * i + 1]) +
        shuffle<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(b[2 * i], b[2 * i + 1]);
  }
  return shuffle<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(c[0], c[1]) +
         shuffle<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(c[0], c[1]);
#elif ATTNFAST_LANES == 8
  Vec a[4], b[2];
  ATTNFAST_UNROLL for (int i = 0; i < 4; ++i) {
    a[i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(r[2 * i], r[2 * i + 1]) +
           shuffle<2, 10, 3, 11, 6, 14, 7, 15>(r[2 * i], r[2 * i + 1]);
  }
  ATTNFAST_UNROLL for (int i = 0; i < 2; ++i) {
    b[i] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(a[2 * i], a[2 * i + 1]) +
           shuffle<2, 3, 10, 11, 6, 7, 14, 15>(a[2 * i], a[2 * i + 1]);
  }
  return shuffle<0, 1, 2, 3, 8, 9, 10, 11>(b[0], b[1]) +
         shuffle<4, 5, 6, 7, 12, 13, 14, 15>(b[0], b[1]);
#else
  const Vec a = shuffle<0, 4, 1, 5>(r[0], r[1]) + shuffle<2, 6, 3, 7>(r[0], r[1]);
  const Vec b = shuffle<0, 4, 1, 5>(r[2], r[3]) + shuffle<2, 6, 3, 7>(r[2], r[3]);
  return shuffle<0, 1, 4, 5>(a, b) + shuffle<2, 3, 6, 7>(a, b);
#endif
}

// The k and v rows of consecutive keys; past the last, up to whole vectors, the last again.
template <class Element>
struct KeyBlock {
  Index key = 0, n = 0;
  const Element *k[kMaxBlock], *v[kMaxBlock];
  Element *k_copy, *v_copy;  // [kMaxBlock][step], for rows shorter than a vector

  KeyBlock(Element* k_memory, Element* v_memory) : k_copy(k_memory), v_copy(v_memory) {}

  void move_to(const DecodeParams& p, Index b, Index h_kv, Index first, Index count) {
    key = first, n = count;
    if (n == 0) return;
    find_rows(p, p.k, b, h_kv, p.D, kRowStep<Element>, k_copy, k);
    find_rows(p, p.v, b, h_kv, p.D_v, kValueStep<Element>, v_copy, v);
  }

  // Whether each of its rows has one at its place in the next block.
  bool leads(const KeyBlock& next) const { return n > 0 && next.n >= n; }

 private:
  void find_rows(const DecodeParams& p, const View& view, Index b, Index h_kv, Index D, Index step,
                 Element* copy, const Element** rows) const {
    const Element* head = static_cast<const Element*>(view.data) + h_kv * view.h;
    if (!p.page_table) {
      for (Index i = 0; i < n; ++i) rows[i] = head + b * view.b + (key + i) * view.t;
    } else {
      const int32_t* page = p.page_table + b * p.pages_per_sequence + key / p.page_size;
      Index row = key % p.page_size;
      for (Index i = 0; i < n; ++i, ++row) {
        if (row == p.page_size) row = 0, ++page;
        rows[i] = head + *page * view.b + row * view.t;
      }
    }
    if (D < step) {
      for (Index i = 0; i < n; ++i) {
        Element* to = copy + i * step;
        memset(to, 0, step * sizeof(Element));
        memcpy(to, rows[i], D * sizeof(Element));
        rows[i] = to;
      }
    }
    for (Index i = n; i < round_up(n, kLanes); ++i) rows[i] = rows[n - 1];
  }
};

template <int kCount>
using Count = std::integral_constant<int, kCount>;

// Asks for the cache line of the element at `at` of a row of which all vectors are asked for so.
template <Index kStep, class Element>
ATTNFAST_INLINE void ask(const Element* row, Index at) {
  constexpr Index kLine = 64 / sizeof(Element);
  if (kStep >= kLine || at % kLine == 0) __builtin_prefetch(row + at, 0, 3);
}

// The keys whose rows in `ahead` are asked for.
enum class Asks { kNone, kAll, kEven, kOdd };

// s[row][key] = factor q[row] . k[key] for kRows rows and kLanes keys, kLanes products at a time;
// with vectors of k those at their place in `ahead` are asked for, evenly among the products: a
// burst of requests would wait for one another, and the products for them.
template <int kRows, Asks kAsks, class Element>
ATTNFAST_NOINLINE void dot_rows(const Element* const* k, const Element* const* ahead,
                                const RowShape& shape, const float* q, Index q_row, float factor,
                                float* s) {
  constexpr int kKeys = kLanes / kRows, kAtOnce = kKeys < 4 ? kKeys : 4, kCount = kParts<Element>;
  for (Index j = 0; j < kLanes; j += kKeys) {
    Vec sums[kLanes];
    ATTNFAST_UNROLL for (int i = 0; i < kLanes; ++i) sums[i] = zeros();
    ATTNFAST_UNROLL for (int first = 0; first < kKeys; first += kAtOnce) {
      for (Index d = 0, i = 0; d < shape.padded; d += shape.step, i += kCount * kLanes) {
        const Index at = shape.at(d);
        ATTNFAST_UNROLL for (int key = first; key < first + kAtOnce; ++key) {
          const Element* row_k = k[j + key] + at;
          Vec kv[kCount];
          if constexpr (kOnPairs<Element>) {
            kv[0] = load_pairs(row_k);
          } else {
            load_parts(row_k, kv);
          }
          if (kAsks == Asks::kAll || kAsks == (key % 2 ? Asks::kOdd : Asks::kEven))
            ask<kRowStep<Element>>(ahead[j + key], at);
          ATTNFAST_UNROLL for (int row = 0; row < kRows; ++row) {
            Vec& sum = sums[row * kKeys + key];
            ATTNFAST_UNROLL for (int part = 0; part < kCount; ++part) {
              const Vec qv = load(q + row * q_row + i + part * kLanes);
              sum = kOnPairs<Element> ? multiply_add_pairs(kv[part], qv, sum) : kv[part] * qv + sum;
            }
          }
        }
      }
    }
    float products[kLanes];
    store(products, sum_each(sums) * factor);
    ATTNFAST_UNROLL for (int row = 0; row < kRows; ++row) {
      memcpy(s + row * kMaxBlock + j, products + row * kKeys, kKeys * sizeof(float));
    }
  }
}

// The dot products of all rows with a block's keys, while its values are on their way.
template <class Element>
void dot_block(const KeyBlock<Element>& block, const RowShape& shape, const float* q, Index rows,
               float factor, float* s) {
  const Index q_row = shape.padded / shape.step * kParts<Element> * kLanes;
  for (Index j = 0; j < block.n; j += kLanes) {
    const auto run = [&](auto count, Index row) {
      constexpr int kRows = decltype(count)::value;
      auto dot = dot_rows<kRows, Asks::kNone, Element>;
      if (row == 0) dot = dot_rows<kRows, Asks::kAll, Element>;
      if (row == 0 && rows >= 2 * kRows) dot = dot_rows<kRows, Asks::kEven, Element>;
      if (row == kRows) dot = dot_rows<kRows, Asks::kOdd, Element>;
      dot(block.k + j, block.v + j, shape, q + row * q_row, q_row, factor, s + row * kMaxBlock + j);
    };
    Index row = 0;
    for (; row + 4 <= rows; row += 4) run(Count<4>(), row);
    for (; row + 2 <= rows; row += 2) run(Count<2>(), row);
    for (; row < rows; ++row) run(Count<1>(), row);
  }
}

// s[key] += bias[key], -inf where bias is.
template <class Element>
void add_bias(const char* data, Index offset, Index stride, Index n, float* s) {
  const Element* bias = reinterpret_cast<const Element*>(data) + offset;
  for (Index j = 0; j < n; j += kLanes) {
    const Index width = min_of(n - j, kLanes);
    Vec x = zeros();
    if (stride == 1 && width == kLanes) {
      x = load(bias + j);
    } else {
      for (Index i = 0; i < width; ++i) x[i] = to_float(bias[(j + i) * stride]);
    }
    store(s + j, x == -kInfinity ? x : load(s + j) + x);
  }
}

inline void add_bias(const View& view, Index b, const Row& row, Index key, Index n, float* s) {
  const char* data = static_cast<const char*>(view.data);
  const Index offset = b * view.b + row.h * view.h + row.t * view.t + key * view.d;
  switch (view.dtype) {
    case DType::kFloat64:
      return add_bias<double>(data, offset, view.d, n, s);
    case DType::kBFloat16:
      return add_bias<BFloat16>(data, offset, view.d, n, s);
    case DType::kFloat16:
      return add_bias<Float16>(data, offset, view.d, n, s);
    default:
      return add_bias<float>(data, offset, view.d, n, s);
  }
}

// Dot products become scores: softcap, ALiBi, bias, and -inf where the row may not attend.
inline void edit_scores(const DecodeParams& p, const Scaling& units, Index b, const Row& row,
                        Index key, Index n, float* s) {
  const Index width = round_up(n, kLanes);
  if (p.softcap > 0.0f || units.after) units.finish(width / kLanes, s, nullptr);
  if (row.slope != 0.0f) {
    for (Index j = 0; j < width; j += kLanes) {
      const IVec ahead = lane_numbers() + static_cast<int32_t>(key + j - row.position);
      store(s + j, load(s + j) - abs(__builtin_convertvector(ahead, Vec)) * row.slope);
    }
  }
  if (p.bias.data) add_bias(p.bias, b, row, key, n, s);
  for (Index j = max_of(row.masked_from, key); row.mask && j < key + n; ++j)
    if (!row.mask[(j - row.masked_from) * p.mask.d]) s[j - key] = -kInfinity;
  const int32_t begin = static_cast<int32_t>(max_of(row.begin - key, 0));
  const int32_t end = static_cast<int32_t>(min_of(row.end - key, n));
  if (begin == 0 && end == width) return;
  for (Index j = 0; j < width; j += kLanes) {
    const IVec index = lane_numbers() + static_cast<int32_t>(j);
    store(s + j, ((index >= begin) & (index < end)) ? load(s + j) : broadcast(-kInfinity));
  }
}

// What a row's keys so far, or those of one piece, come to.
struct Partial {
  float* o;  // [padded D_v]
  float* l;  // [kLanes]: sums of p
  float& m;  // running maximum, in units

  Partial(float* slot, const RowShape& v)
      : o(slot), l(slot + v.padded), m(slot[v.padded + kLanes]) {}
  static Index size(const RowShape& v) { return v.padded + 2 * kLanes; }

  void clear(const RowShape& v) {
    memset(o, 0, (v.padded + kLanes) * sizeof(float));
    m = -kInfinity;
  }
};

inline float exp2_of(float x) { return exp2(broadcast(x))[0]; }

// s -> p = exp2(s - m) in place, with m raised to the largest score first.
inline void exponentiate(float to_log2, Index n, const RowShape& v, float* s, Partial partial) {
  const Index width = round_up(n, kLanes);
  Vec top = broadcast(partial.m);
  for (Index j = 0; j < width; j += kLanes) top = max(load(s + j), top);
  if (any(top > partial.m)) {
    const float m = max_lanes(top), rescale = exp2_of((partial.m - m) * to_log2);
    for (Index d = 0; d < v.padded + kLanes; d += kLanes)  // o, and l after it
      store(partial.o + d, load(partial.o + d) * rescale);
    partial.m = m;
  }
  const float base = partial.m == -kInfinity ? 0.0f : partial.m;
  Vec l = load(partial.l);
  for (Index j = 0; j < width; j += kLanes) {
    const Vec depth = load(s + j) - base, p = exp2(depth * to_log2);
    l += p;
    store(s + j, p);
  }
  store(partial.l, l);
}

// o[row] += p[row] v over n keys, for kRows rows and kVecs vectors from element d on; `ahead` as in
// dot_rows.
template <int kRows, int kVecs, bool kAhead, class Element>
ATTNFAST_NOINLINE void add_value_tile(const Element* const* v, const Element* const* ahead, Index n,
                                      const RowShape& shape, Index d, const float* p, float* o,
                                      Index o_stride) {
  constexpr int kCount = kParts<Element>, kReads = kVecs / kCount;
  Vec sums[kRows][kVecs];
  Index at[kReads];
  ATTNFAST_UNROLL for (int i = 0; i < kReads; ++i) at[i] = shape.at(d + i * kCount * kLanes);
  ATTNFAST_UNROLL for (int i = 0; i < kVecs; ++i) {
    ATTNFAST_UNROLL for (int row = 0; row < kRows; ++row) sums[row][i] =
        load(o + row * o_stride + d + i * kLanes);
  }
  const auto add = [&](const auto& value_of, const auto& weight_of) {
    Vec value[kVecs];
    ATTNFAST_UNROLL for (int i = 0; i < kReads; ++i) value_of(at[i], value + i * kCount);
    ATTNFAST_UNROLL for (int row = 0; row < kRows; ++row) {
      const Vec weight = weight_of(p + row * kMaxBlock);
      ATTNFAST_UNROLL for (int i = 0; i < kVecs; ++i) {
        Vec& sum = sums[row][i];
        sum =
            kOnPairs<Element> ? multiply_add_pairs(value[i], weight, sum) : weight * value[i] + sum;
      }
    }
  };
  const auto ask_for = [&](Index j) {
    ATTNFAST_UNROLL for (int i = 0; kAhead && i < kReads; ++i)
        ask<kValueStep<Element>>(ahead[j], at[i]);
  };
  if constexpr (kOnPairs<Element>) {
    static const BFloat16 none[kLanes] = {};  // no key twice: 0 * Inf would be NaN
    for (Index j = 0; j < n; j += 2) {
      const bool both = j + 1 < n;
      ask_for(j);
      if (both) ask_for(j + 1);
      add([&](Index d, Vec* x) { *x = pairs_of_rows(v[j] + d, both ? v[j + 1] + d : none); },
          [&](const float* p) { return broadcast(p[j / 2]); });
    }
  } else {
    for (Index j = 0; j < n; ++j) {
      ask_for(j);
      add([&](Index d, Vec* x) { load_parts(v[j] + d, x); },
          [&](const float* p) { return broadcast(p[j]); });
    }
  }
  ATTNFAST_UNROLL for (int row = 0; row < kRows; ++row) {
    ATTNFAST_UNROLL for (int i = 0; i < kVecs; ++i)
        store(o + row * o_stride + d + i * kLanes, sums[row][i]);
  }
}

// o[row] += p[row] v over the keys of a block, while the next block's keys are on their way. On pairs
// p is left as pairs of keys.
template <class Element>
void add_values(const KeyBlock<Element>& block, const KeyBlock<Element>& next,
                const RowShape& shape, Index rows, float* p, float* o, Index o_stride) {
  if constexpr (kOnPairs<Element>) {
    for (Index row = 0; row < rows; ++row) {
      float* s = p + row * kMaxBlock;
      const Index width = round_up(block.n, kLanes);
      for (Index j = 0; j < width; j += 2 * kLanes) {
        const Vec second = j + kLanes < width ? load(s + j + kLanes) : zeros();
        store(s + j / 2, row_of_bf16(load(s + j), second));
      }
    }
  }
  const auto add_tile = [&](auto asking, auto not_asking, Index row, Index d) {
    const auto add = row == 0 && block.leads(next) ? asking : not_asking;
    add(block.v, next.k, block.n, shape, d, p + row * kMaxBlock, o + row * o_stride, o_stride);
  };
  const auto add_rows = [&](auto count, Index row) {
    constexpr int kRows = decltype(count)::value;
    Index d = 0;
    const auto add_vectors = [&](auto vectors) {
      constexpr int kVecs = decltype(vectors)::value;
      for (; d + kVecs * kLanes <= shape.padded; d += kVecs * kLanes)
        add_tile(add_value_tile<kRows, kVecs, true, Element>,
                 add_value_tile<kRows, kVecs, false, Element>, row, d);
    };
    if (kRows == 1) add_vectors(Count<2 * kValueVecs>());
    add_vectors(Count<kRows == 8 ? 2 : kValueVecs>());
    add_vectors(Count<kParts<Element>>());
  };
  Index row = 0;
  if constexpr (kLanes == 16)
    for (; row + 8 <= rows; row += 8) add_rows(Count<8>(), row);
  for (; row + kValueRows <= rows; row += kValueRows) add_rows(Count<kValueRows>(), row);
  for (; row + 2 <= rows; row += 2) add_rows(Count<2>(), row);
  for (; row < rows; ++row) add_rows(Count<1>(), row);
}

// The same where values that a bias masks are NaN or Inf: 0 * v must not let them out.
template <class Element>
ATTNFAST_NOINLINE void add_attended_values(const KeyBlock<Element>& block, const RowShape& shape,
                                           Index rows, const float* p, float* o, Index o_stride) {
  for (Index row = 0; row < rows; ++row) {
    for (Index j = 0; j < block.n; ++j) {
      const float weight = p[row * kMaxBlock + j];
      if (weight == 0.0f) continue;
      for (Index d = 0; d < shape.padded; d += shape.step) {
        Vec value[kParts<Element>];
        load_parts(block.v[j] + shape.at(d), value);
        for (int i = 0; i < kParts<Element>; ++i) {
          float* out = o + row * o_stride + d + i * kLanes;
          store(out, value[i] * weight + load(out));
        }
      }
    }
  }
}

template <class Element>
bool has_poison(const KeyBlock<Element>& block, const RowShape& shape) {
  for (Index j = 0; j < block.n; ++j) {
    Vec zero = zeros();  // x - x, summed: NaN where any x is NaN or Inf
    for (Index d = 0; d < shape.padded; d += shape.step) {
      Vec x[kParts<Element>];
      load_parts(block.v[j] + shape.at(d), x);
      for (int i = 0; i < kParts<Element>; ++i) zero += x[i] - x[i];
    }
    if (any(zero != 0.0f)) return true;
  }
  return false;
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
