#include "api.h"

#include <cstdio>
#include <exception>

#include "machine.h"

namespace {

using namespace attnfast::ptx;

Program& program_of(void* kernel) { return *static_cast<Program*>(kernel); }

}  // namespace

void* ptx_load(const char* text, const char* entry, char* message, int room) {
  try {
    return new Program(parse(text, entry));
  } catch (const std::exception& error) {
    snprintf(message, room, "%s", error.what());
    return nullptr;
  }
}

void ptx_free(void* kernel) { delete &program_of(kernel); }

int ptx_parameters(void* kernel, int* offsets, int* sizes, int room) {
  const auto& parameters = program_of(kernel).parameters;
  const int count = static_cast<int>(parameters.size());
  for (int n = 0; n < count && n < room; n++) {
    offsets[n] = parameters[n].offset, sizes[n] = parameters[n].size;
  }
  return count;
}

void ptx_runs(void* kernel, long* runs, int room) {
  const Program& program = program_of(kernel);
  for (size_t n = 0; n < program.runs.size(); n++) {
    const int line = program.code[n].line;
    if (line > 0 && line <= room) runs[line - 1] += program.runs[n];
  }
}

long ptx_launch(void* kernel, const uint32_t* grid, int threads, int dynamic_shared,
                const void* parameters, const PtxRange* ranges, int count, uint64_t seed,
                int options, char* message, int room) {
  Options asked;
  asked.seed = seed, asked.checks = options & kPtxChecks;
  asked.exact = options & kPtxExact, asked.rounded_sums = options & kPtxRoundedSums;
  try {
    Launch launch(program_of(kernel), asked);
    for (int n = 0; n < count; ++n) {
      launch.global.allow(ranges[n].begin, ranges[n].end, ranges[n].writable != 0);
    }
    launch.run({grid[0], grid[1], grid[2]}, threads, dynamic_shared, parameters);
    return launch.executed;
  } catch (const std::exception& error) {
    snprintf(message, room, "%s", error.what());
    return -1;
  }
}
