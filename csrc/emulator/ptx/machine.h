// A machine that executes PTX on the CPU: one kernel, a grid of blocks, warps of 32 lanes.
#pragma once
#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace attnfast::ptx {

constexpr int kLanes = 32;
using Mask = uint32_t;
constexpr Mask kAll = ~0u;

// What a kernel did that it must not. The machine adds where.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Machine;
struct Warp;
struct Instruction;
using Execute = void (*)(Machine&, Warp&, const Instruction&, Mask);

enum class Space : uint8_t { kGlobal, kShared, kParam, kLocal, kGeneric };
// Where the spaces begin in generic addresses.
constexpr uint64_t kSharedWindow = 1ull << 60, kParamWindow = 2ull << 60, kLocalWindow = 3ull << 60;

// A decoded instruction. Operands are byte offsets into a warp's register file, where immediates
// lie too: 32 lanes of 4 bytes, or of 8 for 64-bit types.
struct Instruction {
  Execute run = nullptr;
  int operands[24] = {};
  int guard = -1;  // a predicate, or -1
  bool guard_negated = false;
  bool branch = false, exits = false, meets = false;  // meets: all lanes of the warp take part
  int target = -1;                                    // of a branch, an instruction's index
  // Of memory instructions.
  Space space = Space::kGlobal;
  int64_t offset = 0;
  int count = 1, bytes = 4;
  bool extends_sign = false, wide_registers = false, wide_address = false;
  int variant = 0;  // what else an opcode needs
  int line = 0;     // of the PTX text
  int source = -1;  // index into Program::sources
};

struct Parameter {
  std::string name;
  int offset, size;
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> lines, sources;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  std::vector<char> registers;  // a warp's file at its start: garbage, and the immediates
  std::map<std::string, int> special;
  int static_shared = 0, local_bytes = 0, threads = 0;
  std::vector<std::vector<char>> constants;  // .global and .const variables
  mutable std::vector<long> runs;            // of each instruction, by how many warps
  std::map<std::string, long> opcodes;       // how often each occurs in the text
};

// Reads the kernel `entry` ("" for the first).
//   Raises Fault for what it does not know.
Program parse(const std::string& text, const std::string& entry);

// Lanes of a warp that stand at the same instruction.
struct Group {
  int pc;
  Mask lanes;
  bool waits = false;  // at an instruction that needs all lanes
};

// One thread's cp.async that has not been waited for.
struct Copy {
  int lane;
  long group;  // of that thread
  uint32_t to;
  uint64_t from;
  int size, valid;
  bool early;  // the source is read when it is issued, else when it is waited for
  char data[16];
};

// A wgmma that has not been waited for.
struct Product {
  const Instruction* instruction;
  uint64_t a, b;  // descriptors
  bool accumulates;
  int group;
  std::vector<uint32_t> saved;  // what the accumulators held; registers are poisoned meanwhile
};

struct Warp {
  int index;
  std::vector<Product> products;
  int product_groups = 0;
  std::vector<char> file;
  std::vector<Group> groups;  // ordered by pc; the first that does not wait runs
  std::vector<Copy> copies;
  long committed[kLanes] = {};
  uint32_t epoch = 0;  // of bar.warp.sync
  int barrier = -1, expected = 0;
  std::vector<char> local;
  Mask live() const {
    Mask m = 0;
    for (const Group& g : groups) m |= g.lanes;
    return m;
  }
};

struct Range {
  uint64_t begin, end;
  bool writable = true;
};

// What is known of one byte of shared memory.
struct Shadow {
  uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0;
  Mask readers = 0;  // warps, in read_epoch
  int16_t writer = -1;
  int16_t pending = 0;  // cp.async that will write here
  bool written = false;
};

struct Options {
  uint64_t seed = 0;
  bool races = true, uninitialised = true;
};

struct Machine {
  const Program& program;
  Options options;
  std::mt19937_64 random;
  std::vector<Range> ranges;  // global memory that may be accessed, disjoint, ordered
  std::vector<char> shared;
  std::vector<Shadow> shadow;
  const char* parameters = nullptr;
  std::vector<Warp> warps;
  uint32_t epoch = 1;  // of bar.sync
  bool partial_barriers = false;
  int threads = 0;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {};
  long executed = 0;

  Machine(const Program& p, Options o) : program(p), options(o), random(o.seed) {}
  void launch(const uint32_t (&size)[3], int threads, int dynamic_shared, const void* parameters);

  // The bytes of an access, checked. `lane` is -1 for an access of the whole warp.
  char* at(Warp& w, Space space, uint64_t address, int bytes, int lane, bool writes,
           const char* data);
  void complete(Warp& w, Copy& copy);
  void multiply(Warp& w, Product& product);  // runs a wgmma

 private:
  void run_block(uint32_t x, uint32_t y, uint32_t z);
  void step(Warp& w, int most);
  void release();
  std::string held(uint64_t address, int bytes, const char* data) const;
  void touch(Warp& w, uint64_t address, int bytes, int lane, bool writes, const char* data);
};

}  // namespace attnfast::ptx
