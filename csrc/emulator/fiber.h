// Fibers: a stack and a stack pointer each. Switching saves the callee-saved registers, nothing
// else.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator's fibers are written for x86-64"
#endif

extern "C" void attnfast_emulator_switch(void** save, void* resume);

namespace attnfast::emulator {

// Stacks of one host thread, used again block after block; the page below each one is not mapped.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 << 10, kGuard = 4096;

  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    for (char* stack : stacks_) munmap(stack, kBytes);
  }

  // The stack pointer of a fiber that will begin with a call of entry(), which must not return.
  void* begin(size_t index, void (*entry)()) {
    while (stacks_.size() <= index) {
      void* memory =
          mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, kGuard, PROT_NONE);
      stacks_.push_back(static_cast<char*>(memory));
    }
    void** sp = reinterpret_cast<void**>(stacks_[index] + kBytes - 16);
    *--sp = nullptr;  // where entry() would return to
    *--sp = reinterpret_cast<void*>(entry);
    return sp - 6;  // six registers, whatever they hold
  }

 private:
  std::vector<char*> stacks_;
};

}  // namespace attnfast::emulator
