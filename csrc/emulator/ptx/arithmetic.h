// Arithmetic by the type of its operands: integers here, fp32 and fp64 in floats.cpp, fp16 and bf16
// in halves.cpp.
#pragma once
#include "decoder.h"

namespace attnfast::ptx {

enum class Operation { kAdd, kSub, kMul, kFma, kMin, kMax, kNeg, kAbs };

int sources_of(Operation operation);
void decode_integers(Decoder& d, const Type& type, Operation operation);
void decode_floats(Decoder& d, const Type& type, Operation operation);
void decode_quotient(Decoder& d, const Type& type);  // approximations.cpp
void decode_halves(Decoder& d, const Type& type, Operation operation);

}  // namespace attnfast::ptx
