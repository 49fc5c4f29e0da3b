// What blocks of one launch hand to each other through global memory: whether what a warp reads had
// been passed on to it, whatever the schedule; and whether all wait in vain. Warps are numbered
// through all blocks.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace attnfast::emulator {

class Handed {
 public:
  void store(const void* address, int64_t warp) {
    const std::lock_guard<std::mutex> lock(mutex_);
    stored_[address] = {warp, ++seen_[warp][warp]};
  }
  // Whether a warp may read what was stored there last: its own, or passed on to it since.
  bool may_load(const void* address, int64_t warp) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = stored_.find(address);
    if (found == stored_.end()) return false;
    const auto [writer, number] = found->second;
    return seen_[warp][writer] >= number;
  }
  // All that a warp has stored, and all that was passed on to it, is passed on by store(), to `turn`.
  template <class Store>
  void pass(const void* turn, int64_t warp, Store store) {
    const std::lock_guard<std::mutex> lock(mutex_);
    join(&passed_[turn], seen_[warp]);
    store();
    ++passes_;
    stuck_.clear();
  }
  void take(const void* turn, int64_t warp) {
    const std::lock_guard<std::mutex> lock(mutex_);
    join(&seen_[warp], passed_[turn]);
  }
  int64_t passes() const { return passes_; }
  // A block has waited in vain since so many passes, and its other lanes too: whether `all` blocks
  // that run have.
  bool in_vain(int64_t block, int64_t passes, int all) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (passes != passes_) return false;
    stuck_.insert(block);
    return static_cast<int>(stuck_.size()) == all;
  }

 private:
  using Clock = std::map<int64_t, int64_t>;  // by warp: how many of its stores
  static void join(Clock* to, const Clock& from) {
    for (const auto& [warp, number] : from) {
      int64_t& mine = (*to)[warp];
      mine = mine < number ? number : mine;
    }
  }

  std::mutex mutex_;
  std::map<const void*, std::pair<int64_t, int64_t>> stored_;  // the writer, and its store's number
  std::map<int64_t, Clock> seen_;
  std::map<const void*, Clock> passed_;
  std::atomic<int64_t> passes_{0};
  std::set<int64_t> stuck_;  // blocks, since the last pass
};

}  // namespace attnfast::emulator
