// What newer compilers and C libraries have a library ask for, in terms of older ones: linked into
// the Hub's library, which then runs where glibc is 2.28 and GCC was 8.
#include <pthread.h>
#include <time.h>

#include <sstream>

// GCC 9: streams without arguments.
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

extern "C" {

// glibc 2.32: whether there is one thread. Never said, libstdc++ counts atomically.
char __libc_single_threaded = 0;

// glibc 2.34, which has it in libc; before it was in libdl, which torch loads.
void* older_dlsym(void* handle, const char* name);
#if defined(__x86_64__)
__asm__(".symver older_dlsym, dlsym@GLIBC_2.2.5");
#else
__asm__(".symver older_dlsym, dlsym@GLIBC_2.17");
#endif
void* dlsym(void* handle, const char* name) { return older_dlsym(handle, name); }

// glibc 2.30: a wait that ends by any clock. Here by the wall clock, after the time that is left.
int pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t clock,
                           const timespec* end) {
  constexpr long kSecond = 1000000000;
  timespec now, wall;
  clock_gettime(clock, &now);
  clock_gettime(CLOCK_REALTIME, &wall);
  wall.tv_sec += end->tv_sec - now.tv_sec;
  wall.tv_nsec += end->tv_nsec - now.tv_nsec;
  if (wall.tv_nsec < 0) wall.tv_nsec += kSecond, --wall.tv_sec;
  if (wall.tv_nsec >= kSecond) wall.tv_nsec -= kSecond, ++wall.tv_sec;
  return pthread_cond_timedwait(condition, mutex, &wall);
}
}
