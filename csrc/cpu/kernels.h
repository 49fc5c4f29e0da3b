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
ATTNFAST_DECLARE_ISA(amx)          // and tile registers
// In sanitizer builds only, in AVX2 instructions: the shapes of avx512 and of amx.
ATTNFAST_DECLARE_ISA(lanes16)
ATTNFAST_DECLARE_ISA(tiles16)
#undef ATTNFAST_DECLARE_ISA

// Whether this processor has AMX's tile registers for bf16, and the system lets this process use
// them (Linux: a process has to ask).
bool has_tile_registers();

// The kernels in use: the best set that this machine runs, or the one that ATTNFAST_CPU_ISA names.
const Kernels& kernels();

// All sets that this machine runs, best first, separated by commas.
const char* runnable_isas();

}  // namespace attnfast::cpu
