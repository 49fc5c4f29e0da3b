// What the names of a kernel mean: declared and special registers, constants, addresses.
#include "parser.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>

namespace attnfast::ptx {

namespace {

const std::set<std::string>& special_names() {
  static const std::set<std::string> names = {
      "%tid.x",
      "%tid.y",
      "%tid.z",
      "%ntid.x",
      "%ntid.y",
      "%ntid.z",
      "%ctaid.x",
      "%ctaid.y",
      "%ctaid.z",
      "%nctaid.x",
      "%nctaid.y",
      "%nctaid.z",
      "%laneid",
      "%warpid",
      "%lanemask_eq",
      "%lanemask_lt",
      "%lanemask_le",
      "%lanemask_gt",
      "%lanemask_ge",
      "%cluster_ctarank",
      "%cluster_nctarank",
      "%dynamic_smem_size",
      "%carry"};  // the last one, the condition code, has no name in PTX
  return names;
}

}  // namespace

void Parser::registers(const std::string& statement) {  // ".pred %p<50>" or ".b16 l, h"
  const size_t space = statement.find_first_of(" \t");
  const std::string type = statement.substr(0, space);
  const bool predicate = type == ".pred";
  const int bytes = predicate ? 4 : std::max(4, element_bytes(type));
  if (!predicate && !element_bytes(type)) fail("registers of type " + type);
  if (space == std::string::npos) fail("registers without names");
  for (const std::string& name : split(statement.substr(space))) {
    const size_t angle = name.find('<');
    const int count = angle == std::string::npos ? -1 : atoi(name.c_str() + angle + 1);
    if (count < 0) scopes_[scope_].registers[name] = {reserve(bytes), bytes, predicate};
    for (int n = 0; n < count; ++n) {
      const std::string one = name.substr(0, angle) + std::to_string(n);
      scopes_[scope_].registers[one] = {reserve(bytes), bytes, predicate};
    }
  }
}

int Parser::reserve(int bytes) {
  const size_t offset = file_bytes_;
  file_bytes_ += static_cast<size_t>(bytes) * kLanes;
  return static_cast<int>(offset);
}

const Register* Parser::known(const std::string& name) const {
  for (int s = scope_; s >= 0; s = scopes_[s].parent) {
    const auto found = scopes_[s].registers.find(name);
    if (found != scopes_[s].registers.end()) return &found->second;
  }
  return nullptr;
}

Register Parser::find(const std::string& text, int bytes) {
  if (const Register* r = known(text)) return *r;
  const int size = bytes == 8 ? 8 : 4;
  if (text == "_") return {reserve(size), size, false};
  if (text[0] == '%') return special(text);
  if (text[0] == '0' && text.size() > 2 && strchr("fFdD", text[1])) {
    const int own = strchr("dD", text[1]) ? 8 : 4;
    return immediate(strtoull(text.c_str() + 2, nullptr, 16), own);
  }
  if (isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') {
    char* end = nullptr;
    uint64_t value = text[0] == '-' ? static_cast<uint64_t>(strtoll(text.c_str(), &end, 0))
                                    : strtoull(text.c_str(), &end, 0);
    if (*end && !(*end == 'U' && !end[1])) fail("operand " + text);
    if (bytes < 8) value &= bytes == 2 ? 0xFFFF : 0xFFFFFFFF;
    return immediate(value, size);
  }
  const auto symbol = symbols_.find(text);
  if (symbol == symbols_.end()) fail("operand " + text + " is not known");
  return immediate(symbol->second, size);
}

Register Parser::special(const std::string& name) {
  if (!special_names().count(name)) fail("register " + name + " is not known");
  for (const Special& s : program_.specials) {
    if (s.name == name) return {s.offset, 4, false};
  }
  program_.specials.push_back({name, reserve(4)});
  return {program_.specials.back().offset, 4, false};
}

Register Parser::immediate(uint64_t value, int bytes) {
  auto found = immediates_.find({value, bytes});
  if (found == immediates_.end()) {
    const int offset = reserve(bytes);
    program_.registers.resize(file_bytes_, kGarbage);
    for (int l = 0; l < kLanes; ++l) {
      std::memcpy(&program_.registers[offset + l * bytes], &value, bytes);
    }
    found = immediates_.emplace(std::make_pair(value, bytes), offset).first;
  }
  return {found->second, bytes, false};
}

}  // namespace attnfast::ptx
