// From PTX text to decoded instructions.
#include <cctype>
#include <cstring>
#include <set>

#include "operations.h"

namespace attnfast::ptx {

namespace {

int width_of(const std::string& type) {  // bytes of a type's name, "u32" without the dot
  if (type == "pred") return 4;
  if (type == "bf16x2" || type == "f16x2" || type == "tf32") return 4;
  if (type == "bf16") return 2;
  int n = 0;
  while (n < static_cast<int>(type.size()) && !isdigit(type[n])) n++;
  return atoi(type.c_str() + n) / 8;
}

std::string trimmed(const std::string& s) {
  const size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

std::vector<std::string> split(const std::string& s) {  // at commas outside of brackets
  std::vector<std::string> parts;
  int depth = 0;
  std::string part;
  for (char c : s) {
    if (c == '{' || c == '[' || c == '(') depth++;
    if (c == '}' || c == ']' || c == ')') depth--;
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

struct Parser {
  const std::string& text;
  Program program;
  size_t at = 0;
  int line = 1;
  std::vector<std::map<std::string, Register>> scopes;  // of registers
  std::map<std::string, int> labels;
  std::vector<std::pair<int, std::string>> branches;
  std::map<std::string, uint64_t> symbols;  // addresses: of shared variables, constants, parameters
  std::map<std::string, Space> spaces;
  std::map<std::pair<uint64_t, int>, int> immediates;
  int file = 0;
  std::string source;

  [[noreturn]] void fail(const std::string& what) {
    throw Fault("PTX line " + std::to_string(line) + ": " + what);
  }

  int reserve(int bytes) {
    const int offset = file;
    file += bytes * kLanes;
    program.registers.resize(file, char(0xA5));
    return offset;
  }

  Register immediate(uint64_t value, int bytes) {
    const auto key = std::make_pair(value, bytes);
    auto found = immediates.find(key);
    if (found == immediates.end()) {
      const int offset = reserve(bytes);
      for (int l = 0; l < kLanes; l++)
        std::memcpy(&program.registers[offset + l * bytes], &value, bytes);
      found = immediates.emplace(key, offset).first;
    }
    return {found->second, bytes, false};
  }

  bool skip_space() {
    while (at < text.size()) {
      if (text[at] == '\n') line++;
      if (isspace(text[at])) {
        at++;
      } else if (text.compare(at, 2, "//") == 0) {
        at = std::min(text.find('\n', at), text.size());
      } else {
        return true;
      }
    }
    return false;
  }

  std::string until(char end) {  // comments left out
    std::string s;
    bool quoted = false;
    while (at < text.size() && (quoted || text[at] != end)) {
      if (text[at] == '"') quoted = !quoted;
      if (text.compare(at, 2, "//") == 0) {
        at = text.find('\n', at);
        continue;
      }
      if (text[at] == '\n') line++;
      s += text[at++];
    }
    if (end != '\n') at++;
    return s;
  }

  // "u64 .ptr .global .align 1 name", "align 8 .b8 name[544]": the declared bytes, alignment, name.
  void declared(const std::string& s, int& bytes, int& align, std::string& name,
                std::string& values) {
    bytes = 0, align = 0;
    std::string head = s;
    const size_t equals = s.find('=');
    if (equals != std::string::npos) head = s.substr(0, equals), values = s.substr(equals + 1);
    size_t n = 0;
    int element = 0;
    long elements = 1;
    while (n < head.size()) {
      while (n < head.size() && isspace(head[n])) n++;
      size_t e = n;
      while (e < head.size() && !isspace(head[e])) e++;
      std::string word = head.substr(n, e - n);
      n = e;
      if (word == ".align") {
        align = atoi(head.c_str() + n);
        while (n < head.size() && isspace(head[n])) n++;
        while (n < head.size() && isdigit(head[n])) n++;
      } else if (word.size() > 2 && word[0] == '.' && strchr("usbf", word[1]) && isdigit(word[2])) {
        element = width_of(word.substr(1));
      } else if (!word.empty() && word[0] != '.' && !isdigit(word[0])) {
        const size_t bracket = word.find('[');
        name = word.substr(0, bracket);
        if (bracket != std::string::npos) elements = atol(word.c_str() + bracket + 1);
      }
    }
    bytes = element * elements;
    if (!align) align = std::max(element, 1);
  }

  void variable(std::string s) {
    int bytes, align;
    std::string name, values;
    const bool shared = s.find(".shared") != std::string::npos;
    const bool local = s.find(".local") != std::string::npos;
    const bool dynamic = s.find(".extern") != std::string::npos;
    declared(s, bytes, align, name, values);
    if (shared) {
      spaces[name] = Space::kShared;
      if (dynamic) {
        dynamic_shared.push_back(name);
        dynamic_align = std::max(dynamic_align, align);
      } else {
        program.static_shared = (program.static_shared + align - 1) / align * align;
        symbols[name] = program.static_shared;
        program.static_shared += bytes;
      }
    } else if (local) {
      spaces[name] = Space::kLocal;
      program.local_bytes = (program.local_bytes + align - 1) / align * align;
      symbols[name] = program.local_bytes;
      program.local_bytes += bytes;
    } else {
      spaces[name] = Space::kGlobal;
      const int element = std::max(1, width_of(s.substr(s.find(".b") + 1)));
      std::vector<char> data(bytes + 16);
      size_t n = values.find('{');
      for (int k = 0; n != std::string::npos && k < bytes; k += element) {
        const long value = strtol(values.c_str() + n + 1, nullptr, 0);
        std::memcpy(&data[k], &value, std::min(element, 8));
        n = values.find(',', n + 1);
      }
      data.resize(bytes);
      program.constants.push_back(std::move(data));
      symbols[name] = reinterpret_cast<uint64_t>(program.constants.back().data());
    }
  }
  std::vector<std::string> dynamic_shared;
  int dynamic_align = 1;

  void kernel_parameters() {
    while (text[at] != '(') at++;
    at++;
    for (const std::string& s : split(until(')'))) {
      int bytes, align;
      std::string name, values;
      declared(s, bytes, align, name, values);
      if (s.find(".ptr") != std::string::npos) bytes = align = 8;
      int& end = program.parameter_bytes;
      end = (end + align - 1) / align * align;
      program.parameters.push_back({name, end, bytes});
      symbols[name] = end, spaces[name] = Space::kParam;
      end += bytes;
    }
  }

  Register* find(const std::string& name) {
    for (size_t n = scopes.size(); n--;) {
      auto found = scopes[n].find(name);
      if (found != scopes[n].end()) return &found->second;
    }
    return nullptr;
  }

  void registers(const std::string& s) {  // "pred %p<50>" or "b16 l, h"
    const size_t space = s.find_first_of(" \t");
    const std::string type = s.substr(0, space);
    const int bytes = std::max(4, width_of(type));
    for (const std::string& name : split(s.substr(space))) {
      const size_t angle = name.find('<');
      if (angle == std::string::npos) {
        scopes.back()[name] = {reserve(bytes), bytes, type == "pred"};
        continue;
      }
      const int count = atoi(name.c_str() + angle + 1);
      for (int n = 0; n < count; n++)
        scopes.back()[name.substr(0, angle) + std::to_string(n)] = {reserve(bytes), bytes,
                                                                    type == "pred"};
    }
  }

  Register operand(const std::string& s, int bytes) {
    if (Register* r = find(s)) return *r;
    if (s == "_") return {reserve(std::max(bytes, 4)), std::max(bytes, 4), false};
    if (s[0] == '%') {
      if (!isalpha(s[1])) fail("register " + s);
      if (!program.special.count(s)) program.special[s] = reserve(4);
      return {program.special[s], 4, false};
    }
    const int size = std::max(bytes, 4);
    if (s.compare(0, 2, "0f") == 0 || s.compare(0, 2, "0F") == 0)
      return immediate(strtoull(s.c_str() + 2, nullptr, 16), 4);
    if (s.compare(0, 2, "0d") == 0 || s.compare(0, 2, "0D") == 0)
      return immediate(strtoull(s.c_str() + 2, nullptr, 16), 8);
    if (isdigit(s[0]) || s[0] == '-') {
      uint64_t value = s[0] == '-' ? static_cast<uint64_t>(strtoll(s.c_str(), nullptr, 0))
                                   : strtoull(s.c_str(), nullptr, 0);
      if (size == 4) value &= 0xFFFFFFFF;
      if (bytes == 2) value &= 0xFFFF;
      return immediate(value, size);
    }
    auto found = symbols.find(s);
    if (found != symbols.end()) return immediate(found->second, size);
    fail("operand " + s);
  }

  Operand parsed(const std::string& s) {
    Operand o;
    o.text = s;
    if (s[0] == '{') {
      o.parts = split(s.substr(1, s.size() - 2));
    } else if (s[0] == '[') {
      o.memory = true;
      std::string base = trimmed(s.substr(1, s.size() - 2));
      const size_t plus = base.find('+');
      if (plus != std::string::npos) {
        o.offset = strtoll(trimmed(base.substr(plus + 1)).c_str(), nullptr, 0);
        base = trimmed(base.substr(0, plus));
      }
      o.base = base;
    }
    return o;
  }

  void instruction(std::string s) {
    s = trimmed(s);
    if (s.empty()) return;
    Instruction i;
    i.line = line;
    if (s[0] == '@') {
      const size_t end = s.find_first_of(" \t");
      std::string guard = s.substr(1, end - 1);
      if (guard[0] == '!') i.guard_negated = true, guard = guard.substr(1);
      i.guard = operand(guard, 4).offset;
      s = trimmed(s.substr(end));
    }
    const size_t space = s.find_first_of(" \t\n{");
    std::string name = s.substr(0, space);
    std::vector<Operand> operands;
    if (space != std::string::npos)
      for (const std::string& part : split(s.substr(space))) operands.push_back(parsed(part));
    program.opcodes[name]++;
    if (program.sources.empty() || program.sources.back() != source)
      program.sources.push_back(source);
    i.source = source.empty() ? -1 : program.sources.size() - 1;
    Opcode opcode;
    size_t from = 0;
    for (size_t dot; (dot = name.find('.', from)) != std::string::npos; from = dot + 1)
      opcode.words.push_back(name.substr(from, dot - from));
    opcode.words.push_back(name.substr(from));
    opcode.name = name;
    if (opcode.words[0] == "bra") {
      i.branch = true;
      branches.push_back({static_cast<int>(program.code.size()), operands[0].text});
    } else if (opcode.words[0] == "ret" || opcode.words[0] == "exit") {
      i.exits = true;
    } else {
      Decoder decoder{
          [this](const std::string& t, int bytes) { return operand(t, bytes); },
          [this](const std::string& t) { return spaces.count(t) ? spaces[t] : Space::kGlobal; },
          [this](const std::string& t) { fail(t); }};
      decode(opcode, operands, i, decoder);
    }
    program.code.push_back(i);
  }

  void body() {
    while (text[at] != '{') {
      if (text.compare(at, 8, ".reqntid") == 0) program.threads = atoi(text.c_str() + at + 8);
      if (text[at] == '\n') line++;
      at++;
    }
    for (auto& name : dynamic_shared) {
      program.static_shared =
          (program.static_shared + dynamic_align - 1) / dynamic_align * dynamic_align;
      symbols[name] = program.static_shared;
    }
    int depth = 0;
    while (skip_space()) {
      if (text[at] == '{') {
        at++, depth++;
        scopes.emplace_back();
      } else if (text[at] == '}') {
        at++;
        scopes.pop_back();
        if (!--depth) break;
      } else if (text.compare(at, 4, ".loc") == 0) {
        const size_t end = text.find('\n', at), comment = text.find("// ", at);
        source =
            comment < end ? text.substr(comment + 3, end - comment - 3) : text.substr(at, end - at);
        at = end;
      } else if (text.compare(at, 5, ".reg ") == 0) {
        at += 5;
        registers(trimmed(until(';')));
      } else if (text[at] == '.') {
        const std::string s = until(';');
        if (s.compare(0, 7, ".pragma")) variable(s);
      } else {
        size_t e = at;
        while (e < text.size() && (isalnum(text[e]) || strchr("_$%", text[e]))) e++;
        if (text[e] == ':') {
          labels[text.substr(at, e - at)] = program.code.size();
          at = e + 1;
        } else {
          const int first = line;
          const std::string s = until(';');
          const int last = line;
          line = first;
          instruction(s);
          line = last;
        }
      }
    }
    program.code.emplace_back();
    program.code.back().exits = true;
    for (auto& [index, label] : branches) {
      if (!labels.count(label)) fail("label " + label);
      program.code[index].target = labels[label];
    }
  }

  Program parse(const std::string& entry) {
    program.constants.reserve(64);
    for (size_t n = 0; n < text.size();) {
      const size_t end = std::min(text.find('\n', n), text.size());
      program.lines.push_back(trimmed(text.substr(n, end - n)));
      n = end + 1;
    }
    while (skip_space()) {
      if (text.compare(at, 8, ".section") == 0) break;
      if (text.compare(at, 8, ".version") == 0 || text.compare(at, 7, ".target") == 0 ||
          text.compare(at, 5, ".file") == 0 || text.compare(at, 13, ".address_size") == 0) {
        until('\n');
        continue;
      }
      const size_t semicolon = text.find(';', at), kernel = text.find(".entry", at);
      if (kernel < semicolon) {
        while (at < kernel) {
          if (text[at] == '\n') line++;
          at++;
        }
        at += 6;
        skip_space();
        size_t e = at;
        while (isalnum(text[e]) || strchr("_$", text[e])) e++;
        const std::string name = text.substr(at, e - at);
        if (entry.empty() || name == entry) {
          program.name = name;
          at = e;
          kernel_parameters();
          body();
          return std::move(program);
        }
        int depth = 0;  // another kernel
        bool entered = false;
        while (at < text.size() && (!entered || depth)) {
          if (text.compare(at, 2, "//") == 0) at = text.find('\n', at);
          if (text[at] == '\n') line++;
          if (text[at] == '{') depth++, entered = true;
          if (text[at] == '}') depth--;
          at++;
        }
      } else {
        variable(until(';'));
      }
    }
    throw Fault("no kernel " + entry);
  }
};

}  // namespace

Program parse(const std::string& text, const std::string& entry) {
  return Parser{text}.parse(entry);
}

}  // namespace attnfast::ptx
