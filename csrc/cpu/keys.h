// Keys and values as the forward's products read them: in place where they can be, else packed.
//
//   fp32 products   fp32: k in place; v in place, or copied where its rows lie far apart (see Use)
//                   bf16, fp16: both in fp32
//   pairs (pairs.h) k in rows of pairs, in place where bf16 rows are whole panels; v transposed, in
//                   panels of 32 keys
//
// A key head is packed once: by the item that reads it where it is the only one, else by the team,
// for as many heads at a time as kPackedBytes holds, before its items begin.
#pragma once
#include "blocks.h"
#include "pairs.h"
#include "rows.h"
#include "team.h"

namespace attnfast::cpu::ATTNFAST_ISA {

constexpr size_t kPackedBytes = 4 << 20;
constexpr Index kPackedKeys = 256;  // packed by one item

// A tile: row 0 is its first key; v in pairs holds rows of panels.
struct KeyTile {
  const float *k, *v;
  Index k_row, v_row;
  Index k_plane = 0, v_plane = 0;
};

// Magnitudes of some keys and values.
struct Peaks {
  float k = 0.0f, v = 0.0f;

  bool in_range() const { return Peak::in_range(k) && Peak::worth_summing(v); }
};

// On pairs.
template <class Element, int kPlanes>
struct KeyLayout {
  Index panels;   // of a row of k
  Index D_v_pad;  // rows of a panel of v
  bool packs_k;
  Index k_row, v_row;  // floats from a key to the next; of a panel of v, from a row to the next

  explicit KeyLayout(const AttentionParams& p) {
    const View& k = p.k;
    panels = (p.D + kPanel - 1) / kPanel;
    D_v_pad = round_up(p.D_v, kTileSize);
    packs_k = kPlanes > 1 || p.D % kPanel || k.b % 2 || k.h % 2 || k.t % 2 ||
              reinterpret_cast<uintptr_t>(k.data) % alignof(float) != 0 ||
              (kHasTiles && (p.cu_seqlens_k || p.S % kTileSize));
    k_row = packs_k ? panels * kPanelPairs : k.t / 2;
    v_row = kPanelPairs;
  }

  bool packs() const { return true; }

  // From a plane to the next, and all planes, of so many keys.
  Index k_plane(Index keys) const { return packs_k ? round_up(keys, kTileSize) * k_row : 0; }
  Index v_plane(Index keys) const { return round_up(keys, kPanel) / 2 * D_v_pad; }
  Index k_floats(Index keys) const { return kPlanes * k_plane(keys); }
  Index v_floats(Index keys) const { return kPlanes * v_plane(keys); }
  Index v_offset(Index key) const { return key / 2 * D_v_pad; }

  // Packs keys key .. key + n - 1, `key` a multiple of 32, into the rows of key `key` of memory
  // laid out for `capacity` keys.
  void pack(const Head<Element>& head, Index key, Index n, float* k_to, float* v_to, Index capacity,
            Peaks* peaks) const {
    const AttentionParams& p = head.problem;
    const Element *k = head.k + key * p.k.t, *v = head.v + key * p.v.t;
    Peak k_peak, v_peak;
    if (packs_k) {
      pack_rows_in_planes<kPlanes>(k, p.k.t, n, p.D, round_up(n, kTileSize), k_to, k_row,
                                   k_plane(capacity), &k_peak);
    }
    pack_transposed_in_planes<kPlanes>(v, p.v.t, n, p.D_v, D_v_pad, v_to, v_plane(capacity),
                                       &v_peak);
    if (kPlanes > 1) *peaks = {k_peak.get(), v_peak.get()};
  }

  // The tile of keys from `key`, a multiple of 32, on, of a head whose packed rows begin at k and
  // v.
  KeyTile tile(const Head<Element>& head, Index key, const float* k, const float* v,
               Index capacity) const {
    if (!packs_k) k = reinterpret_cast<const float*>(head.k);
    return {k + key * k_row, v + v_offset(key), k_row, v_row, k_plane(capacity), v_plane(capacity)};
  }
};

// In fp32.
template <class Element>
struct KeyLayout<Element, 0> {
  bool packs_k, packs_v;
  Index k_row, v_row;  // floats from a row to the next, packed or in place

  explicit KeyLayout(const AttentionParams& p) {
    packs_k = RowsAsFloat<Element>::kPacks;
    packs_v = RowsAsFloat<Element>::kPacks || !RowsAsFloat<float>::lies_well(p.v.t, p.D_v);
    k_row = packs_k ? round_up(p.D, kLanes) : p.k.t;
    v_row = packs_v ? round_up(p.D_v, kLanes) : p.v.t;
  }

  bool packs() const { return packs_k || packs_v; }

  // Floats that packed rows take, each part a multiple of a cache line.
  Index k_floats(Index keys) const { return packs_k ? round_up(keys * k_row, 16) : 0; }
  Index v_floats(Index keys) const { return packs_v ? round_up(keys * v_row, 16) : 0; }
  Index v_offset(Index key) const { return key * v_row; }

  void pack(const Head<Element>& head, Index key, Index n, float* k_to, float* v_to, Index,
            Peaks*) const {
    const AttentionParams& p = head.problem;
    if (packs_k) pack_rows(head.k + key * p.k.t, p.k.t, n, p.D, k_row, 1.0f, k_to);
    if (packs_v) pack_rows(head.v + key * p.v.t, p.v.t, n, p.D_v, v_row, 1.0f, v_to);
  }

  KeyTile tile(const Head<Element>& head, Index key, const float* k, const float* v, Index) const {
    if (!packs_k) k = reinterpret_cast<const float*>(head.k);
    if (!packs_v) v = reinterpret_cast<const float*>(head.v);
    return {k + key * k_row, v + key * v_row, k_row, v_row};
  }
};

// The keys of a tile's panels that have a weight: first .. last - 1, counted from the first panel's
// first key, but for `dead` ones, counted from `first`; those outside begin .. end - 1 are masked
// by position.
struct LiveKeys {
  Index first, last, begin, end;
  const DeadKeys& dead;

  bool operator[](Index j) const {
    if (j < max_of(first, begin) || j >= min_of(last, end)) return false;
    return !dead.any || !dead.key[j - first];
  }
  bool all(Index keys) const {
    return !dead.any && first == 0 && last == keys && begin <= 0 && end >= keys;
  }
};

// Panels of transposed rows without what keys of weight zero hold, where that is NaN or Inf.
template <int kPlanes>
inline const float* without_poison(const float* rows, Index D_pad, Index plane_stride, Index panels,
                                   const LiveKeys& live, float* clean, Index* clean_plane) {
  if (live.all(panels * kPanel)) return rows;
  const float* result = rows;
  const Index panel_floats = D_pad * kPanelPairs;
  for (Index panel = 0; panel < panels; ++panel) {
    alignas(64) uint32_t halves[kPanelPairs] = {};  // the bits of dead keys
    for (Index j = 0; j < kPanel; ++j)
      if (!live[panel * kPanel + j]) halves[j / 2] |= j % 2 ? 0xffff0000u : 0x0000ffffu;
    UVec dead;
    memcpy(&dead, halves, sizeof dead);
    IVec poison{};
    for (Index d = 0; d < D_pad; ++d) {
      const UVec x = bit_cast<UVec>(load(rows + panel * panel_floats + d * kPanelPairs)) & dead;
      poison |= (x & 0x7f800000u) == 0x7f800000u;
      poison |= (x & 0x00007f80u) == 0x00007f80u;
    }
    if (!any(poison)) continue;
    if (result == rows) {
      *clean_plane = panels * panel_floats;
      for (int plane = 0; plane < kPlanes; ++plane)
        memcpy(clean + plane * *clean_plane, rows + plane * plane_stride,
               *clean_plane * sizeof(float));
      result = clean;
    }
    for (int plane = 0; plane < kPlanes; ++plane) {
      for (Index d = 0; d < D_pad; ++d) {
        float* x = clean + plane * *clean_plane + panel * panel_floats + d * kPanelPairs;
        store(x, bit_cast<Vec>(bit_cast<UVec>(load(x)) & ~dead));
      }
    }
  }
  return result;
}

// The packed heads that a team works on: consecutive ones, as many as kPackedBytes holds; in more
// planes than one, which cost more to make, at least one of any length.
template <class Element, int kPlanes>
class PackedHeads {
 public:
  const KeyLayout<Element, kPlanes> layout;

  PackedHeads(const AttentionParams& p, Index items_per_key_head)
      : layout(p),
        heads_(p.B * p.H_kv),
        panels_(p.cu_seqlens_k, p.B, p.H_kv, p.S, kPanel),
        parts_(p.cu_seqlens_k, p.B, p.H_kv, p.S, kPackedKeys) {
    if (!layout.packs() || panels_.count() == 0) return;
    most_panels_ = static_cast<Index>(kPackedBytes / (panel_floats() * sizeof(float)));
    const Index longest = (p.S + kPanel - 1) / kPanel;
    if (kPlanes < 2 && (items_per_key_head < 2 || longest > most_panels_)) return;
    const Index panels = min_of(max_of(most_panels_, longest), panels_.count());
    const auto cut = [&](Parts parts) {
      data_ = parts.take<float>(panels * panel_floats());
      peaks_ = parts.take<Peaks>(kPlanes > 1 ? panels : 0);
      return parts.bytes();
    };
    by_team_ = true;
    memory_ = Arena(cut(Parts()), p.footprint);
    cut(Parts(memory_.data()));
  }

  // Whether the team packs; else items do, for themselves.
  bool by_team() const { return by_team_; }

  // Packs the heads from `first` (b * H_kv + h_kv) on; returns the first that is not.
  Index pack_from(const AttentionParams& p, Index first) {
    first_ = first;
    Index last = first + 1;
    while (last < heads_ && panels_.first_of(last + 1) - panels_.first_of(first) <= most_panels_)
      ++last;
    struct Nothing {
      Worker* worker = nullptr;
    };
    const Index first_part = parts_.first_of(first);
    parallel(
        p, parts_.first_of(last) - first_part, 1, [](Parts&) { return Nothing(); },
        [&](Index i, Nothing&) { pack(p, parts_[first_part + i], first_part + i); });
    return last;
  }

  // Of the head in work numbered b * H_kv + h_kv.
  Index capacity(Index head) const {  // rows
    return (panels_.first_of(head + 1) - panels_.first_of(head)) * kPanel;
  }
  float* k(Index head) const {
    return data_ + (panels_.first_of(head) - panels_.first_of(first_)) * panel_floats();
  }
  float* v(Index head) const { return k(head) + layout.k_floats(capacity(head)); }

  // Whether planes serve for a head.
  bool in_range(Index head) const {
    Peaks most_of_all;
    const Index end = parts_.first_of(head + 1);
    for (Index part = parts_.first_of(head); part < end; ++part) {
      const Peaks& peak = peaks_[part - parts_.first_of(first_)];
      if (peak.k > most_of_all.k) most_of_all.k = peak.k;
      if (peak.v > most_of_all.v) most_of_all.v = peak.v;
    }
    return most_of_all.in_range();
  }

 private:
  Index panel_floats() const { return layout.k_floats(kPanel) + layout.v_floats(kPanel); }

  void pack(const AttentionParams& p, const Block& part, Index number) const {
    const Head<Element> head(p, part.b, part.h * (p.H / p.H_kv));
    const Index head_index = part.b * p.H_kv + part.h;
    const Index key = part.index * kPackedKeys, n = min_of(kPackedKeys, head.S - key);
    Peaks peak;
    layout.pack(head, key, n, k(head_index) + key * layout.k_row,
                v(head_index) + layout.v_offset(key), capacity(head_index), &peak);
    if (kPlanes > 1) peaks_[number - parts_.first_of(first_)] = peak;
  }

  Index heads_, most_panels_ = 0, first_ = 0;
  bool by_team_ = false;
  Blocks panels_, parts_;  // of all key heads
  Arena memory_;
  float* data_ = nullptr;   // k and v of each head in work
  Peaks* peaks_ = nullptr;  // of each part
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
