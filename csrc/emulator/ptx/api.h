// The PTX machine's interface, in C: for ctypes, and for the launches of the CUDA kernels.
//
// Messages are written to `message`, which has room for `room` bytes, its end included.
#pragma once
#include <cstdint>

#define ATTNFAST_PTX_API extern "C" __attribute__((visibility("default")))

// Global memory that a kernel may access: addresses from begin to before end.
struct PtxRange {
  uint64_t begin, end, writable;
};

// Reads a kernel of a PTX text: `entry`, or the first if that is "". Null, with a message, if it
// holds what the machine does not know.
ATTNFAST_PTX_API void* ptx_load(const char* text, const char* entry, char* message, int room);
ATTNFAST_PTX_API void ptx_free(void* kernel);

// Returns how many parameters there are, and the offset and size in bytes of the first `room`.
ATTNFAST_PTX_API int ptx_parameters(void* kernel, int* offsets, int* sizes, int room);

// Adds to `runs`, which has room for so many lines of the text, how often each one has run.
ATTNFAST_PTX_API void ptx_runs(void* kernel, long* runs, int room);

// What ptx_launch is asked, added up. Without kPtxChecks bounds and alignment are still checked.
enum PtxOptions {
  kPtxChecks = 1,       // races, reads of what was never written
  kPtxExact = 2,        // ex2, rcp and other approximations are rounded to nearest instead
  kPtxRoundedSums = 4,  // mma rounds every sum to nearest, instead of dropping bits as tensor cores
};

// Runs a grid of blocks of so many threads on the schedule of `seed`. Returns the number of
// instructions that its warps executed, or -1 with a message.
ATTNFAST_PTX_API long ptx_launch(void* kernel, const uint32_t* grid, int threads,
                                 int dynamic_shared, const void* parameters,
                                 const struct PtxRange* ranges, int count, uint64_t seed,
                                 int options, char* message, int room);
