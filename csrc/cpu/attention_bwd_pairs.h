// The backward's products on pairs of bf16 (pairs.h): blocks of queries and keys made ready, and
// tiles of p and ds.
//
//   s = k q^T      dp = v do^T      rows of pairs along D and D_v; queries in columns
//   dq += ds k     panels of transposed k, ds in pairs of keys
//   dk += ds^T q, dv += p^T do      p and ds in rows of queries, q and do in pairs of queries
#pragma once
#include "attention_bwd_tiles.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// A key head as these products read it; pointers are to key 0.
struct PairKeys {
  PairsA k, v;  // rows of keys
  PairsA k_t;   // rows of one panel; from panel to panel k_t.panel_stride
};

// Where each part lies: in place where bf16 rows are whole panels, else packed.
template <class Element, int kPlanes>
struct PairKeyLayout {
  Index S;  // rows that are laid out
  bool packs_k, packs_v;
  Index k_row, v_row, D_pad;

  // For a head of `rows` keys; floats() grows with its panels.
  PairKeyLayout(const AttentionParams& p, Index rows)
      : S(round_up(rows, kPanel)),
        packs_k(packs(p, p.k, p.D)),
        packs_v(packs(p, p.v, p.D_v)),
        k_row(packs_k ? round_up(p.D, kPanel) / 2 : p.k.t / 2),
        v_row(packs_v ? round_up(p.D_v, kPanel) / 2 : p.v.t / 2),
        D_pad(round_up(p.D, kTileSize)) {}

  static bool packs(const AttentionParams& p, const View& x, Index D) {
    return kPlanes > 1 || D % kPanel || x.b % 2 || x.h % 2 || x.t % 2 ||
           reinterpret_cast<uintptr_t>(x.data) % alignof(float) != 0 ||
           (kHasTiles && (p.cu_seqlens_k || p.S % kTileSize));
  }

  Index k_plane() const { return packs_k ? S * k_row : 0; }
  Index v_plane() const { return packs_v ? S * v_row : 0; }
  Index k_t_plane() const { return S / 2 * D_pad; }
  Index floats() const { return kPlanes * (k_plane() + v_plane() + k_t_plane()); }

  PairKeys keys(const Head<Element>& head, const float* data) const {
    const float* v = data + kPlanes * k_plane();
    const float* k_t = v + kPlanes * v_plane();
    return {
        {packs_k ? data : reinterpret_cast<const float*>(head.k), k_row, kPanelPairs, k_plane()},
        {packs_v ? v : reinterpret_cast<const float*>(head.v), v_row, kPanelPairs, v_plane()},
        {k_t, kPanelPairs, D_pad * kPanelPairs, k_t_plane()}};
  }

  // Packs keys key .. key + n - 1 of a head, `key` a multiple of 32.
  void pack(const Head<Element>& head, Index key, Index n, float* data) const {
    const AttentionParams& p = head.problem;
    const Element *k = head.k + key * p.k.t, *v = head.v + key * p.v.t;
    float* v_to = data + kPlanes * k_plane();
    float* k_t_to = v_to + kPlanes * v_plane();
    Peak unused;
    if (packs_k) {
      pack_rows_in_planes<kPlanes>(k, p.k.t, n, p.D, round_up(n, kTileSize), data + key * k_row,
                                   k_row, k_plane(), &unused);
    }
    if (packs_v) {
      pack_rows_in_planes<kPlanes>(v, p.v.t, n, p.D_v, round_up(n, kTileSize), v_to + key * v_row,
                                   v_row, v_plane(), &unused);
    }
    pack_transposed_in_planes<kPlanes>(k, p.k.t, n, p.D, D_pad, k_t_to + key / 2 * D_pad,
                                       k_t_plane(), &unused);
  }
};

template <class Element, int kPlanes>
struct GradientTiles : BackwardTiles<Element> {
  using Tiles = BackwardTiles<Element>;
  using Tiles::column_of;
  using Tiles::grad_out;
  using Tiles::p;
  using Keys = PairKeys;

  static constexpr Index kFirstKey = kPanel;
  float dk_scale() const { return p.scale; }

  // Rows of q are never scaled, columns in three planes alone.
  void load_block(const Head<Element>& head, Index t0, Index n, BackwardScratch& s,
                  bool row_major) const {
    s.num_columns = (n + kColumn - 1) / kColumn;
    const Element *q = head.q + t0 * p.q.t, *d_o = grad_out(head, t0);
    Peak unused;
    for (Index c = 0; c < s.num_columns; ++c) {
      BackwardColumn& state = s.columns[c];
      const Index t = c * kColumn, live = min_of(n - t, kColumn);
      transpose_column_in_planes<kPlanes>(q + t * p.q.t, p.q.t, live, p.D,
                                          kScalesProducts<kPlanes> ? 1.0f : head.units.factor,
                                          state.q_t, q_t_plane(), &unused);
      transpose_column_in_planes<kPlanes>(d_o + t * p.grad_out.t, p.grad_out.t, live, p.D_v, 1.0f,
                                          state.do_t, do_t_plane(), &unused);
      this->load_rows(head, t0 + t, live, state);
    }
    if (!row_major) return;
    const Index padded = s.num_columns * kColumn;
    pack_row_pairs_in_planes<kPlanes>(q, p.q.t, n, p.D, padded, 1.0f, s.q_rows, s.D_pad,
                                      q_rows_plane(s));
    pack_row_pairs_in_planes<kPlanes>(d_o, p.grad_out.t, n, p.D_v, padded, 1.0f, s.do_rows,
                                      s.D_v_pad, do_rows_plane(s));
    const auto clear = [&](const Element* row, Index D, Index i, float* pairs, Index D_pad,
                           Index plane_stride) {
      if (all_finite(row, D)) return;
      for (int plane = 0; plane < kPlanes; ++plane)
        clear_half(pairs + plane * plane_stride + i / 2 * D_pad, D_pad, i % 2);
    };
    for (Index i = 0; i < n; ++i) {
      if (this->has_no_keys(head, t0 + i))
        clear(d_o + i * p.grad_out.t, p.D_v, i, s.do_rows, s.D_v_pad, do_rows_plane(s));
      if (this->is_out_of_use(head, t0 + i))
        clear(q + i * p.q.t, p.D, i, s.q_rows, s.D_pad, q_rows_plane(s));
    }
  }

  // `packed`: the key head as PairKeyLayout has it; null: it is packed here.
  Keys load_keys(const Head<Element>& head, Index keys, const float* packed, Element*, Element*,
                 KeyGradients& to, BackwardScratch& s) const {
    const PairKeyLayout<Element, kPlanes> layout(p, head.S);
    if (!packed) {
      layout.pack(head, 0, head.S, s.keys);
      packed = s.keys;
    }
    const Index rows = round_up(keys, kTileSize);
    memset(to.dk, 0, rows * to.dk_row * sizeof(float));
    memset(to.dv, 0, rows * to.dv_row * sizeof(float));
    return layout.keys(head, packed);
  }

  void key_tile(const Head<Element>& head, Index t0, Index rows_in_block, const Segment& segment,
                Index key, Index n, Index, const Keys& keys, const KeyGradients& to,
                BackwardScratch& s) const {
    constexpr Index kUnit = kHasTiles ? kTileSize : 2;
    Index first = s.num_columns, last = 0;  // columns that see a key of the tile
    for (Index c = 0; c < s.num_columns; ++c) {
      const Column column = column_of(head, t0, rows_in_block, c, segment);
      Index begin = max_of(key, column.begin), end = min_of(key + n, column.end);
      if (begin >= end) continue;
      begin -= (begin - key) % kUnit;  // keys too many are masked by their position
      for (; last < c && last > first; ++last) clear_rows(s, last, 0, 0, n);
      first = min_of(first, c), last = c + 1;
      DeadKeys dead;
      pairs_tile(head, column, c, key, begin, end - begin, keys, s, &dead);
      if (to.dq) add_dq(column, c, key, begin - key, end - key, keys, dead, s);
      clear_rows(s, c, begin - key, end - key, n);
    }

    // dv, dk
    if (!to.dkv || first >= last) return;
    add_dkv(first, last, n, to.dk + key * to.dk_row, to.dv + key * to.dv_row, s);
  }

 private:
  static constexpr Index kDsPlane = kKeys / 2 * kColumn;

  Index q_t_plane() const { return round_up(p.D, kPanel) / 2 * kColumn; }
  Index do_t_plane() const { return round_up(p.D_v, kPanel) / 2 * kColumn; }

  // p_all and ds_all: from plane to plane.
  static Index tile_plane(const BackwardScratch& s) { return s.num_columns * kKeys * kPanelPairs; }
  static Index q_rows_plane(const BackwardScratch& s) {
    return s.num_columns * kPanelPairs * s.D_pad;
  }
  static Index do_rows_plane(const BackwardScratch& s) {
    return s.num_columns * kPanelPairs * s.D_v_pad;
  }

  static bool all_finite(const Element* row, Index D) {
    bool finite = true;
    for (Index d = 0; d < D; ++d) finite &= to_float(row[d]) - to_float(row[d]) == 0.0f;
    return finite;
  }

  // Clears one of the two rows that are paired.
  static void clear_half(float* pairs, Index n, bool odd) {
    const uint32_t others = odd ? 0x0000ffffu : 0xffff0000u;
    for (Index d = 0; d < n; d += kLanes)
      store(pairs + d, bit_cast<Vec>(bit_cast<UVec>(load(pairs + d)) & others));
  }

  // p and ds of column c and keys key .. key + n - 1 of the tile whose key 0 is `tile_key`: as rows
  // in p_all and ds_all, as pairs of keys in ds_pairs.
  void pairs_tile(const Head<Element>& head, const Column& column, Index c, Index tile_key,
                  Index key, Index n, const PairKeys& keys, BackwardScratch& s,
                  DeadKeys* dead) const {
    const BackwardColumn& state = s.columns[c];
    const auto rows_of = [](PairsA a, Index row) {
      a.data += row * a.row;
      return a;
    };
    // Scores
    const PairScores<kPlanes> scores{{state.q_t, kColumn, q_t_plane()},
                                     rows_of(keys.k, key),
                                     (p.D + kPanel - 1) / kPanel,
                                     kScalesProducts<kPlanes> ? head.units.factor : 1.0f};
    score_tile(head, column, key, n, scores, s.p_tile, s.dcapped, nullptr, dead);
    Tiles::spread_nan(state, n, s.p_tile);

    // dP
    multiply_pairs<kPlanes>(n, kColumn, (p.D_v + kPanel - 1) / kPanel, rows_of(keys.v, key),
                            PairsB{state.do_t, kColumn, do_t_plane()}, MatrixC{s.ds_tile, kColumn},
                            Start::kZero);
    if (p.dropout_p > 0.0) dropout_tile(head, column, key, n, keep_scale_of(p), s.z);
    if (p.grad_weights.data) this->weights_gradient_tile(head, column, key, n, s.dw);

    // Probabilities and ds
    const Index row = c * kKeys + key - tile_key;
    float *p_rows = s.p_all + row * kPanelPairs, *ds_rows = s.ds_all + row * kPanelPairs;
    float* ds_pairs = s.ds_pairs + (key - tile_key) % kPanel / 2 * kColumn;
    if (this->is_plain()) {
      gradients<true>(head, state, n, s, p_rows, ds_rows, ds_pairs);
    } else {
      gradients<false>(head, state, n, s, p_rows, ds_rows, ds_pairs);
    }
  }

  // p_tile, ds_tile: scores and dp, which become p * z and ds.
  template <bool kPlain>
  void gradients(const Head<Element>& head, const BackwardColumn& state, Index n,
                 const BackwardScratch& s, float* p_rows, float* ds_rows, float* ds_pairs) const {
    const float to_log2 = head.units.to_log2, to_natural = head.units.to_natural;
    const bool drops = p.dropout_p > 0.0, weighs = p.grad_weights.data != nullptr,
               capped = p.softcap > 0.0f;
    const Index plane = tile_plane(s);
    Vec m[kTileVecs], log2_l[kTileVecs], row_term[kTileVecs], dentropy[kTileVecs];
    ATTNFAST_UNROLL for (int v = 0; v < kTileVecs; ++v) {
      m[v] = load(state.norm.m + v * kLanes), log2_l[v] = load(state.norm.log2_l + v * kLanes);
      row_term[v] = load(state.row_term + v * kLanes);
      dentropy[v] = kPlain ? zeros() : load(state.dentropy + v * kLanes);
    }
    for (Index j = 0; j < n; j += 2) {
      Vec prob[2][kTileVecs], ds[2][kTileVecs];
      ATTNFAST_UNROLL for (Index k = 0; k < 2; ++k) {
        ATTNFAST_UNROLL for (int v = 0; v < kTileVecs; ++v) {
          const Index i = (j + k) * kColumn + v * kLanes;
          const Vec score = load(s.p_tile + i);
          Vec probability = Norm::probability(score, m[v], log2_l[v], to_log2);
          Vec dp = load(s.ds_tile + i);
          if (kPlain) {
            dp = probability * (dp + row_term[v]);
            prob[k][v] = probability;
          } else {
            Vec z = broadcast(1.0f);
            if (weighs) dp += load(s.dw + i);
            if (drops) z = load(s.z + i);
            dp = probability * (dp * z + row_term[v] - dentropy[v] * ((score - m[v]) * to_natural));
            if (capped) dp *= load(s.dcapped + i);
            prob[k][v] = probability * z;
          }
          ds[k][v] = probability == 0.0f ? zeros() : dp;
        }
      }
      if (j + 1 == n) {
        ATTNFAST_UNROLL for (int v = 0; v < kTileVecs; ++v) prob[1][v] = ds[1][v] = zeros();
      }
      ATTNFAST_UNROLL for (Index k = 0; k < 2; ++k) {
        if (j + k == n) break;
        store_row<kPlanes>(prob[k][0], prob[k][1], p_rows + (j + k) * kPanelPairs, plane);
        store_row<kPlanes>(ds[k][0], ds[k][1], ds_rows + (j + k) * kPanelPairs, plane);
      }
      ATTNFAST_UNROLL for (int v = 0; v < kTileVecs; ++v) {
        store_pairs<kPlanes>(ds[0][v], ds[1][v], ds_pairs + j / 2 * kColumn + v * kLanes, kDsPlane);
      }
    }
  }

  // dq += ds k for a column's keys begin .. end - 1, counted from the tile's first key.
  void add_dq(const Column& column, Index c, Index tile_key, Index begin, Index end,
              const PairKeys& keys, const DeadKeys& dead, BackwardScratch& s) const {
    const Index lead = begin % kPanel, first_panel = begin / kPanel;
    const Index panels = (end + kPanel - 1) / kPanel - first_panel;
    const Index last_pair = (lead + end - begin + 1) / 2;
    for (int plane = 0; plane < kPlanes; ++plane) {
      float* all = s.ds_pairs + plane * kDsPlane;
      memset(all, 0, lead / 2 * kColumn * sizeof(float));
      memset(all + last_pair * kColumn, 0,
             (panels * kPanelPairs - last_pair) * kColumn * sizeof(float));
    }
    PairsA k = keys.k_t;
    k.data += (tile_key / kPanel + first_panel) * k.panel_stride;
    const Index base = tile_key + first_panel * kPanel;
    const LiveKeys live{lead, lead + end - begin, column.begin - base, column.end - base, dead};
    k.data = without_poison<kPlanes>(k.data, k.panel_stride / kPanelPairs, k.plane_stride, panels,
                                     live, s.k_clean, &k.plane_stride);
    BackwardColumn& state = s.columns[c];
    multiply_pairs<kPlanes>(p.D, kColumn, panels, k, PairsB{s.ds_pairs, kColumn, kDsPlane},
                            MatrixC{state.dq_t, kColumn}, state.start);
    state.start = Start::kAccumulate;
  }

  // Zeroes the rows of column c outside first .. last - 1, up to the tile register that holds key
  // n - 1.
  static void clear_rows(const BackwardScratch& s, Index c, Index first, Index last, Index n) {
    const Index end = round_up(n, kTileSize);
    for (int which = 0; which < 2; ++which) {
      float* all = which ? s.ds_all : s.p_all;
      for (int plane = 0; plane < kPlanes; ++plane) {
        float* rows = all + plane * tile_plane(s) + c * kKeys * kPanelPairs;
        memset(rows, 0, first * kPanelPairs * sizeof(float));
        memset(rows + last * kPanelPairs, 0, (end - last) * kPanelPairs * sizeof(float));
      }
    }
  }

  // dk and dv of the tile's n keys += what the columns first .. last - 1 say; dk not yet scaled.
  void add_dkv(Index first, Index last, Index n, float* dk, float* dv,
               const BackwardScratch& s) const {
    const auto product = [&](const float* weights, const float* rows, Index row, Index plane,
                             float* to) {
      multiply_pairs<kPlanes>(n, row, last - first,
                              PairsA{weights + first * kKeys * kPanelPairs, kPanelPairs,
                                     kKeys * kPanelPairs, tile_plane(s)},
                              PairsB{rows + first * kPanelPairs * row, row, plane},
                              MatrixC{to, row}, Start::kAccumulate);
    };
    product(s.p_all, s.do_rows, s.D_v_pad, do_rows_plane(s), dv);
    product(s.ds_all, s.q_rows, s.D_pad, q_rows_plane(s), dk);
  }
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
