// Launching a kernel on the emulator: several blocks at a time, one per host thread.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"

namespace attnfast::emulator {

// What stands for a stream: the memory of the call, and what has been asked of the emulator.
struct Session {
  Memory memory;
  Gpu gpu;
  int host_threads = 1;
};

// The GPU to play: ATTNFAST_EMULATOR_ARCH, one of 75, 80, 86, 89, 90, 100 and 120; else 80.
//   Raises std::invalid_argument for others.
Gpu asked_for();

// Set from outside between launches.
struct Settings {
  Sabotage sabotage;
  bool counting = false;
  std::string ptx;  // the folder of the PTX that runs instead of the kernels' C++; "" for none
};
Settings& settings();

// The counts of all launches since counting began.
Counts& counted();

// The seed of the schedule: ATTNFAST_EMULATOR_SEED, or 0.
uint64_t schedule();

// Raises std::runtime_error for a launch that the session's GPU would refuse.
void check_launch(const Launch& launch, const Session& session);

// Runs all blocks, in order of their index as far as host threads are free.
//   Raises std::runtime_error with the first fault.
void run_blocks(Launch launch, const Session& session);

// The lines of a .ptx file that have run since it was loaded.
std::vector<int> ptx_lines(const std::string& file);

// Runs the PTX of the kernel that has this function's name, which the library exports.
//   Raises std::runtime_error with the fault, or if there is none in the folder of the settings.
void run_ptx(const void* kernel, const Launch& launch, const Session& session, const void* params);

template <class Kernel, class Params>
void launch(const std::string& name, Kernel kernel, int64_t blocks, int threads, int shared_bytes,
            const Session& session, const Params& params) {
  Launch launch;
  launch.kernel = name, launch.threads = threads, launch.shared_bytes = shared_bytes;
  launch.blocks = blocks;
  if (!settings().ptx.empty()) {
    return run_ptx(reinterpret_cast<const void*>(kernel), launch, session, &params);
  }
  launch.body = [kernel, &params] { kernel(params); };
  run_blocks(std::move(launch), session);
}

}  // namespace attnfast::emulator
