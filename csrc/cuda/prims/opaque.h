// A primitive for the register allocator.
#pragma once
#include "prims.h"

namespace attnfast::cuda {

// x, but the compiler cannot tell: what a loop derives from it is computed anew in each turn, and
// takes no register from one turn to the next.
template <class T>
ATTNFAST_DEVICE T opaque(T x) {
#ifndef ATTNFAST_EMULATOR
  asm volatile("" : "+r"(x));
#endif
  return x;
}
}  // namespace attnfast::cuda
