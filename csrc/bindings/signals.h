// Ctrl-C: whether a handler of Python's signals has raised while a kernel runs.
//
// The library is linked to no Python: its functions are looked up in the process, and where there
// is none, nothing is asked. Python runs handlers in the main thread only, so no other asks.
//
// What a handler raised is raised again by Python itself as soon as the interrupted operator is
// back in it: a pending call puts it in place of the operator's RuntimeError.
#pragma once
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

namespace attnfast::bindings {

struct Python {
  int (*is_initialized)();
  int (*ensure_gil)();
  void (*release_gil)(int);
  int (*check_signals)();
  void (*fetch)(void**, void**, void**);
  void (*restore)(void*, void*, void*);
  int (*add_pending_call)(int (*)(void*), void*);

  Python() {
    find("Py_IsInitialized", &is_initialized), find("PyGILState_Ensure", &ensure_gil);
    find("PyGILState_Release", &release_gil), find("PyErr_CheckSignals", &check_signals);
    find("PyErr_Fetch", &fetch), find("PyErr_Restore", &restore);
    find("Py_AddPendingCall", &add_pending_call);
  }

  bool runs() const {
    return is_initialized && ensure_gil && release_gil && check_signals && fetch && restore &&
           add_pending_call && is_initialized();
  }

 private:
  template <class Function>
  static void find(const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
};

inline const Python& python() {
  static const Python found;
  return found;
}

inline int raise_again(void* raised) {
  void** error = static_cast<void**>(raised);
  python().restore(error[0], error[1], error[2]);
  return -1;
}

// Called by the main thread alone; looks at the clock, and ten times a second asks Python.
inline bool interrupted() {
  using Clock = std::chrono::steady_clock;
  static Clock::time_point last;
  static void* raised[3];  // type, value, traceback
  const Clock::time_point now = Clock::now();
  if (now - last < std::chrono::milliseconds(100)) return false;
  last = now;
  const int gil = python().ensure_gil();
  const bool stops = python().check_signals() != 0;
  if (stops) {
    python().fetch(&raised[0], &raised[1], &raised[2]);
    python().add_pending_call(raise_again, raised);
  }
  python().release_gil(gil);
  return stops;
}

// What a call of so many multiply-adds may ask; null where it is short, or nobody can answer.
inline bool (*interrupts_of(double work))() {
  constexpr double kLong = 1 << 30;  // a tenth of a second on slow cores
  if (work < kLong || getpid() != syscall(SYS_gettid) || !python().runs()) return nullptr;
  return interrupted;
}

}  // namespace attnfast::bindings
