// Parallel regions: items shared out one by one among threads that have scratch of their own.
//
// No exception may leave a region: OpenMP would end the process. All memory is therefore there
// before a region begins, and what runs inside neither allocates nor throws.
//
// Long calls can be interrupted: the calling thread asks now and then (params.h, `interrupted`),
// also while it waits for the others, and all threads end at their next question.
#pragma once
#include <omp.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>

#include "arena.h"
#include "elements.h"
#include "tile_registers.h"

namespace attnfast::cpu::ATTNFAST_ISA {

class Interrupt {
 public:
  explicit Interrupt(bool (*asked)()) : asked_(asked) { ask(); }

  bool possible() const { return asked_ != nullptr; }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

  // By the calling thread.
  void ask() {
    if (asked_ && asked_()) stopped_.store(true, std::memory_order_relaxed);
  }

  // Called by each thread but the calling one when it has done its part ...
  void finish(int others) {
    if (!asked_ || finished_.fetch_add(1) + 1 < others) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    all_finished_.notify_one();
  }

  // ... which waits for them.
  void wait_for(int others) {
    constexpr int kSpins = 2000;
    constexpr std::chrono::milliseconds kPause{100};
    for (int i = 0; i < kSpins && asked_ && finished_.load() < others; ++i) pause();
    while (asked_ && finished_.load() < others) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        all_finished_.wait_for(lock, kPause, [&] { return finished_.load() >= others; });
      }
      ask();
    }
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  bool (*const asked_)();
  std::atomic<bool> stopped_{false};
  std::atomic<int> finished_{0};
  std::mutex mutex_;
  std::condition_variable all_finished_;
};

// One thread of a region.
class Worker {
 public:
  Worker(Interrupt* interrupt, bool calls) : interrupt_(interrupt), asks_(calls) {
    asks_ &= interrupt->possible();
  }

  // Whether to end early. `pairs`: of a query and a key, worked on since the last question.
  bool stops(Index pairs) {
    constexpr Index kPairsPerLook = 1 << 20;  // milliseconds
    if (asks_ && (pairs_ += pairs) >= kPairsPerLook) {
      pairs_ = 0;
      interrupt_->ask();
    }
    return interrupt_->stopped();
  }

 private:
  Interrupt* interrupt_;
  bool asks_;
  Index pairs_ = 0;
};

// Calls body(item, scratch) for every item, on at most p.num_threads threads.
//   chunk    how many consecutive items a thread takes at once
//   prepare  Parts& -> scratch, whose `worker` is filled in here; also called without memory, to
//            sum up its parts
//   Raises OutOfMemory, or std::runtime_error where the call was interrupted.
template <class Params, class Prepare, class Body>
void parallel(const Params& p, Index items, Index chunk, const Prepare& prepare, const Body& body) {
  if (items <= 0) return;
  const int threads = items > 1 ? usable_threads(p.num_threads) : 1;
  const Index busy = min_of(
      threads, (items + chunk - 1) / chunk);  // a team keeps its size: changing it costs more
  Parts sizes;
  prepare(sizes);
  const size_t page = busy > 1 ? 4096 : 64, bytes = (sizes.bytes() + page - 1) / page * page;
  const Arena arena(bytes * busy, p.footprint, static_cast<int>(busy));
  if (p.footprint) return;
  Interrupt interrupt(p.interrupted);
  std::atomic<Index> next{0};
  const auto work = [&](Index thread) noexcept {
    const TileRegisters registers;
    Worker worker(&interrupt, thread == 0);
    Parts parts(arena.data() + thread * bytes);
    auto scratch = prepare(parts);
    scratch.worker = &worker;
    for (Index first; (first = next.fetch_add(chunk, std::memory_order_relaxed)) < items;) {
      for (Index item = first; item < min_of(first + chunk, items); ++item) {
        if (worker.stops(1)) return;
        body(item, scratch);
      }
    }
  };
  if (busy == 1) {
    work(0);
  } else {
#pragma omp parallel num_threads(threads)
    {
      const Index thread = omp_get_thread_num();
      const int others = static_cast<int>(min_of(omp_get_num_threads(), busy)) - 1;
      if (thread < busy) work(thread);
      if (thread == 0) interrupt.wait_for(others);
      if (thread > 0 && thread < busy) interrupt.finish(others);
    }
  }
  if (interrupt.stopped()) throw std::runtime_error("attnfast: interrupted");
}

}  // namespace attnfast::cpu::ATTNFAST_ISA
