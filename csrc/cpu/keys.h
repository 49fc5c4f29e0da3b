// Keys and values as the forward's products read them: in place where they can be, else packed.
//
//   fp32         k in place; v in place, or copied where its rows lie far apart (see Use)
//   bf16, fp16   both in fp32
//   bf16 with AVX512_BF16: pairs of bf16. k in place, its pairs lie along the rows; v in pairs of
//                an even key and the next
//
// A key head is packed once: by the item that reads it where it is the only one, else by the team,
// for as many heads at a time as kPackedBytes holds, before its items begin.
#pragma once
#include <type_traits>

#include "arena.h"
#include "scores.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr size_t kPackedBytes = 4 << 20;
constexpr Index kPackedKeys = 256;  // packed by one item

template <class Element>
constexpr bool kPairsOf = kHasPairs && std::is_same<Element, BFloat16>::value;

// A tile: row 0 is its first key.
struct KeyTile {
  const float *k, *v;
  Index k_row, v_row;

  // From key `skip` of the tile on, an even one if there are pairs.
  template <class Element>
  KeyTile from(Index skip) const {
    return {k + skip * k_row, v + (kPairsOf<Element> ? skip / 2 : skip) * v_row, k_row, v_row};
  }
};

template <class Element>
struct KeyLayout {
  static constexpr Index kKeysPerVRow = kPairsOf<Element> ? 2 : 1;
  bool packs_k, packs_v;
  Index k_row, v_row;  // floats from a row to the next, packed or in place

  explicit KeyLayout(const Problem& p) {
    if constexpr (kPairsOf<Element>) {
      const View& k = p.k;
      packs_k = p.D % 2 || k.b % 2 || k.h % 2 || k.t % 2 ||
                reinterpret_cast<uintptr_t>(k.data) % alignof(float) != 0;
      packs_v = true;
      k_row = packs_k ? round_up(p.D, kLanes) : k.t / 2;
    } else {
      packs_k = RowsAsFloat<Element>::kPacks;
      packs_v = RowsAsFloat<Element>::kPacks || !RowsAsFloat<float>::lies_well(p.v.t, p.D_v);
      k_row = packs_k ? round_up(p.D, kLanes) : p.k.t;
    }
    v_row = packs_v ? round_up(p.D_v, kLanes) : p.v.t;
  }

  bool packs() const { return packs_k || packs_v; }

  // Floats that packed rows take, each part a multiple of a cache line.
  Index k_floats(Index keys) const { return packs_k ? round_up(keys * k_row, 16) : 0; }
  Index v_floats(Index keys) const {
    return packs_v ? round_up((keys + kKeysPerVRow - 1) / kKeysPerVRow * v_row, 16) : 0;
  }

  // Packs keys key .. key + n - 1; `key` is even if there are pairs.
  void pack(const Head<Element>& head, Index key, Index n, float* k_to, float* v_to) const {
    const Problem& p = head.problem;
    const Element *k = head.k + key * p.k.t, *v = head.v + key * p.v.t;
    if constexpr (kPairsOf<Element>) {
      if (packs_k) pack_pairs_along_rows(k, p.k.t, n, p.D, k_row, k_to);
      pack_pairs_of_rows(v, p.v.t, n, p.D_v, v_row, v_to);
    } else {
      if (packs_k) pack_rows(k, p.k.t, n, p.D, k_row, 1.0f, k_to);
      if (packs_v) pack_rows(v, p.v.t, n, p.D_v, v_row, 1.0f, v_to);
    }
  }

  // The tile of keys from `key` on, of a head whose packed rows begin at k and v.
  KeyTile tile(const Head<Element>& head, Index key, const float* k, const float* v) const {
    const Problem& p = head.problem;
    KeyTile tile{k + key * k_row, v + key / kKeysPerVRow * v_row, k_row, v_row};
    if (!packs_k) tile.k = reinterpret_cast<const float*>(head.k + key * p.k.t);
    if (!packs_v) tile.v = reinterpret_cast<const float*>(head.v + key * p.v.t);
    return tile;
  }
};

// The packed heads that a team works on.
template <class Element>
struct PackedHeads {
  const KeyLayout<Element> layout;
  const Index S;    // rows of a head
  Index most = 0;   // heads that fit; 0: items pack for themselves
  Index first = 0;  // of all key heads, b * H_kv + h_kv
  float* data = nullptr;

  PackedHeads(const Problem& p, Index items_per_key_head) : layout(p), S(p.S) {
    if (!layout.packs() || items_per_key_head < 2 || S == 0) return;
    const Index fits = static_cast<Index>(kPackedBytes / (floats() * sizeof(float)));
    most = min_of(max_of(fits, 1), p.B * p.H_kv);
    Arena& arena = team_arena();
    arena.reset(Arena::bytes_for<float>(most * floats()));
    data = arena.take<float>(most * floats());
  }
  ~PackedHeads() {
    if (most) team_arena().release();
  }

  Index floats() const { return layout.k_floats(S) + layout.v_floats(S); }
  float* k(Index head) const { return data + (head - first) * floats(); }
  float* v(Index head) const { return k(head) + layout.k_floats(S); }

  // Packs part `part` of a head's keys.
  void pack(const Problem& p, Index head_index, Index part) const {
    const Head<Element> head(p, head_index / p.H_kv, head_index % p.H_kv * (p.H / p.H_kv));
    const Index key = part * kPackedKeys, n = min_of(kPackedKeys, head.S - key);
    if (n <= 0) return;
    layout.pack(head, key, n, k(head_index) + key * layout.k_row,
                v(head_index) + key / layout.kKeysPerVRow * layout.v_row);
  }
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
