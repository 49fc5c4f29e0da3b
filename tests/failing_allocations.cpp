// Preloaded by test_out_of_memory.py: of the allocations that the native library makes, and that
// torch makes for tensors, the n-th fails.
#include <dlfcn.h>

#include <cerrno>
#include <cstring>
#include <new>

extern "C" void* __libc_malloc(size_t size);
extern "C" void* __libc_memalign(size_t alignment, size_t size);

static long left = 0;  // allocations up to the one that fails; 0: none does

extern "C" void fail_at(long n) { left = n; }
extern "C" long allocations_left() { return left; }

static bool fails(void* caller, const char* library) {
  Dl_info info;
  if (!left || !dladdr(caller, &info) || !strstr(info.dli_fname, library)) return false;
  return --left == 0;
}
#define FAILS(library) fails(__builtin_return_address(0), library)

extern "C" void* malloc(size_t size) { return FAILS("_native") ? nullptr : __libc_malloc(size); }

extern "C" void* aligned_alloc(size_t alignment, size_t size) {
  return FAILS("_native") ? nullptr : __libc_memalign(alignment, size);
}

extern "C" int posix_memalign(void** to, size_t alignment, size_t size) {
  void* memory = FAILS("libc10") ? nullptr : __libc_memalign(alignment, size);
  if (!memory) return ENOMEM;
  *to = memory;
  return 0;
}

void* operator new(size_t size) {
  void* memory = FAILS("_native") ? nullptr : __libc_malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void* operator new[](size_t size) {
  void* memory = FAILS("_native") ? nullptr : __libc_malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}
