// The wgmma of a warp that are under way.
#pragma once
#include <cstdint>
#include <set>
#include <vector>

#include "program.h"

namespace attnfast::ptx {

struct WarpgroupProduct;

// Accumulators are kept here from the issue of a wgmma until its wait; the registers hold poison
// meanwhile, and nothing but a wgmma may touch them. What is in A's registers may be read.
struct Products {
  struct Product {
    const WarpgroupProduct* shape;
    uint64_t a, b;  // descriptors
    bool accumulates;
    bool done = false;
    int64_t group;
    int instruction;
  };
  struct Accumulator {
    std::vector<int> registers;
    std::vector<uint32_t> values;  // [register][lane]
  };

  bool in_flight() const { return !queue.empty(); }
  // Before an instruction that is no wgmma.
  //   Raises Fault if it touches what a wgmma uses; notes what has to be fenced.
  void check(const Program& program, int instruction);

  std::vector<Product> queue;
  std::vector<Accumulator> accumulators;
  int64_t groups = 0;
  int64_t issued = 0;
  std::set<int> unfenced;  // registers of fragments, written since the last wgmma.fence
};

}  // namespace attnfast::ptx
