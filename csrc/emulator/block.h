// One CUDA block on one host thread: every CUDA thread a fiber, scheduled at random from a seed.
//
// Collectives of a warp are meeting points: the last lane to arrive does the work of all. Lanes
// that meet at different places, leave while others wait, or wait for ever are faults; so are
// accesses out of bounds and races. A fault ends the block at once and becomes the exception of the
// launch.
#pragma once
#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "counters.h"
#include "fiber.h"
#include "handed.h"
#include "memory.h"
#include "place.h"
#include "random.h"
#include "shared.h"

namespace attnfast::emulator {

// Something to do wrong at one place of a kernel, to see that it is noticed.
struct Sabotage {
  enum class Kind { kNone, kOmit, kOmitInOneLane, kShift, kFlip };
  Kind kind = Kind::kNone;
  std::string file;  // as Place::file_name() gives it
  int line = 0;
  std::string op;
  int64_t amount = 0;  // bytes to shift an address by; bits to flip in it
};

// What GPUs differ in, as far as the kernels can tell.
struct Gpu {
  int arch = 80;                 // 75 for sm_75
  int shared_limit = 163 << 10;  // of a block, in bytes

  bool turing() const { return arch < 80; }
};

// The same for all blocks of a launch.
struct Launch {
  std::string kernel;
  int threads = 0, shared_bytes = 0;
  int64_t blocks = 0;
  std::function<void()> body;
  const Memory* memory = nullptr;
  Gpu gpu;
  uint64_t seed = 0;
  Sabotage sabotage;
  bool counting = false;
  Handed* handed = nullptr;
  const std::atomic<bool>* stop = nullptr;    // a block has failed
  const std::atomic<int>* workers = nullptr;  // host threads that may begin a block, or have one
};

class Block {
 public:
  // Runs one block to its end; returns its fault, or an empty string.
  std::string run(const Launch& launch, int64_t index);

  static Block& current();
  int thread() const { return running_; }
  int warp() const { return running_ / kWarp; }
  int lane() const { return running_ % kWarp; }
  int64_t index() const { return index_; }
  int64_t blocks() const { return launch_->blocks; }
  Handed& handed() const { return *launch_->handed; }
  int64_t warp_of_launch() const { return index_ * static_cast<int64_t>(warps_.size()) + warp(); }
  const Gpu& gpu() const { return launch_->gpu; }
  Counts& counts() { return counts_; }

  // Notes where the running lane is; false if sabotage has this call left out.
  bool enter(const Place& place);
  // An address as sabotage has it.
  template <class Address>
  Address tampered(Address address, const Place& place) const {
    using Kind = Sabotage::Kind;
    const Kind kind = launch_->sabotage.kind;
    if ((kind != Kind::kShift && kind != Kind::kFlip) || !targets(place)) return address;
    const int64_t amount = launch_->sabotage.amount;
    return static_cast<Address>(kind == Kind::kShift ? address + amount : address ^ amount);
  }

  // Waits for the other lanes of the warp; then work(arguments) runs once, each lane's argument in
  // its place.
  template <class Work>
  void meet(const Place& place, void* argument, Work&& work) {
    Warp& mine = warps_[warp()];
    arrive(place, argument);
    if (mine.arrived < kWarp) return wait();
    mine.arrived = 0;
    if (launch_->counting) mine.accesses.flush(&counts_);
    work(mine.arguments);
    wake(&mine.waiting);
  }

  // Barrier `id`, which `warps` warps as a whole have to reach.
  void sync(int id, int warps, const Place& place);
  void sync_all(const Place& place) { sync(0, static_cast<int>(warps_.size()), place); }
  void sync_lanes(const Place& place);

  // Lets this block's other lanes and other blocks go on until `done`, which another block brings
  // about; a fault where none can any more.
  template <class Done>
  void await(const Place& place, Done done) {
    int64_t passes = handed().passes();
    for (int64_t turn = 0; !done(); ++turn) {
      pause(place, turn, passes);
      const int64_t now = handed().passes();
      if (now != passes) passes = now, turn = 0;
    }
  }

  char* read_shared(uint32_t address, int bytes, const Place& place, bool collective = false);
  char* write_shared(uint32_t address, int bytes, const Place& place);
  void read_global(const void* address, int bytes, const Place& place);
  void write_global(const void* address, int bytes, const Place& place);
  // Counts a collective's request, whose addresses are known at once.
  void count(const Place& place, const std::vector<uint64_t>& addresses, int bytes);

  // `bytes` to shared memory, the first `valid` from global memory and the rest zero.
  // On sm_75 it is an ordinary access.
  void copy(uint32_t to, const void* from, int bytes, int valid, const Place& place);
  void commit();
  void wait_copies(int newest, const Place& place);

  [[noreturn]] void fail(const std::string& message);
  [[noreturn]] void fail(const Place& place, const std::string& message);

 private:
  struct Copy {
    uint32_t to;
    const void* from;
    int bytes, valid, thread;
    bool landed;
  };
  struct Lane {
    void* sp = nullptr;
    Place at;
    bool done = false;
    size_t region = 0;                        // of its last global access
    std::vector<size_t> open;                 // copies since the last commit
    std::vector<std::vector<size_t>> groups;  // committed, oldest first
  };
  struct Warp {
    int arrived = 0, done = 0;
    Place place;
    void* arguments[kWarp];
    std::vector<int> waiting;
    WarpAccesses accesses;
  };
  struct Barrier {
    std::vector<int> warps, waiting;
    Place place;
  };
  // When copies land: as soon as issued, some time later, or when waited for.
  enum class Landing { kAtOnce, kSometime, kWhenAwaited };

  static void entry();
  void arrive(const Place& place, void* argument);
  void wait();
  void yield();
  void resume_another();
  void leave();
  void wake(std::vector<int>* lanes);
  void land(size_t copy);
  void pause(const Place& place, int64_t turn, int64_t passes);
  bool targets(const Place& place) const;
  std::string where() const;

  const Launch* launch_ = nullptr;
  int64_t index_ = 0;
  Random random_;
  Stacks stacks_;
  SharedMemory shared_;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  Barrier barriers_[16];
  std::vector<int> ready_;
  std::vector<Copy> copies_;
  std::vector<size_t> under_way_;  // copies that have not landed
  Landing landing_ = Landing::kAtOnce;
  Counts counts_;
  Place last_counted_;
  int running_ = 0, alive_ = 0;
  int starved_ = -1, starved_for_ = 0;  // a warp that is held back, so that others run ahead
  void* host_ = nullptr;
  std::string fault_;
};

}  // namespace attnfast::emulator
