// Runs a grid of blocks: warps of 32 lanes, on a schedule that a seed chooses.
#pragma once
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../random.h"
#include "clocks.h"
#include "global.h"
#include "mbarriers.h"
#include "program.h"
#include "shared.h"

namespace attnfast::ptx {

struct Options {
  uint64_t seed = 0;
  bool checks = true;         // races, reads of what was never written, fragments of a wgmma
  bool exact = false;         // approximate functions round as the host's do
  bool rounded_sums = false;  // mma adds product after product, each sum rounded to nearest
};

// One launch.
struct Launch {
  Launch(const Program& kernel, Options asked)
      : program(kernel), options(asked), random(asked.seed) {}
  void run(const uint32_t (&size)[3], int block_threads, int dynamic_shared, const void* values);

  const Program& program;
  Options options;
  emulator::Random random;
  GlobalMemory global;
  const char* parameters = nullptr;
  uint32_t grid[3] = {1, 1, 1};
  int threads = 0, shared_bytes = 0, dynamic_shared = 0;
  int64_t executed = 0;  // instructions of warps

 private:
  void run_blocks(const std::vector<uint32_t>& order);
};

enum class Wait : uint8_t { kNot, kLanes, kMbarrier, kChange };

// Lanes of a warp that stand at the same instruction.
struct Group {
  int pc;
  Mask lanes;
  Wait waits = Wait::kNot;
  uint32_t mbarrier = 0;  // that it waits for, until the phase under way is another
  uint64_t phase = 0;     // of that, or of all strong writes
};

// One thread's cp.async that has not been waited for.
struct ThreadCopy {
  int lane;
  int64_t group;  // of that thread
  uint32_t to;
  uint64_t from;
  int size, valid;  // bytes; the rest is zero
  bool early;       // the source is read when it is issued, else when it is waited for
  int instruction;
  char data[16];
};

class Block;
class Warp;

// An asynchronous copy of a box between global and shared memory.
struct BulkCopy {
  struct Run {  // of consecutive bytes
    uint64_t global;
    uint32_t shared;
    int bytes;
    bool inside;  // else zeros are loaded, and nothing is stored
  };
  std::vector<Run> runs;
  const Warp* warp = nullptr;
  int lane = 0, instruction = 0;
  uint32_t mbarrier = 0, bytes = 0;  // of a load
  int64_t group = 0;                 // of a store
  int reduces = 0;                   // a store that adds: see bulk.cpp
  bool done = false;
};

// A wgmma that has not been waited for: see warpgroup.cpp.
struct Products;

class Warp {
 public:
  Warp(Block& of, int number);
  ~Warp();
  void reset(int lanes);
  // Executes up to so many instructions, as long as it can.
  void run(int most);
  bool ended() const { return groups.empty(); }
  // Whether it can go on. Raises Fault if its lanes wait for one another.
  bool ready();
  bool waits_for_blocks() const;
  Mask live() const;

  template <class T>
  T* lanes(int offset) {
    return reinterpret_cast<T*>(file_.data() + offset);
  }
  uint64_t cell(int offset, bool wide, int lane) {
    return wide ? lanes<uint64_t>(offset)[lane] : lanes<uint32_t>(offset)[lane];
  }

  // The bytes of an access, checked. `data` is what a write will leave.
  char* access(Space space, uint64_t address, int bytes, int lane, bool writes, bool strong,
               const char* data);
  // Of an address in shared memory, also if it is generic.
  static uint32_t shared_address(uint64_t address);
  Access by(int lane) const { return {position, lane, pc}; }
  // Lets the group that runs wait for the end of an mbarrier's phase, and then run this
  // instruction again.
  void wait_for(uint32_t mbarrier, uint64_t phase);
  // Ends this turn after the instruction.
  void yield() { stops_ = true; }

  // Strong accesses of global memory, and fences: see handover.cpp. Whether these lanes read again
  // before any block has written; they then wait until one has.
  bool waits_in_vain(Mask lanes);
  void take(uint64_t address, bool acquires);
  void pass(uint64_t address, Mask lane, bool releases, bool adds);
  void fence(Mask lanes);

  Block& block;
  const int index;
  int pc = 0;  // of the instruction under way
  Position position;
  std::vector<Group> groups;  // ordered by pc
  int barrier = -1;           // that it waits at
  std::vector<ThreadCopy> copies;
  int64_t committed[kLanes] = {};
  std::vector<std::unique_ptr<BulkCopy>> stores;
  int64_t committed_stores[kLanes] = {};
  std::unique_ptr<Products> products;

 private:
  int runnable();
  void run_group(size_t n, int& most);
  bool follow(size_t n, const Instruction& i, Mask taken);
  void follow_table(size_t n, const Instruction& i, Mask taken);
  void merge();
  Mask guarded(const Instruction& i, Mask lanes);
  void end();

  struct Poll {
    int pc = -1;
    Mask lanes = 0;
    uint64_t changes = 0;
  };

  std::vector<char> file_, local_;
  Poll poll_;
  bool stops_ = false, again_ = false;
};

class Block {
 public:
  enum class Turn { kRan, kStands, kEnded };

  Block(Launch& of, int warps);
  void begin(uint32_t number);
  // Has a warp run, or a load land; kStands: all warps wait for other blocks.
  Turn turn();

  // What its warps wait for.
  std::string waiting() const;

  // bar.sync and bar.arrive: `expected` threads, 0 for all. The warp stops if it waits.
  void arrive(Warp& warp, int id, int expected, bool waits);
  // Has an asynchronous load land now or later, as the block's pace is.
  void start(std::unique_ptr<BulkCopy> load);

  Launch& launch;
  uint32_t index[3] = {};
  int number = 0;
  SharedMemory shared;
  Mbarriers mbarriers;
  std::vector<std::unique_ptr<Warp>> warps;
  // Warpgroups' wgmmas in order, by which its warps must agree.
  std::vector<std::vector<int>> warpgroup_order;
  std::set<uint64_t> unacquired_maps;  // tensor maps that were made and not fenced since

 private:
  enum class Pace { kAtOnce, kAnyTime, kLate };
  struct Barrier {
    int arrived = 0, expected = 0;
    Clocks joined;
    int instruction = -1;
  };

  void reset();
  void fill_special(Warp& warp);
  Warp& choose(const std::vector<Warp*>& ready);
  void release_barriers();
  int alive() const;
  bool land_one();
  void land(BulkCopy& load);
  std::string place(int instruction) const;
  [[noreturn]] void fail(const Warp& warp, const Fault& fault) const;

  Barrier barriers_[16];
  std::vector<std::unique_ptr<BulkCopy>> loads_;
  Pace pace_ = Pace::kAnyTime;
  int held_ = -1;      // a warp that only runs when no other can
  int favoured_ = -1;  // one that runs whenever it can
  int64_t executed_ = 0;
  std::vector<Warp*> ready_;
};

}  // namespace attnfast::ptx
