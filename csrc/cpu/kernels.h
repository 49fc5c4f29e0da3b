// The entry points of every instruction set, and the table that the dispatcher chooses from.
#pragma once
#include "../params.h"

namespace attnfast::cpu {

struct Kernels {
  const char* name;
  void (*attention_fwd)(const ForwardParams&);
  void (*attention_bwd)(const BackwardParams&);
  void (*attention_decode)(const DecodeParams&);
  void (*attention_pooled)(const PooledParams&);
};

// An attention_*.cpp is compiled for one set, ATTNFAST_ISA; what is compiled once is told all that
// the build has, ATTNFAST_ISAS(X) = X(best) ... X(portable): csrc/build.py has the list.
#define ATTNFAST_DECLARE_ISA(isa)             \
  namespace isa {                             \
  void attention_fwd(const ForwardParams&);   \
  void attention_bwd(const BackwardParams&);  \
  void attention_decode(const DecodeParams&); \
  void attention_pooled(const PooledParams&); \
  void weights_fwd(const ForwardParams&);     \
  void received_fwd(const ForwardParams&);    \
  void indexed_fwd(const ForwardParams&);     \
  void indexed_bwd(const BackwardParams&);    \
  }
#if defined(ATTNFAST_ISA)
ATTNFAST_DECLARE_ISA(ATTNFAST_ISA)
#elif defined(ATTNFAST_ISAS)
ATTNFAST_ISAS(ATTNFAST_DECLARE_ISA)
#endif
#undef ATTNFAST_DECLARE_ISA

// Whether this processor has AMX's tile registers for bf16, and the system lets this process use
// them (Linux: a process has to ask).
bool has_tile_registers();

// The kernels in use: the best set that this machine runs, or the one that ATTNFAST_CPU_ISA names.
const Kernels& kernels();

// All sets that this machine runs, best first, separated by commas.
const char* runnable_isas();

}  // namespace attnfast::cpu
