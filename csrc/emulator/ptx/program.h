// A kernel of a PTX text, decoded: what the machine executes.
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace attnfast::ptx {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 32;
using Mask = uint32_t;
constexpr Mask kAll = ~0u;

// Something that a kernel does and must not, or that the machine does not know. The machine adds
// where; `before` is the other instruction that takes part in it, or -1.
struct Fault : std::runtime_error {
  explicit Fault(const std::string& what, int before = -1)
      : std::runtime_error(what), before(before) {}
  int before;
};

class Warp;
struct Instruction;
using Execute = void (*)(Warp&, const Instruction&, Mask);

enum class Space : uint8_t { kGlobal, kShared, kParam, kLocal, kGeneric };
// Where the spaces begin in generic addresses; global memory is at its own addresses.
constexpr uint64_t kWindow = 1ull << 60;
constexpr uint64_t kSharedWindow = kWindow, kParamWindow = 2 * kWindow, kLocalWindow = 3 * kWindow;
// Shared memory does not begin at zero, so that offsets are no addresses.
constexpr uint32_t kSharedBase = 1024;

enum class Flow : uint8_t { kNext, kBranch, kIndexedBranch, kExit };

// What only some instructions have to remember.
struct Detail {
  virtual ~Detail() = default;
};

// Operands are byte offsets into a warp's register file, where immediates lie too: 32 lanes of 4
// bytes, or of 8 for 64-bit types. Slot 0 is the result; -1 is none.
struct Instruction {
  Execute run = nullptr;
  int operands[16] = {};
  int guard = -1;  // a predicate
  bool guard_negated = false;
  Flow flow = Flow::kNext;
  int target = -1;               // of a branch, an instruction's index
  bool meets = false;            // all lanes of the warp take part at once
  bool writes_fragment = false;  // a register that a wgmma takes
  // Of memory instructions.
  Space space = Space::kGlobal;
  bool strong = false;                      // volatile, relaxed, acquire, release: no race
  bool acquires = false, releases = false;  // between blocks
  bool extends_sign = false, wide_registers = false, wide_address = false;
  int count = 1, bytes = 4;
  int64_t offset = 0;
  int variant = 0;  // what else an opcode needs
  std::shared_ptr<const Detail> detail;
  int line = 0;     // of the text
  int source = -1;  // index into Program::sources
};

// The registers of an instruction, as operands; immediates among them.
struct Touched {
  std::vector<int> read, written;
  std::vector<int> fragments;  // of a wgmma: registers that it uses until it is waited for
  bool renames = false;        // a mov, which ptxas takes for another name
};

struct IndexedTargets : Detail {
  std::vector<int> targets;  // instructions
};

struct Parameter {
  std::string name;
  int offset, size;
};

// A special register that the kernel reads, and where.
struct Special {
  std::string name;
  int offset;
};

struct Program {
  std::string name;
  int target = 0;  // 80 for sm_80
  std::vector<Instruction> code;
  std::vector<Touched> touched;  // of each instruction
  std::vector<std::string> lines, sources;
  std::vector<Parameter> parameters;
  std::vector<Special> specials;
  std::vector<std::vector<char>> constants;  // variables of the text
  std::vector<char> registers;  // a warp's file at its start: garbage, and the immediates
  int parameter_bytes = 0, static_shared = 0, local_bytes = 0;
  int threads = 0;                 // .reqntid, 0 if not given
  int most_threads = 0;            // .maxntid
  mutable std::vector<long> runs;  // of each instruction, by how many warps
};

// Reads the kernel `entry` ("" for the first).
//   Raises Fault for what it does not know.
Program parse(const std::string& text, const std::string& entry);

}  // namespace attnfast::ptx
