// Attention backward (FlashAttention-2, Algorithm 2, with the queries in lanes and no atomics).
//
//   row_term = dlse - delta - dentropy * (entropy - log l)      dv = (p * z)^T do
//   delta = rowsum(p * dp) = rowsum(do * o) + ...               dq = scale * ds k, dk = scale * ds^T q
//
// Work:    first row_term for every query; then one item per (batch entry, key head), which owns its
//          dk and dv and all dq of its query heads. With too few heads for the threads, one per
//          range of its keys instead, which hand dq on; or dq and dk/dv are computed apart, one
//          item per block of queries or range of keys: 7 products instead of 5. Always the same
//          sums in the same order (attention_bwd_ways.h).
// Memory:  per query one float, and dq in fp32 where it is handed on; per thread tiles, and fp32 dk
//          and dv and what has to be packed of k and v, of one head
// Pairs:   where the processor multiplies pairs of bf16, all five products of bf16 inputs do, p and
//          ds rounded to bf16; with AMX those of fp16 and fp32 inputs too, in planes (pairs.h)
// Threads: results do not depend on their number
#include <algorithm>
#include <type_traits>

#include "attention_bwd_pairs.h"
#include "attention_bwd_rows.h"
#include "attention_bwd_ways.h"
#include "kernels.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

constexpr KeyGradients kOnlyQueries{true, false, nullptr, nullptr, 0, 0};

template <class Element, int kPlanes>
struct Backward : GradientTiles<Element, kPlanes> {
  using Tiles = GradientTiles<Element, kPlanes>;
  using Keys = typename Tiles::Keys;
  using Tiles::block_rows;
  using Tiles::column_of;
  using Tiles::columns_per_block;
  using Tiles::grad_out;
  using Tiles::kPacks;
  using Tiles::p;
  using Tiles::parallel;
  using Tiles::row_offset;

  // One block of queries against the keys key_begin .. key_end - 1.
  void query_block(const Head<Element>& head, Index t0, Index n, Index key_begin, Index key_end,
                   const Keys& keys, const KeyGradients& to, const Link* link,
                   BackwardScratch& s) const {
    s.num_columns = (n + kColumn - 1) / kColumn;
    for (Index c = 0; c < s.num_columns; ++c) {
      s.columns[c].start = link ? link->start() : Start::kZero;
      if (link) s.columns[c].dq_t = link->dq_t(head.b, head.h, t0 + c * kColumn);
    }
    bool loaded = false;
    Segments segments(head, t0, key_begin, key_end);
    for (Segment segment; segments.next(&segment);) {
      Index begin = segment.end, end = segment.begin;
      for (Index c = 0; c < s.num_columns; ++c) {
        const Column column = column_of(head, t0, n, c, segment);
        if (column.begin == column.end) continue;
        begin = min_of(begin, column.begin), end = max_of(end, column.end);
      }
      begin -= begin % Tiles::kFirstKey;
      begin = max_of(begin, key_begin), end = min_of(end, key_end);
      if (begin < end && !loaded) Tiles::load_block(head, t0, n, s, to.dkv), loaded = true;
      for (Index key = begin; key < end;) {
        Index stop = min_of((key / kKeys + 1) * kKeys, end);
        if (s.worker->stops(n * (stop - key))) return;
        for (Index c = 0; c < s.num_columns; ++c) {
          // Where a column sees only some of the keys, thin slices waste less.
          const Column column = column_of(head, t0, n, c, segment);
          const bool sees_none = column.end <= key || column.begin >= stop;
          const bool sees_all = column.begin <= key && column.end >= stop;
          if (!sees_none && !sees_all) stop = min_of(stop, (key / kColumn + 1) * kColumn);
        }
        Tiles::key_tile(head, t0, n, segment, key, stop - key, end, keys, to, s);
        key = stop;
      }
    }
    if (!to.dq) return;
    alignas(64) float factor[kColumn];
    for (Index lane = 0; lane < kColumn; ++lane) factor[lane] = p.scale;
    Element* dq = static_cast<Element*>(p.dq.data) + head.b * p.dq.b + head.h * p.dq.h +
                  (head.q_begin + t0) * p.dq.t;
    for (Index c = 0; c < s.num_columns; ++c) {
      BackwardColumn& state = s.columns[c];
      if (state.start == Start::kZero) memset(state.dq_t, 0, p.D * kColumn * sizeof(float));
      if (link && !link->last()) continue;
      transpose_out(state.dq_t, min_of(n - c * kColumn, kColumn), p.D, factor,
                    dq + c * kColumn * p.dq.t, p.dq.t);
    }
  }

  // dk and dv (and dq, if asked) of one key head, for the keys key_begin .. key_end - 1. `packed`:
  // the key head on pairs; null: packed here.
  void key_head(Index b, Index h_kv, Index key_begin, Index key_end, bool with_dq,
                const float* packed, Link* link, BackwardScratch& s) const {
    const Index group = p.H / p.H_kv;
    const Head<Element> first(p, b, h_kv * group);
    key_end = min_of(key_end, first.S);
    if (key_begin >= key_end) {
      if (with_dq) each_query_block(b, h_kv, 0, 0, {}, kOnlyQueries, link, s);
      return;
    }
    const Index keys = key_end - key_begin;
    Element* dk = static_cast<Element*>(p.dk.data) + b * p.dk.b + h_kv * p.dk.h +
                  (first.k_begin + key_begin) * p.dk.t;
    Element* dv = static_cast<Element*>(p.dv.data) + b * p.dv.b + h_kv * p.dv.h +
                  (first.k_begin + key_begin) * p.dv.t;
    KeyGradients to{with_dq, true, s.dk_head, s.dv_head, s.D_pad, s.D_v_pad};
    const Keys loaded = Tiles::load_keys(first, keys, packed, dk, dv, to, s);
    to.dk -= key_begin * to.dk_row, to.dv -= key_begin * to.dv_row;  // row 0 is key 0
    each_query_block(b, h_kv, key_begin, key_end, loaded, to, link, s);
    if (!s.dk_head) return;
    copy_rows(s.dk_head, s.D_pad, keys, p.D, Tiles::dk_scale(), dk, p.dk.t);
    copy_rows(s.dv_head, s.D_v_pad, keys, p.D_v, 1.0f, dv, p.dv.t);
  }

  static void copy_rows(const float* from, Index from_row, Index n, Index D, float factor,
                        Element* to, Index to_row) {
    for (Index i = 0; i < n; ++i) copy_row(from + i * from_row, D, factor, to + i * to_row);
  }

  void each_query_block(Index b, Index h_kv, Index key_begin, Index key_end, const Keys& keys,
                        const KeyGradients& to, Link* link, BackwardScratch& s) const {
    const Index group = p.H / p.H_kv;
    for (Index g = 0; g < group; ++g) {
      const Head<Element> head(p, b, h_kv * group + g);
      for (Index t0 = 0; t0 < head.T; t0 += block_rows) {
        if (link && !link->wait(s.worker)) return;
        query_block(head, t0, min_of(block_rows, head.T - t0), key_begin, key_end, keys, to, link,
                    s);
        if (link) link->hand_on();
      }
    }
  }

  // dq, dk and dv of the key heads (b * H_kv + h_kv) that `mine` holds; null: of all.
  void gradients(const bool* mine) const {
    ScratchPlan plan{columns_per_block()};
    plan.planes = kPlanes;
    const bool in_place = !kPlanes && !kPacks && p.D % kLanes == 0 && p.D_v % kLanes == 0;
    using Layout = PairKeyLayout<Element, kPlanes ? kPlanes : 1>;
    const Way way = way_of<Element>(p, block_rows);
    if (way == Way::kWhole) {
      plan.packed_rows = kPacks && !kPlanes ? p.S : 0;
      plan.head_rows = in_place ? 0 : round_up(p.S, kTileSize);
      plan.keys = kPlanes ? Layout(p, p.S).floats() : 0;
      parallel(p.B * p.H_kv, plan, [&](Index item, BackwardScratch& s) {
        if (mine && !mine[item]) return;
        key_head(item / p.H_kv, item % p.H_kv, 0, p.S, true, nullptr, nullptr, s);
      });
      return;
    }
    const Index most = way == Way::kLinked ? keys_per_link(p) : kKeysPerItem;
    const Blocks ranges(p.B, p.H_kv, [&](Index b) {
      return max_of((Head<Element>(p, b, 0).S + most - 1) / most, 1);
    });
    const Blocks panels(p.cu_seqlens_k, p.B, p.H_kv, p.S, kPanel);
    const Index panel_floats = Layout(p, kPanel).floats();
    const Arena memory(kPlanes ? panels.count() * panel_floats * sizeof(float) : 0, p.footprint);
    auto* all = reinterpret_cast<float*>(memory.data());
    const auto packed_head = [&](Index index) {
      return all ? all + panels.first_of(index) * panel_floats : nullptr;
    };
    if constexpr (kPlanes > 0) {
      parallel(ranges.count(), ScratchPlan{0}, [&](Index item, BackwardScratch&) {
        const Block at = ranges[item];
        const Index index = at.b * p.H_kv + at.h, key = at.index * most;
        if (mine && !mine[index]) return;
        const Head<Element> head(p, at.b, at.h * (p.H / p.H_kv));
        Layout(p, head.S).pack(head, key, min_of(most, head.S - key), packed_head(index));
      });
    }
    if (way == Way::kLinked) {
      plan.head_rows = in_place ? 0 : most;
      linked(ranges, most, plan, mine, packed_head);
      return;
    }
    this->each_block(plan, [&](const Head<Element>& head, Index t0, Index n, BackwardScratch& s) {
      const Index index = head.b * p.H_kv + head.h / (p.H / p.H_kv);
      if (mine && !mine[index]) return;
      Keys keys;
      if constexpr (kPlanes > 0) keys = Layout(p, head.S).keys(head, packed_head(index));
      query_block(head, t0, n, 0, head.S, keys, kOnlyQueries, nullptr, s);
    });
    plan.head_rows = in_place ? 0 : most;
    parallel(ranges.count(), plan, [&](Index item, BackwardScratch& s) {
      const Block at = ranges[item];
      const Index index = at.b * p.H_kv + at.h, key = at.index * most;
      if (mine && !mine[index]) return;
      key_head(at.b, at.h, key, key + most, false, packed_head(index), nullptr, s);
    });
  }

  // The same where each range of `most` keys hands dq on to the next.
  template <class PackedHead>
  void linked(const Blocks& ranges, Index most, const ScratchPlan& plan, const bool* mine,
              const PackedHead& packed_head) const {
    const Blocks columns(p.cu_seqlens_q, p.B, p.H, p.T, kColumn);
    float* sums = nullptr;
    std::atomic<Index>* done = nullptr;
    const auto cut = [&](Parts parts) {
      sums = parts.take<float>(columns.count() * Link::column_floats(p.D));
      done = parts.take<std::atomic<Index>>(ranges.count());
      return parts.bytes();
    };
    const Arena memory(cut(Parts()), p.footprint);
    cut(Parts(memory.data()));
    for (Index i = 0; done && i < ranges.count(); ++i) new (done + i) std::atomic<Index>(0);
    parallel(ranges.count(), plan, [&](Index item, BackwardScratch& s) {
      // Heads before ranges: then those of one head are far apart, and seldom wait.
      const Block at = ranges[item];
      const Index i = at.h * at.count + at.index, h_kv = i % p.H_kv, range = i / p.H_kv;
      const Index index = at.b * p.H_kv + h_kv;
      if (mine && !mine[index]) return;
      Link link(columns, p.H, p.D, sums, range ? done + item - p.H_kv : nullptr, done + item,
                range + 1 == at.count);
      key_head(at.b, h_kv, range * most, (range + 1) * most, true, packed_head(index), &link, s);
    });
  }

  // Which key heads planes serve for.
  void find_in_range(bool* in_range) const {
    parallel(p.B * p.H_kv, ScratchPlan{0}, [&](Index item, BackwardScratch&) {
      const Index group = p.H / p.H_kv;
      const Head<Element> first(p, item / p.H_kv, item % p.H_kv * group);
      Peak scores, values, upstream, norms;
      const auto look = [](Peak& peak, const auto* rows, Index stride, Index n, Index D) {
        for (Index i = 0; i < n; ++i)
          for (Index d = 0; d < D; d += kLanes) peak.add(load_part(rows + i * stride + d, D - d));
      };
      look(scores, first.k, p.k.t, first.S, p.D);
      look(values, first.v, p.v.t, first.S, p.D_v);
      for (Index g = 0; g < group; ++g) {
        const Head<Element> head(p, first.b, first.h + g);
        look(scores, head.q, p.q.t, head.T, p.D);
        look(upstream, grad_out(head, 0), p.grad_out.t, head.T, p.D_v);
        look(norms, p.norm + row_offset(head, 0), head.T, 1, head.T);
      }
      in_range[item] = norms.get() <= kRoundedAlike && Peak::in_range_of_products(scores.get()) &&
                       Peak::in_range_of_products(values.get()) &&
                       Peak::in_range_of_products(upstream.get()) &&
                       Peak::worth_summing(values.get()) && Peak::worth_summing(upstream.get());
    });
  }
};

}  // namespace

void attention_bwd(const BackwardParams& given) {
  if (given.has_lists()) return indexed_bwd(given);
  BackwardParams p = given;
  const Index size = p.cu_seqlens_q ? p.H * p.lse_stride_h : p.B * p.lse_stride_b;
  const Arena memory(size * sizeof(float), p.footprint);
  auto* row_terms = reinterpret_cast<float*>(memory.data());
  Arena norm;
  with_element(p.q.dtype, [&]([[maybe_unused]] auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    constexpr int kPlanes = kPlanesOf<Element>;
    const BackwardRows<Element> queries{{p, row_terms}};
    const Backward<Element, 0> in_fp32{{{p, row_terms}}};
    // The forward was the decoding kernel's, or in planes; or torch has kept no more than the lse.
    if (!p.norm_of_more && (p.T == 1 || kPlanes > 1 || p.norm_plane == 0)) {
      norm = Arena(2 * size * sizeof(float), p.footprint);
      auto* planes = reinterpret_cast<float*>(norm.data());
      const Index copied = p.footprint ? 0 : size;
      std::copy_n(p.norm, copied, planes);  // of no rows too, where there is no norm
      std::copy_n(p.norm + p.norm_plane, copied, planes + size);
      queries.find_norms(planes, size);
      p.norm = planes, p.norm_plane = size;
    }
    queries.find_row_terms();
    const Index heads = p.B * p.H_kv;
    if constexpr (kPlanes == 0) {
      in_fp32.gradients(nullptr);
    } else if constexpr (kPlanes == 1) {
      Backward<Element, kPlanes>{{{p, row_terms, most_queries_per_block(p)}}}.gradients(nullptr);
    } else if (p.T * (p.H / p.H_kv) < kFewestQueries) {
      in_fp32.gradients(nullptr);
    } else {
      const Arena flags(2 * heads, p.footprint);
      auto *in_range = reinterpret_cast<bool*>(flags.data()), *out_of_range = in_range + heads;
      const Backward<Element, kPlanes> in_planes{{{p, row_terms, most_queries_per_block(p)}}};
      in_planes.find_in_range(in_range);
      bool all = true;
      for (Index i = 0; i < (p.footprint ? 0 : heads); ++i)
        all &= in_range[i], out_of_range[i] = !in_range[i];
      in_planes.gradients(all ? nullptr : in_range);
      if (!all) in_fp32.gradients(out_of_range);
    }
    bias_gradient(p, row_terms);
  });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
