// Scratch memory of one thread: kept between calls while small, so that short calls pay no page
// faults.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace attnfast::cpu {

class Arena {
 public:
  // One block for the whole call; earlier contents are gone. 64-byte aligned.
  char* reset(size_t bytes) {
    used_ = 0;
    if (bytes > size_) {
      free(data_);
      data_ = static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes_for<T>(count);
    return p;
  }

  template <class T>
  static size_t bytes_for(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

  // Gives large blocks back.
  void release() {
    if (size_ > kKeep) {
      free(data_);
      data_ = nullptr;
      size_ = 0;
    }
  }

  ~Arena() { free(data_); }

 private:
  static constexpr size_t kKeep = 8 << 20;
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// The calling thread's arena.
Arena& thread_arena();

// The calling thread's other arena, for what all threads of its parallel region read.
Arena& team_arena();

// How many threads a parallel region may have: `wanted`, or one in a forked child, where OpenMP's
// threads of the parent no longer exist.
int usable_threads(int wanted);

}  // namespace attnfast::cpu
