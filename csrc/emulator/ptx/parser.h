// From the text of a kernel to its instructions: statements, scopes, variables.
#pragma once
#include <cctype>
#include <map>
#include <string>
#include <vector>

#include "decoder.h"
#include "program.h"

namespace attnfast::ptx {

constexpr char kGarbage = char(0xA5);  // what registers hold before they are written

inline bool in_name(char c) {
  return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$';
}
int element_bytes(const std::string& word);  // of ".b8"; 0 for other words

// "u64 .ptr .global .align 1 name", ".align 8 .b8 name[544] = {1, 2}".
struct Declaration {
  std::string name, values;
  int element = 0, bytes = 0, align = 1;
  bool shared = false, local = false, dynamic = false;
};

class Parser : Names {
 public:
  explicit Parser(const std::string& text);
  Program parse(const std::string& entry);

  Register find(const std::string& text, int bytes) override;
  std::string place() const override;

 private:
  struct Scope {
    int parent;
    std::map<std::string, Register> registers;
    std::map<std::string, int> labels;
  };
  struct Branch {
    int instruction, scope;
    std::string label;
  };

  // The text.
  bool skip_space();
  void advance(size_t to);
  bool at_word(const char* word) const {
    return text_.compare(at_, std::char_traits<char>::length(word), word) == 0;
  }
  std::string until(char end);
  std::string name_here();
  void skip_body();

  // Outside of kernels.
  void directive();
  void variable(const std::string& statement);
  Declaration declared(const std::string& statement);
  void constant(const Declaration& d);

  // A kernel.
  void kernel(const std::string& name);
  void parameters();
  void attributes();
  void place_dynamic_shared();
  void body();
  void statement();
  void location();
  void registers(const std::string& statement);
  void instruction(std::string statement);
  void branch(Decoder& decoder);
  void indexed_branch(Decoder& decoder);
  void resolve_branches();
  void mark_fragments();

  const Register* known(const std::string& name) const;
  int reserve(int bytes);
  Register immediate(uint64_t value, int bytes);
  Register special(const std::string& name);
  int label(const Branch& branch);

  std::string text_;  // without comments, as long as it was
  Program program_;
  size_t at_ = 0;
  int line_ = 1;
  std::vector<Scope> scopes_;
  int scope_ = -1;
  std::vector<Branch> branches_;
  std::map<std::string, std::vector<std::string>> tables_;  // .branchtargets
  std::string last_label_;
  std::map<std::string, uint64_t> symbols_;  // addresses of variables and parameters
  std::vector<std::string> dynamic_shared_;
  int dynamic_align_ = 1;
  std::map<std::pair<uint64_t, int>, int> immediates_;
  std::map<int, std::string> files_;  // of .loc
  std::map<std::string, int> locations_;
  int source_ = -1;
  size_t file_bytes_ = 0;
};

}  // namespace attnfast::ptx
