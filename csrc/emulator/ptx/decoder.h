// Between the text and the operations: one instruction, of which everything has to be taken.
//
// The decoder of an opcode takes the modifiers and operands that it understands; what is left over
// is an error that names it.
#pragma once
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "program.h"

namespace attnfast::ptx {

// "s32", "bf16x2": the value's kind, and bits of one.
struct Type {
  enum Kind { kBits, kUnsigned, kSigned, kFloat, kBFloat, kTf32, kPredicate };
  Kind kind = kBits;
  int bits = 32;
  bool pair = false;

  int bytes() const { return kind == kPredicate ? 4 : bits / 8 * (pair ? 2 : 1); }
  bool integer() const { return kind <= kSigned; }
  bool half() const { return bits == 16 && (kind == kFloat || kind == kBFloat); }
};

struct Register {
  int offset, bytes;
  bool predicate;
};

// Looks up what operands name.
class Names {
 public:
  virtual ~Names() = default;
  // A register, immediate or symbol; `bytes` are those of an immediate.
  virtual Register find(const std::string& text, int bytes) = 0;
  // Where in the text this is, as a message has it.
  virtual std::string place() const = 0;
  [[noreturn]] void fail(const std::string& why) const { throw Fault(place() + why); }
};

// At commas outside of brackets, trimmed.
std::vector<std::string> split(const std::string& text);
std::string trimmed(const std::string& text);

class Decoder {
 public:
  Decoder(Instruction& instruction, Touched& touched, const std::string& opcode,
          std::vector<std::string> operands, Names& names);

  Instruction& i;
  const std::string& op() const { return words_[0]; }

  // Modifiers.
  bool take(const std::string& word);
  // The index of the one of these words that is there, or -1.
  int take_one(std::initializer_list<const char*> words);
  int need_one(std::initializer_list<const char*> words);
  void need(const std::string& word);
  // Words that change nothing here, if they are there.
  void pass(std::initializer_list<const char*> words);
  void pass_scope() { pass({"cta", "cluster", "gpu", "sys"}); }
  bool take_prefix(const std::string& prefix);  // every word that begins so
  Type take_type();                             // the last word that is left
  int take_number(const std::string& before);   // of a word such as "x4", or -1
  bool left() const;                            // whether there is any

  // Operands, by their place in the text; slots are those of Instruction::operands.
  size_t count() const { return operands_.size(); }
  void need_count(size_t least, size_t most);
  void need_count(size_t count) { need_count(count, count); }
  const std::string& text(size_t place);
  bool is_vector(size_t place) { return text(place)[0] == '{'; }
  std::vector<std::string> parts(size_t place);  // of {a, b}, or the one
  void into(int slot, size_t place, int bytes) { i.operands[slot] = written(text(place), bytes); }
  void from(int slot, size_t place, int bytes) { i.operands[slot] = read(text(place), bytes); }
  // Of "!%p", the register; sets `negated`.
  int read_predicate(size_t place, bool* negated);
  // Of "%a|%b", both; -1 for the second if it is absent.
  void into_pair(int first_slot, int second_slot, size_t place, int bytes);
  int read(const std::string& name, int bytes);
  int written(const std::string& name, int bytes);
  int fragment(const std::string& name);  // of a wgmma, in registers
  void renames() { touched_.renames = true; }
  // Either width; tells which.
  Register read_any(const std::string& name, int bytes);
  Register written_any(const std::string& name, int bytes);
  // Of "[a + 4]": the register into the slot, the rest into the instruction.
  void address(int slot, size_t place);
  // The same with the offset returned, for instructions of two addresses.
  int64_t second_address(int slot, size_t place, bool* wide);
  // Of "[a, {x, y}]".
  void split_address(size_t place, std::string* base, std::vector<std::string>* coordinates);
  int64_t number(size_t place);
  int64_t number(const std::string& text);

  // To be taken last: all is understood.
  void finish();
  [[noreturn]] void fail(const std::string& why);

 private:
  std::string base_and_offset(const std::string& inside, int64_t* offset);

  Touched& touched_;
  Names& names_;
  std::string opcode_;
  std::vector<std::string> words_, operands_;
  std::vector<bool> taken_;
};

using Decode = void (*)(Decoder&);
using Decoders = std::map<std::string, Decode>;

// What each file of operations knows.
void add_arithmetic(Decoders& known);
void add_bits(Decoders& known);
void add_floats(Decoders& known);
void add_approximations(Decoders& known);
void add_comparisons(Decoders& known);
void add_conversions(Decoders& known);
void add_moves(Decoders& known);
void add_memory(Decoders& known);
void add_warp(Decoders& known);
void add_barriers(Decoders& known);
void add_matrices(Decoders& known);
void add_warpgroup(Decoders& known);
void add_copies(Decoders& known);
void add_tensor_maps(Decoders& known);

// fence.proxy.tensormap.
void decode_tensor_map_fence(Decoder& d);

// All of them, by opcode.
const Decoders& decoders();

}  // namespace attnfast::ptx
