// Between the parser and the operations: operands as they are written, and how they are looked up.
#pragma once
#include <functional>

#include "machine.h"

namespace attnfast::ptx {

struct Register {
  int offset, bytes;
  bool predicate;
};

struct Operand {
  std::string text, base;
  std::vector<std::string> parts;  // of {a, b}
  bool memory = false;
  int64_t offset = 0;
};

struct Opcode {
  std::string name;
  std::vector<std::string> words;  // name, split at its dots
  bool has(const char* word) const {
    for (const auto& w : words)
      if (w == word) return true;
    return false;
  }
};

struct Decoder {
  std::function<Register(const std::string&, int)> look_up;  // text, bytes of an immediate
  std::function<Space(const std::string&)> space_of;         // of a variable or parameter
  std::function<void(const std::string&)> fail;
};

// Fills in what an instruction does.
//   Raises Fault for an opcode that is not known.
void decode(const Opcode& opcode, const std::vector<Operand>& operands, Instruction& i,
            const Decoder& decoder);

}  // namespace attnfast::ptx
