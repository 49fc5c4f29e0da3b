// How the backward's key heads are shared out among threads, and how dq is handed on where one key
// head's ranges of keys belong to several.
#pragma once
#include <atomic>
#include <new>
#include <thread>

#include "attention_bwd_tiles.h"

namespace attnfast::cpu::ATTNFAST_ISA {

// whole   one item per key head: 5 products
// linked  one item per range of keys of it, each a block of queries behind the one before
// apart   dq by blocks of queries, dk and dv by ranges of keys: 7 products, nobody waits
enum class Way { kWhole, kLinked, kApart };

// A link's keys: a few items for each thread, so that the last ones are short.
inline Index keys_per_link(const AttentionParams& p) {
  constexpr Index kMost = 512, kLinksPerThread = 8;
  const Index fair = p.S / (usable_threads(p.num_threads) * kLinksPerThread);
  return min_of(max_of(round_up(fair, kKeys), kKeys), kMost);
}

// The soonest. Time is counted in products of all pairs by one thread.
template <class Element>
Way way_of(const BackwardParams& p, Index block_rows) {
  constexpr double kKeysPerLoad = 12.0;  // as long as the products with them takes loading a block
  const Index heads = p.B * p.H_kv, threads = usable_threads(p.num_threads);
  if (threads == 1 || heads == 0) return Way::kWhole;
  const Index lengths = p.cu_seqlens_q ? p.B : 1;
  double longest = 0.0, all = 0.0;  // of one head each
  for (Index b = 0; b < lengths; ++b) {
    const Head<Element> head(p, b, 0);
    const double pairs = static_cast<double>(head.T) * head.S;
    longest = pairs > longest ? pairs : longest, all += pairs;
  }
  if (all == 0.0) return Way::kWhole;
  all *= static_cast<double>(heads / lengths);
  const double fair = all / threads;
  const double most_whole = p.cu_seqlens_q ? fair + longest * (threads - 1) / threads
                                           : longest * ((heads + threads - 1) / threads);
  const Index blocks = p.H / p.H_kv * ((p.T + block_rows - 1) / block_rows);
  const Index keys = keys_per_link(p), links = (p.S + keys - 1) / keys;
  const double whole = 5 * most_whole;
  const double linked =
      5 * (1.0 + kKeysPerLoad / keys) * (fair + longest / blocks + longest / links / 2);
  const double apart = 7 * fair;
  // In a block mask's row full blocks come before partial ones, whatever range they are of.
  if (!p.blocks.starts && linked < whole && linked < apart) return Way::kLinked;
  return whole <= apart ? Way::kWhole : Way::kApart;
}

// dq of one key head's queries on its way from a range of keys to the next.
class Link {
 public:
  // dq_t: [D rounded up][kColumn] of every column of queries, numbered by `columns`.
  // done: of every range, how many blocks of queries it is done with; before: null in the first.
  Link(const Blocks& columns, Index H, Index D, float* dq_t, const std::atomic<Index>* before,
       std::atomic<Index>* done, bool last)
      : columns_(columns),
        H_(H),
        floats_(column_floats(D)),
        dq_t_(dq_t),
        before_(before),
        done_(done),
        last_(last) {}

  static Index column_floats(Index D) { return round_up(D, kTileSize) * kColumn; }

  Start start() const { return before_ ? Start::kAccumulate : Start::kZero; }
  bool last() const { return last_; }

  float* dq_t(Index b, Index h, Index t) const {
    return dq_t_ + (columns_.first_of(b * H_ + h) + t / kColumn) * floats_;
  }

  // Until the range before is done with the next block; false where the call is stopped. Items are
  // taken in order, so that somebody is at work on it.
  bool wait(Worker* worker) const {
    constexpr Index kPairsPerLook = 1 << 12;
    while (before_ && before_->load(std::memory_order_acquire) <= blocks_) {
      if (worker->stops(kPairsPerLook)) return false;
      std::this_thread::yield();
    }
    return true;
  }

  void hand_on() { done_->store(++blocks_, std::memory_order_release); }

 private:
  const Blocks& columns_;
  Index H_, floats_, blocks_ = 0;
  float* dq_t_;
  const std::atomic<Index>* before_;
  std::atomic<Index>* done_;
  bool last_;
};

}  // namespace attnfast::cpu::ATTNFAST_ISA
