// Attention forward over chosen keys: each query attends those that its list names, and no others.
//
//   o = softmax(scale * q k[list]^T) v[list]        lse = logsumexp of the scores
//
// Work:    one item per (batch entry, list): a query and all heads that share its list. Of k and v
//          the rows that are listed are gathered once for a key head, whose query heads are the
//          rows of a tile: O(T K) products
// Memory:  per thread q and o of a group, and a tile of gathered keys
// Threads: items are independent; a row's result depends on the set of its keys alone
#include <type_traits>

#include "indexed_keys.h"
#include "kernels.h"
#include "row_results.h"
#include "team.h"

namespace attnfast::cpu::ATTNFAST_ISA {
namespace {

struct IndexedScratch {
  KeySet set;
  int32_t* keys;          // [K]: a list, sorted
  float *q_rows, *k_t;    // [group][D_pad] with the scores' factor, [D][kGathered]
  float *v_rows, *s, *o;  // [kGathered][D_v_pad], [group][kGathered], [group][D_v_pad]
  float* m;               // [group], in the scores' units
  float *l, *depth_sum, *distance_sum;  // [group][kLanes]: sums of each lane
  Worker* worker = nullptr;

  IndexedScratch(Parts& parts, const AttentionParams& p, Index D_pad, Index D_v_pad)
      : set(parts, p.S) {
    const Index group = p.H / p.H_kv, rows = round_up(group, kLanes);
    const auto floats = [&](Index n) { return parts.take<float>(n); };
    keys = parts.take<int32_t>(p.K + kLanes);
    q_rows = floats(group * D_pad), k_t = floats(p.D * kGathered);
    v_rows = floats(kGathered * D_v_pad), s = floats(group * kGathered),
    o = floats(group * D_v_pad);
    m = floats(rows);
    l = floats(rows * kLanes), depth_sum = floats(rows * kLanes);
    distance_sum = floats(rows * kLanes);
  }
};

template <class Element>
struct IndexedForward {
  const ForwardParams& p;
  Index group = p.H / p.H_kv;
  Index D_pad = round_up(p.D, kLanes), D_v_pad = round_up(p.D_v, kLanes);

  void run() const {
    const Index lists = p.B * p.index_heads * p.T, sharing = p.H_kv / p.index_heads;
    const auto prepare = [&](Parts& parts) { return IndexedScratch(parts, p, D_pad, D_v_pad); };
    parallel(p, lists, 1, prepare, [&](Index item, IndexedScratch& s) {
      const Index t = p.T - 1 - item % p.T, b = item / p.T / p.index_heads;
      const Index first = item / p.T % p.index_heads * sharing;
      const Head<Element> any(p, b, 0);
      const int32_t* list = p.indices + (item / p.T * p.T + t) * p.K;
      const Index count = s.set.sort(list, p.K, any.key_begin(t), any.key_end(t), s.keys);
      for (Index h_kv = first; h_kv < first + sharing; ++h_kv)
        attend(Head<Element>(p, b, h_kv * group), t, count, s);
    });
  }

  // All query heads of a key head, of which `head` is the first.
  void attend(const Head<Element>& head, Index t, Index count, IndexedScratch& s) const {
    pack_rows(head.q + t * p.q.t, p.q.h, group, p.D, D_pad, head.units.factor, s.q_rows);
    for (Index g = 0; g < round_up(group, kLanes); ++g) {
      s.m[g] = -kInfinity;
      store(s.l + g * kLanes, zeros());
      store(s.depth_sum + g * kLanes, zeros()), store(s.distance_sum + g * kLanes, zeros());
    }
    if (count == 0) memset(s.o, 0, group * D_v_pad * sizeof(float));
    for (Index first = 0; first < count; first += kGathered) {
      const Index n = min_of(kGathered, count - first), ld = round_up(n, kLanes);
      const int32_t* keys = s.keys + first;
      if (s.worker->stops(group * n)) return;
      // Scores
      transpose_rows([&](Index j) { return head.k + keys[j] * p.k.t; }, n, p.D, ld, s.k_t);
      gemm_wide(group, ld, p.D, MatrixA{s.q_rows, D_pad, 1}, MatrixB{s.k_t, ld}, MatrixC{s.s, ld},
                Start::kZero);
      head.units.finish(group * ld / kLanes, s.s, nullptr);
      // Softmax
      for (Index g = 0; g < group; ++g) softmax_row(head, t, g, keys, n, first > 0, s);
      // Output
      gather_rows(head.v, p.v.t, keys, n, p.D_v, D_v_pad, s.v_rows);
      gemm_wide(group, D_v_pad, n, MatrixA{s.s, ld, 1}, MatrixB{s.v_rows, D_v_pad},
                MatrixC{s.o, D_v_pad}, first ? Start::kAccumulate : Start::kZero);
    }
    finish(head, t, s);
  }

  // s -> p in a row of a tile, folded into its sums.
  void softmax_row(const Head<Element>& head, Index t, Index g, const int32_t* keys, Index n,
                   bool has_o, IndexedScratch& s) const {
    const float to_log2 = head.units.to_log2;
    float *row = s.s + g * round_up(n, kLanes), *l = s.l + g * kLanes;
    float *depth_sum = s.depth_sum + g * kLanes, *distance_sum = s.distance_sum + g * kLanes;
    for (Index j = n; j < round_up(n, kLanes); ++j) row[j] = -kInfinity;
    Vec top = broadcast(s.m[g]);
    for (Index j = 0; j < n; j += kLanes) top = max(load(row + j), top);
    const float old = s.m[g], m = max_lanes(top);
    const Vec base = broadcast(m == -kInfinity ? 0.0f : m);
    if (m > old) {
      const Vec drop = old - base, rescale = exp2(drop * to_log2);
      const Vec sum = load(l);
      if (p.max_logit) {
        store(depth_sum, rescale == 0.0f ? zeros() : rescale * (load(depth_sum) + sum * drop));
        store(distance_sum, rescale * load(distance_sum));
      }
      store(l, sum * rescale);
      s.m[g] = m;
      for (Index d = 0; has_o && d < D_v_pad; d += kLanes) {
        float* o = s.o + g * D_v_pad + d;
        store(o, load(o) * rescale);
      }
    }
    for (Index j = 0; j < n; j += kLanes) {
      const Vec depth = load(row + j) - base, prob = exp2(depth * to_log2);
      store(row + j, prob);
      store(l, load(l) + prob);
      if (!p.max_logit) continue;
      IVec key;
      memcpy(&key, keys + j, sizeof key);
      const Vec distance =
          abs(__builtin_convertvector(key - static_cast<int32_t>(t + head.shift), Vec));
      store(depth_sum, load(depth_sum) + (prob > 0.0f ? prob * depth : zeros()));
      store(distance_sum, load(distance_sum) + (prob > 0.0f ? prob * distance : zeros()));
    }
  }

  // The sums of a group become rows of out, lse, norm and statistics.
  void finish(const Head<Element>& head, Index t, IndexedScratch& s) const {
    const Index row = head.b * p.lse_stride_b + t;
    for (Index g0 = 0; g0 < group; g0 += kLanes) {
      RowSums sums{load(s.m + g0), zeros(), zeros(), zeros()};
      Vec sink = zeros(), sinks = zeros();
      const Index rows = min_of(group - g0, kLanes);
      for (Index i = 0; i < rows; ++i) {
        const Index at = (g0 + i) * kLanes, h = head.h + g0 + i;
        sums.l[i] = sum_lanes(load(s.l + at));
        sums.depth_sum[i] = sum_lanes(load(s.depth_sum + at));
        sums.distance_sum[i] = sum_lanes(load(s.distance_sum + at));
        if (p.sinks) sink[i] = Head<Element>(p, head.b, h).sink, sinks[i] = p.sinks[h];
      }
      const RowResults of = finish_rows(sums, sink, p.sinks ? &sinks : nullptr, head.units);
      for (Index i = 0; i < rows; ++i) {
        const Index h = head.h + g0 + i, at = row + h * p.lse_stride_h;
        p.lse[at] = of.lse[i], p.norm[at] = of.m[i], p.norm[at + p.norm_plane] = of.log2_l[i];
        if (p.max_logit) {
          p.max_logit[at] = of.max_logit[i], p.entropy[at] = of.entropy[i];
          p.reach[at] = of.reach[i], p.focus[at] = of.focus[i];
        }
        Element* out =
            static_cast<Element*>(p.out.data) + head.b * p.out.b + h * p.out.h + t * p.out.t;
        copy_row(s.o + (g0 + i) * D_v_pad, p.D_v, of.o_scale[i], out);
      }
    }
  }
};

}  // namespace

void indexed_fwd(const ForwardParams& p) {
  with_element(p.q.dtype, [&](auto* element) {
    IndexedForward<std::remove_pointer_t<decltype(element)>>{p}.run();
  });
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
