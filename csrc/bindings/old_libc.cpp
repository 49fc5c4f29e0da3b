// What newer compilers and C libraries have a library ask for, in terms of older ones: it then runs
// where glibc is 2.28 and GCC was 8.
#include <features.h>
#include <pthread.h>
#include <time.h>

#include <sstream>

// GCC 9: streams without arguments.
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

extern "C" {

// glibc 2.32: whether there is one thread. Never said, libstdc++ counts atomically.
char __libc_single_threaded = 0;

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

// glibc 2.34 has these in libc, under a new version; before they were in libdl, libpthread and
// librt. What names no version, as CUDA's runtime, gets their first one here. Each is in a section
// of its own: the linker leaves out those that nobody calls.
#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
#define ATTNFAST_VERSION "GLIBC_2.2.5"
#define ATTNFAST_VERSION_OF_DLMOPEN "GLIBC_2.3.4"
#define ATTNFAST_GO "jmp first_\\name@PLT\n"
#else
#define ATTNFAST_VERSION "GLIBC_2.17"
#define ATTNFAST_VERSION_OF_DLMOPEN ATTNFAST_VERSION
#define ATTNFAST_GO "b first_\\name\n"
#endif
__asm__(".symver first_dlmopen, dlmopen@" ATTNFAST_VERSION_OF_DLMOPEN
        "\n"
        ".macro older names:vararg\n"
        ".irp name, \\names\n"
        ".ifnc \\name, dlmopen\n"
        ".symver first_\\name, \\name@" ATTNFAST_VERSION
        "\n"
        ".endif\n"
        ".section .text.\\name, \"ax\", %progbits\n"
        ".globl \\name\n"
        ".hidden \\name\n"
        ".type \\name, %function\n"
        "\\name:\n" ATTNFAST_GO
        ".previous\n"
        ".endr\n"
        ".endm\n"
        "older dlclose, dlerror, dlmopen, dlopen, dlsym, dlvsym, pthread_condattr_setpshared\n"
        "older pthread_create, pthread_detach, pthread_getspecific, pthread_join\n"
        "older pthread_key_create, pthread_key_delete, pthread_kill, pthread_mutex_trylock\n"
        "older pthread_mutexattr_destroy, pthread_mutexattr_init, pthread_mutexattr_setpshared\n"
        "older pthread_mutexattr_settype, pthread_once, pthread_rwlock_destroy\n"
        "older pthread_rwlock_init, pthread_rwlock_rdlock, pthread_rwlock_timedrdlock\n"
        "older pthread_rwlock_timedwrlock, pthread_rwlock_tryrdlock, pthread_rwlock_trywrlock\n"
        "older pthread_rwlock_unlock, pthread_rwlock_wrlock, pthread_rwlockattr_destroy\n"
        "older pthread_rwlockattr_init, pthread_rwlockattr_setpshared, pthread_setspecific\n"
        "older pthread_spin_destroy, pthread_spin_init, pthread_spin_lock\n"
        "older pthread_spin_trylock, pthread_spin_unlock, sem_destroy, sem_init, sem_post\n"
        "older sem_timedwait, sem_trywait, sem_wait, shm_open, shm_unlink\n");
#endif
