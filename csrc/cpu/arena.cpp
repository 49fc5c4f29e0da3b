#include "arena.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

namespace attnfast::cpu {
namespace {

constexpr size_t kKeep = 8 << 20;  // bytes per thread up to which a block is kept
constexpr size_t kMost = SIZE_MAX / 2;

struct alignas(64) Header {  // the block follows
  size_t bytes;
};

// The blocks kept: atomic slots, since locks do not survive a fork, nor thread-local memory that it
// cannot be had (the C library then ends the process).
std::atomic<Header*> kept[16];

Header* borrow(size_t bytes) {
  for (auto& slot : kept) {
    if (!slot.load(std::memory_order_relaxed)) continue;
    Header* header = slot.exchange(nullptr, std::memory_order_acquire);
    if (header && header->bytes >= bytes) return header;
    free(header);  // too small: a larger one takes its place
  }
  return nullptr;
}

void give_back(Header* header, int threads) {
  if (header->bytes <= kKeep * threads) {
    for (auto& slot : kept) {
      Header* none = nullptr;
      if (slot.compare_exchange_strong(none, header, std::memory_order_release,
                                       std::memory_order_relaxed))
        return;
    }
  }
  free(header);
}

// Before a fork OpenMP's threads end, and begin anew where they are wanted: the child would wait for
// ever for those of its parent, in torch's operators too.
void end_threads() {
  constexpr int kSoft = 1;  // omp_pause_soft
  static const auto end =
      reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  if (end) end(kSoft);
}

[[maybe_unused]] const int registered = pthread_atfork(end_threads, nullptr, nullptr);

}  // namespace

Arena::Arena(size_t bytes, Footprint* footprint, int threads)
    : threads_(threads), bytes_(bytes), footprint_(footprint) {
  if (footprint) {
    footprint->held += static_cast<int64_t>(bytes);
    footprint->most = std::max(footprint->most, footprint->held);
    return;
  }
  if (!bytes) return;
  Header* header = borrow(bytes);
  if (!header) {
    const size_t rounded = (bytes + 63) / 64 * 64;
    if (bytes <= kMost)
      header = static_cast<Header*>(aligned_alloc(alignof(Header), sizeof(Header) + rounded));
    if (!header) throw OutOfMemory(bytes);
    header->bytes = bytes;
  }
  data_ = reinterpret_cast<char*>(header + 1);
}

Arena::~Arena() {
  if (footprint_) footprint_->held -= static_cast<int64_t>(bytes_);
  if (data_) give_back(reinterpret_cast<Header*>(data_) - 1, threads_);
}

int usable_threads(int wanted) {
  static const pid_t loaded_in = getpid();
  return getpid() == loaded_in ? wanted : 1;
}

}  // namespace attnfast::cpu
