// The entry points of every instruction set, and the table that the dispatcher chooses from.
#pragma once
#include "../params.h"

namespace attnfast::cpu {

struct Kernels {
  const char* name;
  void (*attention_fwd)(const ForwardParams&);
  void (*attention_bwd)(const BackwardParams&);
  void (*attention_decode)(const DecodeParams&);
};

#define ATTNFAST_DECLARE_ISA(isa)             \
  namespace isa {                             \
  void attention_fwd(const ForwardParams&);   \
  void attention_bwd(const BackwardParams&);  \
  void attention_decode(const DecodeParams&); \
  void weights_fwd(const ForwardParams&);     \
  void received_fwd(const ForwardParams&);    \
  }
ATTNFAST_DECLARE_ISA(portable)
ATTNFAST_DECLARE_ISA(avx2)
ATTNFAST_DECLARE_ISA(avx512)
ATTNFAST_DECLARE_ISA(avx512_bf16)  // and vdpbf16ps
ATTNFAST_DECLARE_ISA(lanes16)  // in sanitizer builds only: the shape of avx512 in AVX2 instructions
#undef ATTNFAST_DECLARE_ISA

// The kernels in use: the best set that this machine runs, or the one that ATTNFAST_CPU_ISA names.
const Kernels& kernels();

// All sets that this machine runs, best first, separated by commas.
const char* runnable_isas();

}  // namespace attnfast::cpu
