#include "decoder.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

namespace attnfast::ptx {

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : text) {
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c == ',' && !depth) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

Decoder::Decoder(Instruction& instruction, Touched& touched, const std::string& opcode,
                 std::vector<std::string> operands, Names& names)
    : i(instruction),
      touched_(touched),
      names_(names),
      opcode_(opcode),
      operands_(std::move(operands)) {
  size_t from = 0;
  for (size_t dot; (dot = opcode.find('.', from)) != std::string::npos; from = dot + 1)
    words_.push_back(opcode.substr(from, dot - from));
  words_.push_back(opcode.substr(from));
  taken_.assign(words_.size(), false);
  taken_[0] = true;
}

bool Decoder::take(const std::string& word) {
  for (size_t n = 1; n < words_.size(); ++n) {
    if (taken_[n] || words_[n] != word) continue;
    taken_[n] = true;
    return true;
  }
  return false;
}

int Decoder::take_one(std::initializer_list<const char*> words) {
  int n = 0;
  for (const char* word : words) {
    if (take(word)) return n;
    ++n;
  }
  return -1;
}

int Decoder::need_one(std::initializer_list<const char*> words) {
  const int found = take_one(words);
  if (found >= 0) return found;
  std::string list;
  for (const char* word : words) list += std::string(list.empty() ? "." : ", .") + word;
  fail("needs one of " + list);
}

void Decoder::need(const std::string& word) {
  if (!take(word)) fail("is known with ." + word + " only");
}

void Decoder::pass(std::initializer_list<const char*> words) {
  for (const char* word : words) take(word);
}

bool Decoder::take_prefix(const std::string& prefix) {
  bool found = false;
  for (size_t n = 1; n < words_.size(); ++n) {
    if (taken_[n] || words_[n].compare(0, prefix.size(), prefix)) continue;
    found = taken_[n] = true;
  }
  return found;
}

Type Decoder::take_type() {
  static const std::map<std::string, Type> named = {
      {"pred", {Type::kPredicate, 32, false}}, {"bf16", {Type::kBFloat, 16, false}},
      {"bf16x2", {Type::kBFloat, 16, true}},   {"f16x2", {Type::kFloat, 16, true}},
      {"tf32", {Type::kTf32, 32, false}},
  };
  size_t last = words_.size();
  while (last > 1 && taken_[last - 1]) --last;
  if (last <= 1) fail("has no type");
  const std::string& word = words_[last - 1];
  Type type;
  const auto found = named.find(word);
  if (found != named.end()) {
    type = found->second;
  } else {
    const size_t kind = std::string("busf").find(word[0]);
    const std::string bits = word.substr(1);
    const bool known = bits == "8" || bits == "16" || bits == "32" || bits == "64";
    if (kind == std::string::npos || !known) fail("has no type that is known");
    type.kind = static_cast<Type::Kind>(kind), type.bits = std::stoi(bits);
  }
  taken_[last - 1] = true;
  return type;
}

int Decoder::take_number(const std::string& before) {
  for (size_t n = 1; n < words_.size(); ++n) {
    const std::string& word = words_[n];
    if (taken_[n] || word.size() <= before.size() || word.compare(0, before.size(), before)) {
      continue;
    }
    const std::string rest = word.substr(before.size());
    if (!std::all_of(rest.begin(), rest.end(), [](unsigned char c) { return isdigit(c); })) {
      continue;
    }
    taken_[n] = true;
    return std::stoi(rest);
  }
  return -1;
}

bool Decoder::left() const {
  return std::find(taken_.begin(), taken_.end(), false) != taken_.end();
}

void Decoder::need_count(size_t least, size_t most) {
  if (count() >= least && count() <= most) return;
  std::string wanted = std::to_string(least);
  if (most != least) wanted += " to " + std::to_string(most);
  fail("takes " + wanted + " operands, got " + std::to_string(count()));
}

const std::string& Decoder::text(size_t place) {
  if (place >= operands_.size() || operands_[place].empty()) fail("lacks an operand");
  return operands_[place];
}

std::vector<std::string> Decoder::parts(size_t place) {
  const std::string& whole = text(place);
  if (whole[0] != '{') return {whole};
  return split(whole.substr(1, whole.size() - 2));
}

Register Decoder::read_any(const std::string& name, int bytes) {
  const Register found = names_.find(name, bytes);
  touched_.read.push_back(found.offset);
  return found;
}

Register Decoder::written_any(const std::string& name, int bytes) {
  if (name[0] != '%' && name[0] != '_' && !isalpha(static_cast<unsigned char>(name[0]))) {
    fail("cannot write to " + name);
  }
  const Register found = names_.find(name, bytes);
  touched_.written.push_back(found.offset);
  return found;
}

int Decoder::read(const std::string& name, int bytes) {
  const Register found = read_any(name, bytes);
  if ((found.bytes == 8) != (bytes == 8)) fail("operand " + name + " has another width");
  return found.offset;
}

int Decoder::written(const std::string& name, int bytes) {
  const Register found = written_any(name, bytes);
  if ((found.bytes == 8) != (bytes == 8)) fail("operand " + name + " has another width");
  return found.offset;
}

int Decoder::fragment(const std::string& name) {
  const Register found = names_.find(name, 4);
  if (found.bytes != 4) fail("operand " + name + " has another width");
  touched_.fragments.push_back(found.offset);
  return found.offset;
}

int Decoder::read_predicate(size_t place, bool* negated) {
  const std::string& whole = text(place);
  *negated = whole[0] == '!';
  return read(*negated ? trimmed(whole.substr(1)) : whole, 4);
}

void Decoder::into_pair(int first_slot, int second_slot, size_t place, int bytes) {
  const std::string& whole = text(place);
  const size_t bar = whole.find('|');
  i.operands[first_slot] = written(trimmed(whole.substr(0, bar)), bytes);
  i.operands[second_slot] =
      bar == std::string::npos ? -1 : written(trimmed(whole.substr(bar + 1)), 4);
}

std::string Decoder::base_and_offset(const std::string& inside, int64_t* offset) {
  *offset = 0;
  const size_t sign = inside.find_first_of("+-", 1);
  if (sign == std::string::npos) return trimmed(inside);
  std::string rest = trimmed(inside.substr(sign + 1));
  const bool minus = (inside[sign] == '-') != (rest[0] == '-');
  if (rest[0] == '-') rest = rest.substr(1);
  *offset = number(rest) * (minus ? -1 : 1);
  return trimmed(inside.substr(0, sign));
}

int64_t Decoder::second_address(int slot, size_t place, bool* wide) {
  const std::string& whole = text(place);
  if (whole[0] != '[') fail("needs an address, got " + whole);
  int64_t offset;
  const std::string base = base_and_offset(whole.substr(1, whole.size() - 2), &offset);
  const Register found = read_any(base, 8);
  i.operands[slot] = found.offset;
  *wide = found.bytes == 8;
  return offset;
}

void Decoder::address(int slot, size_t place) {
  i.offset = second_address(slot, place, &i.wide_address);
}

void Decoder::split_address(size_t place, std::string* base,
                            std::vector<std::string>* coordinates) {
  const std::string& whole = text(place);
  if (whole[0] != '[') fail("needs an address, got " + whole);
  const std::vector<std::string> inside = split(whole.substr(1, whole.size() - 2));
  if (inside.size() != 2 || inside[1][0] != '{') fail("needs [map, {coordinates}]");
  *base = inside[0];
  *coordinates = split(inside[1].substr(1, inside[1].size() - 2));
}

int64_t Decoder::number(const std::string& text) {
  char* end = nullptr;
  const int64_t value = static_cast<int64_t>(text[0] == '-' ? strtoll(text.c_str(), &end, 0)
                                                            : strtoull(text.c_str(), &end, 0));
  if (end == text.c_str() || *end) fail("needs a number, got " + text);
  return value;
}

int64_t Decoder::number(size_t place) { return number(text(place)); }

void Decoder::finish() {
  for (size_t n = 1; n < words_.size(); ++n) {
    if (!taken_[n]) fail("modifier ." + words_[n] + " is not known");
  }
}

void Decoder::fail(const std::string& why) { names_.fail(opcode_ + ": " + why); }

const Decoders& decoders() {
  static const Decoders all = [] {
    Decoders known;
    for (auto add : {add_arithmetic, add_bits, add_floats, add_approximations, add_comparisons,
                     add_conversions, add_moves, add_memory, add_warp, add_barriers, add_matrices,
                     add_warpgroup, add_copies, add_tensor_maps}) {
      add(known);
    }
    return known;
  }();
  return all;
}

}  // namespace attnfast::ptx
