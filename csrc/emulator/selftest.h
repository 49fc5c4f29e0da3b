// Small kernels with bugs planted on demand: each one has to be noticed.
#pragma once
#include <string>

namespace attnfast::emulator {

// Runs the kernel of that name with the bug of that name, "" for none.
//   Raises std::runtime_error if the emulator finds a fault or the kernel's result is wrong;
//   std::invalid_argument if there is no such kernel.
void run_selftest(const std::string& kernel, const std::string& bug);

}  // namespace attnfast::emulator
