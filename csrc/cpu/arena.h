// Scratch memory of a call: whole blocks, small ones kept for the next call, so that short calls
// pay no page faults; and the parts that a block is cut into.
//
// A kernel's scratch is known without a second formula: with a Footprint (params.h) the kernel runs
// its own way through its blocks, which then count themselves and hold nothing, and through
// parallel regions (team.h), whose bodies are left out.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "../params.h"

namespace attnfast::cpu {

struct OutOfMemory : std::bad_alloc {
  explicit OutOfMemory(size_t wanted) : bytes(wanted) {}
  const char* what() const noexcept override { return "no memory"; }
  size_t bytes;
};

// A block that lives as long as this; 64-byte aligned, its contents undefined; null with a
// footprint, in which it is counted.
//   Raises OutOfMemory: never inside a parallel region, which no exception may leave (team.h).
class Arena {
 public:
  Arena() = default;
  // `threads`: how many share the block.
  explicit Arena(size_t bytes, Footprint* footprint = nullptr, int threads = 1);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(Arena&& other) noexcept {
    std::swap(data_, other.data_), std::swap(threads_, other.threads_);
    std::swap(bytes_, other.bytes_), std::swap(footprint_, other.footprint_);
    return *this;
  }

  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  int threads_ = 1;
  size_t bytes_ = 0;
  Footprint* footprint_ = nullptr;
};

// Parts of a block, one after the other; without a block all are null and only their sizes count.
class Parts {
 public:
  explicit Parts(char* block = nullptr) : block_(block) {}

  // A multiple of a cache line; null if it is empty.
  template <class T>
  T* take(int64_t count) {
    T* part = block_ && count ? reinterpret_cast<T*>(block_ + bytes_) : nullptr;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return part;
  }

  size_t bytes() const { return bytes_; }

 private:
  char* block_;
  size_t bytes_ = 0;
};

// How many threads a parallel region may have: `wanted`, or one in a child that was forked after a
// call, beside which there are others.
int usable_threads(int wanted);

}  // namespace attnfast::cpu
