// Attention of a few new queries over a cache, split over the keys (Flash-Decoding, Dao et al.,
// 2023).
//
// Query t stands at cache_seqlens[b] - T + t and attends the keys up to there, or those of the last T
// that a mask lets pass and all before them:
//
//   o = softmax(scale * q k^T, causal, windowed, biased, capped) v
//   lse = logsumexp of the scores    received = sum over the queries of p
//
// Work: one item per (batch entry, key head, at most kMaxRows of the T * H / H_kv query rows that
// share its keys, piece of the keys); then one per query row whose keys are not one piece, to combine
// the pieces in order; then, where column sums are wanted, one per (batch entry, head, some keys).
//
// Memory: per item m, l and o of its rows, where there are several; per thread the item's q, o and
// one block of scores; for column sums all scores. Keys and values are read once, where they lie, and converted in
// registers.
//
// Threads: how keys are cut into pieces depends on the sequence's own length alone, and so do the
// results.
#include <type_traits>
#include <utility>

#include "attention_decode_tiles.h"
#include "kernels.h"
#include "team.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

constexpr Index kSummedKeys = 4096;  // whose column sums are one item

// One thread's memory.
template <class Element>
struct Scratch {
  float* q;                  // [kMaxRows][vectors of a row], on pairs of bf16
  float* s;                  // [kMaxRows][kMaxBlock]
  float* o;                  // [kMaxRows][Partial::size], of keys that are one piece
  Element *k_copy, *v_copy;  // [2][kMaxBlock][kRowStep]
  Worker* worker = nullptr;

  Scratch(Parts& parts, const RowShape& k, const RowShape& v)
      : q(parts.take<float>(kMaxRows * k.padded)),
        s(parts.take<float>(kMaxRows * kMaxBlock)),
        o(parts.take<float>(kMaxRows * Partial::size(v))),
        k_copy(parts.take<Element>(2 * kMaxBlock * kRowStep<Element>)),
        v_copy(parts.take<Element>(2 * kMaxBlock * kRowStep<Element>)) {}
};

template <class Element>
struct Decode {
  const DecodeParams& p;
  const RowShape k_shape, v_shape;
  const Index group_rows;  // query rows that share a key head
  const Index chunks;      // items' worth of them
  const Index block_keys;
  const Scaling units;
  const Blocks pieces;        // of H_kv * chunks heads
  float* partials = nullptr;  // of each sequence [H_kv][group_rows][its pieces][Partial::size]
  Index longest = 0;          // sequence
  float* scores = nullptr;    // for column sums: [B][H][T][longest], of a row's keys in its units
  float* norm = nullptr;      // and m and log2 l: [2][B][H][T]

  explicit Decode(const DecodeParams& params)
      : p(params),
        k_shape(p.D, kRowStep<Element>),
        v_shape(p.D_v, kValueStep<Element>),
        group_rows(p.T * (p.H / p.H_kv)),
        chunks((group_rows + kMaxRows - 1) / kMaxRows),
        block_keys(keys_per_block(p)),
        units(p),
        pieces(p.B, p.H_kv * chunks, [&](Index b) { return Sequence(p, b).pieces; }) {}

  static Index keys_per_block(const DecodeParams& p) {
    const Index fits = kBlockBytes / (max_of(p.D, p.D_v) * Index(sizeof(Element)));
    return min_of(max_of(fits / 16 * 16, 16), kMaxBlock);
  }

  Index partials_size() const {
    return pieces.count() / chunks * group_rows * Partial::size(v_shape);
  }

  float* partial(Index b, Index h_kv, Index row, Index piece) const {
    const Index before = pieces.first_of(b * p.H_kv * chunks) / chunks * group_rows;
    return partials +
           (before + (h_kv * group_rows + row) * pieces.of(b) + piece) * Partial::size(v_shape);
  }

  Index row_of(Index b, Index h, Index t) const { return (b * p.H + h) * p.T + t; }

  // The query row, step by step as RowShape says, each element in one only: times factor and in
  // parts, or as it is on pairs.
  void load_query(Index b, const Row& row, float* q) const {
    const Element* from =
        static_cast<const Element*>(p.q.data) + b * p.q.b + row.h * p.q.h + row.t * p.q.t;
    const Index step = k_shape.step, whole = p.D / step * step;
    if constexpr (kOnPairs<Element>) {
      memcpy(q, from, whole * sizeof(Element));
    } else {
      for (Index d = 0; d < whole; d += step) {
        Vec parts[kParts<Element>];
        load_parts(from + d, parts);
        for (int i = 0; i < kParts<Element>; ++i)
          store(q + d + i * kLanes, parts[i] * units.factor);
      }
    }
    for (Index d = whole; d < k_shape.padded; ++d) {
      const Index begin = d / step * step, i = k_shape.at(begin) + d - begin;
      const bool first = i < p.D && i >= begin;
      if constexpr (kOnPairs<Element>) {
        reinterpret_cast<Element*>(q)[d] = first ? from[i] : Element{};
      } else {
        q[place<Element>(d)] = first ? to_float(from[i]) * units.factor : 0.0f;
      }
    }
  }

  void piece_of_keys(Index b, Index h_kv, Index row0, Index piece,
                     const Scratch<Element>& scratch) const {
    const Sequence sequence(p, b);
    const Index num_rows = min_of(group_rows - row0, kMaxRows);
    Index begin = sequence.begin + piece * sequence.piece;
    const Index end = min_of(begin + sequence.piece, sequence.length);
    const bool one_piece = sequence.pieces == 1;
    const Index o_stride = sequence.pieces * Partial::size(v_shape);
    float* o = one_piece ? scratch.o : partial(b, h_kv, row0, piece);
    Row rows[kMaxRows];
    Index first = end;  // key that any row attends
    for (Index i = 0; i < num_rows; ++i) {
      rows[i] = Row(p, sequence, b, h_kv, row0 + i, units.natural);
      first = min_of(first, rows[i].begin);
      load_query(b, rows[i],
                 scratch.q + i * (k_shape.padded / k_shape.step * kParts<Element> * kLanes));
      Partial(o + i * o_stride, v_shape).clear(v_shape);
    }
    begin += max_of(first - begin, 0) / block_keys * block_keys;
    KeyBlock<Element> even(scratch.k_copy, scratch.v_copy);
    constexpr Index kCopy = kMaxBlock * kRowStep<Element>;
    KeyBlock<Element> odd(scratch.k_copy + kCopy, scratch.v_copy + kCopy);
    KeyBlock<Element>*block = &odd, *next = &even;
    next->move_to(p, b, h_kv, begin, min_of(block_keys, end - begin));
    while (next->n > 0) {
      if (scratch.worker->stops(num_rows * next->n)) return;
      std::swap(block, next);
      const Index key = block->key + block->n;
      next->move_to(p, b, h_kv, key, min_of(block_keys, end - key));
      dot_block(*block, k_shape, scratch.q, num_rows, kOnPairs<Element> ? units.factor : 1.0f,
                scratch.s);
      for (Index i = 0; i < num_rows; ++i) {
        float* s = scratch.s + i * kMaxBlock;
        edit_scores(p, units, b, rows[i], block->key, block->n, s);
        if (scores) {
          memcpy(scores + row_of(b, rows[i].h, rows[i].t) * longest + block->key, s,
                 block->n * sizeof(float));
        }
        exponentiate(units.to_log2, block->n, v_shape, s, Partial(o + i * o_stride, v_shape));
      }
      if ((p.bias.data || p.mask.data || p.windows) && has_poison(*block, v_shape)) {
        add_attended_values(*block, v_shape, num_rows, scratch.s, o, o_stride);
      } else {
        add_values(*block, *next, v_shape, num_rows, scratch.s, o, o_stride);
      }
    }
    for (Index i = 0; one_piece && i < num_rows; ++i) {
      combine(b, rows[i].h, rows[i].t, o + i * o_stride, 1);
    }
  }

  // The pieces of query row h, t, where they were not one.
  void combine_row(Index b, Index h, Index t) const {
    const Index count = pieces.of(b), group = p.H / p.H_kv;
    if (count != 1) combine(b, h, t, partial(b, h / group, h % group * p.T + t, 0), count);
  }

  // One query row's pieces, in order, become its output, lse and norm, in the units of heads.
  void combine(Index b, Index h, Index t, float* first, Index pieces) const {
    const auto piece = [&](Index i) {
      return Partial(first + i * Partial::size(v_shape), v_shape);
    };
    const float sink_natural = p.sinks ? p.sinks[h] : -kInfinity;
    const float sink =
        sink_natural == -kInfinity ? sink_natural : clamp_finite(sink_natural / units.to_natural);
    float m = sink;
    for (Index i = 0; i < pieces; ++i) m = piece(i).m > m ? piece(i).m : m;
    const float base = m == -kInfinity ? 0.0f : m;
    const float l_sink = exp2_of((sink - base) * units.to_log2);
    float rescale[kMaxPieces], l = l_sink;
    for (Index i = 0; i < pieces; ++i) {
      rescale[i] = exp2_of((piece(i).m - base) * units.to_log2);
      l += sum_lanes(load(piece(i).l)) * rescale[i];
    }
    const Index at = row_of(b, h, t);
    const float log2_l = log2(broadcast(l))[0],
                top = m == sink ? sink_natural : m * units.to_natural;
    p.lse[at] = l == 0.0f ? -kInfinity : top + log2_l * kLn2;
    if (p.norm) {
      const float slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride_b + h] : 0.0f;
      const bool edited = p.softcap > 0.0f || units.after || slope != 0.0f || p.bias.data;
      p.norm[at] = units.keeps_products<Element>(edited) ? base / units.factor : base;
      p.norm[p.B * p.H * p.T + at] = l == 0.0f ? kInfinity : log2_l;
    }

    if (norm) norm[at] = base, norm[p.B * p.H * p.T + at] = l == 0.0f ? kInfinity : log2_l;

    const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
    Element* out = static_cast<Element*>(p.out.data) + b * p.out.b + h * p.out.h + t * p.out.t;
    for (Index d = 0; d < p.D_v; d += v_shape.step) {
      Vec o[kParts<Element>] = {};
      for (Index i = 0; i < pieces; ++i) {
        for (int part = 0; part < kParts<Element>; ++part)
          o[part] += load(piece(i).o + d + part * kLanes) * rescale[i];
      }
      join_parts<Element>(o);
      for (int part = 0; part < kParts<Element>; ++part) {
        const Index width = min_of(p.D_v - part * kLanes, kLanes);
        if (width > 0) store_some(out + v_shape.at(d) + part * kLanes, o[part] * inverse, width);
      }
    }
  }

  // received of the keys key0 .. of one head, query by query in their order.
  void sum_keys(Index b, Index h, Index key0) const {
    const Index keys = min_of(p.S - key0, kSummedKeys), group = p.H / p.H_kv;
    float* sums = p.received + (b * p.H + h) * p.S + key0;
    memset(sums, 0, keys * sizeof(float));
    const Sequence sequence(p, b);
    for (Index t = 0; t < p.T; ++t) {
      const Index at = row_of(b, h, t);
      const float m = norm[at], log2_l = norm[p.B * p.H * p.T + at];
      const bool is_nan = log2_l != log2_l;  // at all keys, as softmax would have it
      const Row row(p, sequence, b, h / group, h % group * p.T + t, units.natural);
      const Index begin = max_of(is_nan ? 0 : row.begin, key0);
      const Index end = min_of(is_nan ? sequence.length : row.end, key0 + keys);
      const float* s = scores + at * longest;
      for (Index j = begin; j < end; j += kLanes) {
        const Index n = min_of(end - j, kLanes);
        const Vec x = is_nan ? broadcast(log2_l) : load_some(s + j, n);
        store_some(sums + j - key0,
                   load_some(sums + j - key0, n) + exp2((x - m) * units.to_log2 - log2_l), n);
      }
    }
  }
};

template <class Element>
void decode(const DecodeParams& p) {
  const Index rows = p.B * p.H * p.T;
  if (rows == 0) return;
  Decode<Element> decode(p);
  for (Index b = 0; p.received && b < p.B; ++b)
    decode.longest = max_of(decode.longest, p.cache_seqlens[b]);
  const Arena sums((decode.longest + 2 * (p.received != nullptr)) * rows * sizeof(float),
                   p.footprint);
  if (p.received && !p.footprint) {
    decode.norm = reinterpret_cast<float*>(sums.data());
    decode.scores = decode.norm + 2 * rows;
  }
  const Arena partials(decode.partials_size() * sizeof(float), p.footprint);
  decode.partials = reinterpret_cast<float*>(partials.data());
  const auto prepare = [&](Parts& parts) {
    return Scratch<Element>(parts, decode.k_shape, decode.v_shape);
  };
  const Index items = decode.pieces.count(), threads = usable_threads(p.num_threads);
  const Index chunk = max_of(min_of(items / (threads * 8), 8), 1);
  parallel(p, items, chunk, prepare, [&](Index item, const Scratch<Element>& mine) {
    // Heads before pieces: where the keys of all heads lie side by side, they share pages.
    const Block at = decode.pieces[item];
    const Index i = at.h * at.count + at.index, head = i / decode.chunks;
    const Index row0 = i % decode.chunks * kMaxRows;
    decode.piece_of_keys(at.b, head % p.H_kv, row0, head / p.H_kv, mine);
  });
  struct Nothing {
    Worker* worker = nullptr;
  };
  Index left = 0;  // to combine
  for (Index b = 0; b < p.B; ++b) left += decode.pieces.of(b) != 1;
  parallel(
      p, left ? rows : 0, max_of(rows / threads, 16), [](Parts&) { return Nothing(); },
      [&](Index row, Nothing&) {
        decode.combine_row(row / p.T / p.H, row / p.T % p.H, row % p.T);
      });
  if (!p.received) return;
  const Index parts = (p.S + kSummedKeys - 1) / kSummedKeys;
  parallel(
      p, p.B * p.H * parts, 1, [](Parts&) { return Nothing(); },
      [&](Index item, Nothing&) {
        const Index head = item / parts;
        decode.sum_keys(head / p.H, head % p.H, item % parts * kSummedKeys);
      });
}

}  // namespace

void attention_decode(const DecodeParams& p) {
  with_element(p.q.dtype,
               [&](auto* element) { decode<std::remove_pointer_t<decltype(element)>>(p); });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
