// Attention backward over chosen keys, without atomics.
//
//   p = exp(s - m - log l)                          dv[list] += p^T do
//   ds = p * (do v^T + row_term - dentropy * (s - m))
//   dq = scale * ds k[list]                         dk[list] += scale * ds^T q
//
// Work:    first row_term for every query, and every list sorted. Then one item per (batch entry,
//          key head), which walks through its queries; with too few heads for the threads, dq by
//          queries, and dk and dv by ranges of keys, of which each query has a part of its sorted
//          list: 7 products instead of 5, the same sums in the same order. O(T K) either way.
// Memory:  the sorted lists; per thread tiles, and fp32 dk and dv of a range of keys
// Threads: results do not depend on their number, nor on how long a range is
#include <algorithm>
#include <type_traits>

#include "attention_bwd_rows.h"
#include "indexed_keys.h"
#include "kernels.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

// The lists of all queries, each sorted and without what its query may not attend by position.
class SortedLists {
 public:
  template <class Element>
  SortedLists(const BackwardParams& p, Element*) : p_(p) {
    const Index lists = p.B * p.index_heads * p.T;
    memory_ = Arena(lists * (p.K + 1) * sizeof(int32_t), p.footprint);
    counts_ = reinterpret_cast<int32_t*>(memory_.data());
    keys_ = counts_ + lists;
    struct Scratch {
      KeySet set;
      Worker* worker = nullptr;
    };
    const auto prepare = [&](Parts& parts) { return Scratch{KeySet(parts, p.S)}; };
    parallel(p, lists, 16, prepare, [&](Index item, Scratch& s) {
      const Index t = item % p.T;
      const Head<Element> head(p, item / p.T / p.index_heads, 0);
      counts_[item] = static_cast<int32_t>(s.set.sort(
          p.indices + item * p.K, p.K, head.key_begin(t), head.key_end(t), keys_ + item * p.K));
    });
  }

  struct Part {
    const int32_t* keys;
    Index count;
  };

  // What query t of a key head lists of key_begin .. key_end - 1.
  Part of(Index b, Index h_kv, Index t, Index key_begin, Index key_end) const {
    const Index list = (b * p_.index_heads + (p_.index_heads > 1 ? h_kv : 0)) * p_.T + t;
    const int32_t *first = keys_ + list * p_.K, *last = first + counts_[list];
    first = std::lower_bound(first, last, key_begin);
    return {first, std::lower_bound(first, last, key_end) - first};
  }

 private:
  const BackwardParams& p_;
  Arena memory_;
  int32_t *counts_, *keys_;  // [B, index_heads, T], [B, index_heads, T, K]
};

struct IndexedScratch {
  float *q_rows, *q_scaled, *do_rows, *dq;  // of a group: [group][D_pad | D_v_pad]
  float *m, *log2_l, *row_term, *dentropy;  // [group]
  float *k_rows, *k_t, *v_t;                // [kGathered][D_pad], [D | D_v][kGathered]
  float *p, *ds, *dcapped;                  // [group][kGathered]
  float* tile;                              // [kGathered][D_pad | D_v_pad] of dk or dv
  float *dk, *dv;                           // [range][D_pad | D_v_pad]
  Worker* worker = nullptr;

  IndexedScratch(Parts& parts, const AttentionParams& p_, Index D_pad, Index D_v_pad, Index range) {
    const Index group = p_.H / p_.H_kv;
    const auto floats = [&](Index n) { return parts.take<float>(n); };
    q_rows = floats(group * D_pad), q_scaled = floats(group * D_pad), dq = floats(group * D_pad);
    do_rows = floats(group * D_v_pad);
    m = floats(group), log2_l = floats(group), row_term = floats(group), dentropy = floats(group);
    k_rows = floats(kGathered * D_pad);
    k_t = floats(p_.D * kGathered), v_t = floats(p_.D_v * kGathered);
    p = floats(group * kGathered), ds = floats(group * kGathered);
    dcapped = floats(group * kGathered);
    tile = floats(range ? kGathered * max_of(D_pad, D_v_pad) : 0);
    dk = floats(range * D_pad), dv = floats(range * D_v_pad);
  }
};

template <class Element>
struct IndexedBackward {
  const BackwardParams& p;
  const BackwardRows<Element>& rows;
  const SortedLists& lists;
  Index group = p.H / p.H_kv;
  Index D_pad = round_up(p.D, kLanes), D_v_pad = round_up(p.D_v, kLanes);

  void run() const {
    const Index heads = p.B * p.H_kv, threads = usable_threads(p.num_threads);
    if (!are_few(heads, threads)) {
      each(heads, p.S, [&](Index item, IndexedScratch& s) {
        key_range(item / p.H_kv, item % p.H_kv, 0, p.S, true, s);
      });
      return;
    }
    each(heads * p.T, 0, [&](Index item, IndexedScratch& s) {
      const Index t = p.T - 1 - item % p.T, b = item / p.T / p.H_kv, h_kv = item / p.T % p.H_kv;
      query(Head<Element>(p, b, h_kv * group), t, lists.of(b, h_kv, t, 0, p.S), true, s);
    });
    const Index range = keys_per_range(heads, threads), ranges = (p.S + range - 1) / range;
    each(heads * ranges, range, [&](Index item, IndexedScratch& s) {
      const Index head = item / ranges, key = item % ranges * range;
      key_range(head / p.H_kv, head % p.H_kv, key, min_of(key + range, p.S), false, s);
    });
  }

 private:
  // Such that a query has about a tile of them, if all threads then have work.
  Index keys_per_range(Index heads, Index threads) const {
    const Index of_a_tile = kGathered * p.S / max_of(p.K, 1);
    const Index for_all = p.S * heads / (4 * threads);
    return max_of(min_of(of_a_tile, for_all), kKeysPerItem);
  }

  template <class Body>
  void each(Index items, Index range, const Body& body) const {
    const auto prepare = [&](Parts& parts) {
      return IndexedScratch(parts, p, D_pad, D_v_pad, range);
    };
    parallel(p, items, 1, prepare, body);
  }

  // dk and dv (and dq, if asked) of one key head, for the keys key_begin .. key_end - 1.
  void key_range(Index b, Index h_kv, Index key_begin, Index key_end, bool with_dq,
                 IndexedScratch& s) const {
    const Head<Element> head(p, b, h_kv * group);
    const Index keys = key_end - key_begin;
    if (keys) memset(s.dk, 0, keys * D_pad * sizeof(float));
    if (keys) memset(s.dv, 0, keys * D_v_pad * sizeof(float));
    IndexedScratch at = s;  // row 0 is key 0
    at.dk -= key_begin * D_pad, at.dv -= key_begin * D_v_pad;
    for (Index t = 0; t < p.T; ++t) {
      const SortedLists::Part part = lists.of(b, h_kv, t, key_begin, key_end);
      if (part.count || with_dq) query(head, t, part, with_dq, at);
      if (s.worker->stops(0)) return;
    }
    Element* dk = static_cast<Element*>(p.dk.data) + b * p.dk.b + h_kv * p.dk.h;
    Element* dv = static_cast<Element*>(p.dv.data) + b * p.dv.b + h_kv * p.dv.h;
    for (Index key = key_begin; key < key_end; ++key) {
      copy_row(at.dk + key * D_pad, p.D, 1.0f, dk + key * p.dk.t);
      copy_row(at.dv + key * D_v_pad, p.D_v, 1.0f, dv + key * p.dv.t);
    }
  }

  // All query heads of a key head, of which `head` is the first: dq, where it is asked for, and
  // where there is scratch for them dk and dv.
  void query(const Head<Element>& head, Index t, SortedLists::Part part, bool with_dq,
             IndexedScratch& s) const {
    load_query(head, t, s);
    if (with_dq && !part.count) memset(s.dq, 0, group * D_pad * sizeof(float));
    for (Index first = 0; first < part.count; first += kGathered) {
      const int32_t* keys = part.keys + first;
      const Index n = min_of(kGathered, part.count - first), ld = round_up(n, kLanes);
      if (s.worker->stops(group * n)) return;
      gradient_tile(head, keys, n, with_dq, s);
      if (with_dq) {
        gemm_wide(group, D_pad, n, MatrixA{s.ds, ld, 1}, MatrixB{s.k_rows, D_pad},
                  MatrixC{s.dq, D_pad}, first ? Start::kAccumulate : Start::kZero);
      }
      if (s.tile) {
        add_to_keys(s.p, ld, s.do_rows, D_v_pad, keys, n, s.tile, s.dv);
        add_to_keys(s.ds, ld, s.q_scaled, D_pad, keys, n, s.tile, s.dk);
      }
    }
    if (!with_dq) return;
    Element* dq = static_cast<Element*>(p.dq.data) + head.b * p.dq.b + t * p.dq.t;
    for (Index g = 0; g < group; ++g)
      copy_row(s.dq + g * D_pad, p.D, p.scale, dq + (head.h + g) * p.dq.h);
  }

  void load_query(const Head<Element>& head, Index t, IndexedScratch& s) const {
    const Element* q = head.q + t * p.q.t;
    pack_rows(q, p.q.h, group, p.D, D_pad, head.units.factor, s.q_rows);
    pack_rows(q, p.q.h, group, p.D, D_pad, p.scale, s.q_scaled);
    pack_rows(rows.grad_out(head, t), p.grad_out.h, group, p.D_v, D_v_pad, 1.0f, s.do_rows);
    if (head.units.after) {  // q * scale may be Inf, which 0 * q would carry into dk
      for (Index i = 0; i < group * D_pad; ++i) s.q_scaled[i] = clamp_finite(s.q_scaled[i]);
    }
    for (Index g = 0; g < group; ++g) {
      const Index at = rows.row_offset(head, t) + g * p.lse_stride_h;
      s.m[g] = p.norm[at], s.log2_l[g] = p.norm[p.norm_plane + at];
      s.row_term[g] = rows.row_terms[at];
      s.dentropy[g] = p.grad_entropy ? p.grad_entropy[at] : 0.0f;
    }
  }

  // p and ds [group][ld] of n keys, and with dq their rows of k.
  void gradient_tile(const Head<Element>& head, const int32_t* keys, Index n, bool with_dq,
                     IndexedScratch& s) const {
    const Index ld = round_up(n, kLanes);
    // Scores
    if (with_dq) {
      gather_rows(head.k, p.k.t, keys, n, p.D, D_pad, s.k_rows);
      transpose_rows([&](Index j) { return s.k_rows + j * D_pad; }, n, p.D, ld, s.k_t);
    } else {
      transpose_rows([&](Index j) { return head.k + keys[j] * p.k.t; }, n, p.D, ld, s.k_t);
    }
    gemm_wide(group, ld, p.D, MatrixA{s.q_rows, D_pad, 1}, MatrixB{s.k_t, ld}, MatrixC{s.p, ld},
              Start::kZero);
    head.units.finish(group * ld / kLanes, s.p, s.dcapped);
    // dP
    transpose_rows([&](Index j) { return head.v + keys[j] * p.v.t; }, n, p.D_v, ld, s.v_t);
    gemm_wide(group, ld, p.D_v, MatrixA{s.do_rows, D_v_pad, 1}, MatrixB{s.v_t, ld},
              MatrixC{s.ds, ld}, Start::kZero);
    // Probabilities and ds
    const float to_log2 = head.units.to_log2, to_natural = head.units.to_natural;
    for (Index g = 0; g < group; ++g) {
      const Vec m = broadcast(s.m[g]), log2_l = broadcast(s.log2_l[g]);
      const Vec row_term = broadcast(s.row_term[g]), dentropy = broadcast(s.dentropy[g]);
      for (Index i = g * ld; i < (g + 1) * ld; i += kLanes) {
        const Vec score = load(s.p + i);
        const Vec probability = Norm::probability(score, m, log2_l, to_log2);
        Vec d = load(s.ds + i) + row_term;
        if (p.grad_entropy) d -= dentropy * ((score - m) * to_natural);
        d *= probability;
        if (p.softcap > 0.0f) d *= load(s.dcapped + i);
        store(s.p + i, probability);
        store(s.ds + i, probability == 0.0f ? zeros() : d);
      }
    }
  }

  // sums[key] += weights^T rows, of the keys of a tile.
  void add_to_keys(const float* weights, Index ld, const float* from, Index width,
                   const int32_t* keys, Index n, float* tile, float* sums) const {
    gemm_wide(n, width, group, MatrixA{weights, 1, ld}, MatrixB{from, width}, MatrixC{tile, width},
              Start::kZero);
    for (Index j = 0; j < n; ++j) {
      float* sum = sums + keys[j] * width;
      for (Index d = 0; d < width; d += kLanes)
        store(sum + d, load(sum + d) + load(tile + j * width + d));
    }
  }
};

}  // namespace

void indexed_bwd(const BackwardParams& p) {
  const Arena memory(p.B * p.lse_stride_b * sizeof(float), p.footprint);
  auto* row_terms = reinterpret_cast<float*>(memory.data());
  with_element(p.q.dtype, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    const SortedLists lists(p, element);  // first: they stay, and need not all of others' scratch
    const BackwardRows<Element> rows{{p, row_terms}};
    rows.find_row_terms();
    IndexedBackward<Element>{p, rows, lists}.run();
    bias_gradient(p, row_terms);
  });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
