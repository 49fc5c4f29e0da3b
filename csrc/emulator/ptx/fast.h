// The hot loops over lanes and tiles: compiled for AVX2 and FMA too, chosen when the library is
// loaded, with the same results.
#pragma once
#include <cstdint>

namespace attnfast::ptx {

// d = a b + c of 32 lanes, rounded once.
void fused_multiply_add(float* d, const float* a, const float* b, const float* c);

// d += a b of `rows` rows, K products each: a [rows, K], b [K, columns], d [rows, columns]. So many
// products at a time are added to d exactly, and what does not fit is dropped, as emulator's
// multiply_accumulate does; 0: each sum is rounded to nearest.
void multiply_add(float* d, const float* a, const float* b, int rows, int columns, int K,
                  int at_a_time);

}  // namespace attnfast::ptx
