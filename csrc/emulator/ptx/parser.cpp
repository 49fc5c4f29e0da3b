#include "parser.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <set>

namespace attnfast::ptx {

namespace {

constexpr char kGarbage = char(0xA5);  // what registers hold before they are written

bool in_name(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }

// The same text with blanks for comments.
std::string without_comments(std::string text) {
  bool quoted = false;
  for (size_t n = 0; n < text.size(); ++n) {
    if (text[n] == '"') quoted = !quoted;
    if (quoted || text[n] != '/' || n + 1 == text.size()) continue;
    if (text[n + 1] != '/' && text[n + 1] != '*') continue;
    const bool block = text[n + 1] == '*';
    size_t end = block ? text.find("*/", n + 2) : text.find('\n', n);
    end = end == std::string::npos ? text.size() : end + (block ? 2 : 0);
    for (; n < end; ++n) {
      if (text[n] != '\n') text[n] = ' ';
    }
    --n;
  }
  return text;
}

int element_bytes(const std::string& word) {  // of ".b8"; 0 for other words
  static const std::set<std::string> kinds = {"u", "s", "b", "f"};
  if (word.size() < 3 || word[0] != '.' || !kinds.count(word.substr(1, 1))) return 0;
  return isdigit(static_cast<unsigned char>(word[2])) ? atoi(word.c_str() + 2) / 8 : 0;
}

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

Parser::Parser(const std::string& text) : text_(without_comments(text)) {
  size_t n = 0;
  while (n < text.size()) {
    const size_t end = std::min(text.find('\n', n), text.size());
    const std::string line = trimmed(text.substr(n, end - n));
    program_.lines.push_back(line);
    if (!line.compare(0, 6, ".file\t") || !line.compare(0, 6, ".file ")) {
      const size_t quote = line.find('"'), slash = line.rfind('/');
      const size_t from = slash == std::string::npos ? quote + 1 : slash + 1;
      const std::string name = line.substr(from, line.rfind('"') - from);
      files_[atoi(line.c_str() + 6)] = name;
    }
    n = end + 1;
  }
  program_.constants.reserve(256);  // they have addresses
}

std::string Parser::place() const {
  std::string text = "PTX line " + std::to_string(line_);
  if (line_ <= static_cast<int>(program_.lines.size())) text += ": " + program_.lines[line_ - 1];
  return text + "\n  ";
}

// ---- The text

void Parser::advance(size_t to) {
  to = std::min(to, text_.size());
  line_ += static_cast<int>(std::count(text_.begin() + at_, text_.begin() + to, '\n'));
  at_ = to;
}

bool Parser::skip_space() {
  size_t n = at_;
  while (n < text_.size() && isspace(static_cast<unsigned char>(text_[n]))) ++n;
  advance(n);
  return at_ < text_.size();
}

std::string Parser::until(char end) {
  size_t n = at_;
  bool quoted = false;
  while (n < text_.size() && (quoted || text_[n] != end)) {
    if (text_[n] == '"') quoted = !quoted;
    ++n;
  }
  const std::string found = text_.substr(at_, n - at_);
  advance(n + 1);
  return found;
}

std::string Parser::name_here() {
  size_t n = at_;
  while (n < text_.size() && in_name(text_[n])) ++n;
  const std::string name = text_.substr(at_, n - at_);
  at_ = n;
  return name;
}

void Parser::skip_body() {
  int depth = 0;
  size_t n = text_.find('{', at_);
  if (n == std::string::npos) fail("a body without an end");
  do {
    if (text_[n] == '{') ++depth;
    if (text_[n] == '}') --depth;
    ++n;
  } while (n < text_.size() && depth);
  advance(n);
}

// ---- Outside of kernels

Program Parser::parse(const std::string& entry) {
  while (skip_space()) {
    const size_t line_end = std::min(text_.find('\n', at_), text_.size());
    if (at_word(".version") || at_word(".file") || at_word(".address_size")) {
      advance(line_end);
    } else if (at_word(".target")) {
      const size_t number = text_.find("sm_", at_);
      program_.target = atoi(text_.c_str() + number + 3);
      advance(line_end);
    } else if (at_word(".section")) {
      skip_body();
    } else if (at_word(".pragma")) {
      until(';');
    } else {
      const size_t semicolon = text_.find(';', at_), brace = text_.find('{', at_);
      const size_t word = text_.find(".entry", at_), function = text_.find(".func", at_);
      if (word < std::min(semicolon, brace)) {
        advance(word + 6);
        skip_space();
        const std::string name = name_here();
        if (entry.empty() || name == entry) {
          kernel(name);
          return std::move(program_);
        }
        skip_body();
      } else if (function < std::min(semicolon, brace)) {
        if (brace < semicolon)
          skip_body();
        else
          until(';');  // a call of it is an error
      } else {
        variable(until(';'));
      }
    }
  }
  throw Fault("the text has no kernel " + entry);
}

Declaration Parser::declared(const std::string& statement) {
  Declaration d;
  const size_t equals = statement.find('=');
  std::string head = statement.substr(0, equals);
  if (equals != std::string::npos) d.values = statement.substr(equals + 1);
  bool aligned = false, pointer = false;
  int64_t elements = 1;
  size_t n = 0;
  const auto next = [&] {
    while (n < head.size() && isspace(static_cast<unsigned char>(head[n]))) ++n;
    const size_t from = n;
    while (n < head.size() && !isspace(static_cast<unsigned char>(head[n]))) ++n;
    return head.substr(from, n - from);
  };
  for (std::string word = next(); !word.empty(); word = next()) {
    if (word == ".align") {
      d.align = atoi(next().c_str()), aligned = true;
    } else if (word == ".shared") {
      d.shared = true;
    } else if (word == ".local") {
      d.local = true;
    } else if (word == ".extern") {
      d.dynamic = true;
    } else if (word == ".ptr") {
      pointer = true;
    } else if (element_bytes(word)) {
      d.element = element_bytes(word);
    } else if (word[0] != '.') {
      const size_t bracket = word.find('[');
      d.name = word.substr(0, bracket);
      if (bracket != std::string::npos) elements = atoll(word.c_str() + bracket + 1);
    } else if (word != ".param" && word != ".global" && word != ".const" && word != ".visible" &&
               word != ".weak" && word != ".common") {
      fail("declaration " + word + " is not known");
    }
  }
  if (d.name.empty() || !d.element) fail("a declaration without a name or type");
  d.bytes = static_cast<int>(d.element * elements);
  if (!aligned || pointer)
    d.align = d.element;  // a pointer's alignment is that of what it points to
  return d;
}

void Parser::variable(const std::string& statement) {
  const Declaration d = declared(trimmed(statement));
  if (d.shared && d.dynamic) {
    dynamic_shared_.push_back(d.name);
    dynamic_align_ = std::max(dynamic_align_, d.align);
  } else if (d.shared || d.local) {
    int& end = d.shared ? program_.static_shared : program_.local_bytes;
    end = (end + d.align - 1) / d.align * d.align;
    symbols_[d.name] = end + (d.shared ? kSharedBase : 0);
    end += d.bytes;
  } else {
    constant(d);
  }
}

void Parser::constant(const Declaration& d) {
  if (program_.constants.size() == program_.constants.capacity()) fail("too many variables");
  std::vector<char> data(d.bytes + d.align);
  // The vector's own memory is aligned to 16 bytes.
  if (d.align > 16) fail("a variable aligned to more than 16 bytes");
  size_t n = d.values.find('{');
  for (int k = 0; n != std::string::npos && k < d.bytes; k += d.element) {
    const char* from = d.values.c_str() + n + 1;
    while (isspace(static_cast<unsigned char>(*from))) ++from;
    const bool bits =
        from[0] == '0' && (from[1] == 'f' || from[1] == 'F' || from[1] == 'd' || from[1] == 'D');
    const uint64_t value = bits           ? strtoull(from + 2, nullptr, 16)
                           : *from == '-' ? static_cast<uint64_t>(strtoll(from, nullptr, 0))
                                          : strtoull(from, nullptr, 0);
    std::memcpy(&data[k], &value, std::min(d.element, 8));
    n = d.values.find(',', n + 1);
  }
  data.resize(d.bytes);
  program_.constants.push_back(std::move(data));
  symbols_[d.name] = reinterpret_cast<uint64_t>(program_.constants.back().data());
}

// ---- A kernel

void Parser::kernel(const std::string& name) {
  program_.name = name;
  parameters();
  attributes();
  place_dynamic_shared();
  body();
  resolve_branches();
  mark_fragments();
  program_.registers.resize(file_bytes_, kGarbage);
  program_.runs.resize(program_.code.size());
}

void Parser::parameters() {
  skip_space();
  if (text_[at_] != '(') return;
  ++at_;
  for (const std::string& statement : split(until(')'))) {
    const Declaration d = declared(statement);
    int& end = program_.parameter_bytes;
    end = (end + d.align - 1) / d.align * d.align;
    program_.parameters.push_back({d.name, end, d.bytes});
    symbols_[d.name] = end;
    end += d.bytes;
  }
}

void Parser::attributes() {
  while (skip_space() && text_[at_] != '{') {
    if (text_[at_] != '.') fail("unexpected text before a kernel's body");
    ++at_;
    const std::string word = name_here();
    const size_t end = std::min(text_.find('.', at_), text_.find('{', at_));
    const std::vector<std::string> numbers = split(text_.substr(at_, end - at_));
    int threads = 1;
    for (const std::string& number : numbers) threads *= std::max(atoi(number.c_str()), 1);
    if (word == "reqntid") {
      program_.threads = threads;
      if (numbers.size() > 1 && threads != atoi(numbers[0].c_str()))
        fail("blocks of one dimension");
    } else if (word == "maxntid") {
      program_.most_threads = threads;
    } else if (word == "reqnctapercluster" || word == "explicitcluster") {
      if (word[0] == 'e' || threads != 1) fail("clusters are not known");
    } else if (word != "minnctapersm" && word != "maxnreg" && word != "maxnctapersm") {
      fail("attribute ." + word + " is not known");
    }
    advance(end);
  }
}

void Parser::place_dynamic_shared() {
  if (dynamic_shared_.empty()) return;
  int& end = program_.static_shared;
  end = (end + dynamic_align_ - 1) / dynamic_align_ * dynamic_align_;
  for (const std::string& name : dynamic_shared_) symbols_[name] = end + kSharedBase;
}

void Parser::body() {
  int depth = 0;
  do {
    if (!skip_space()) fail("a body without an end");
    if (text_[at_] == '{') {
      ++at_, ++depth;
      scopes_.push_back({scope_, {}, {}});
      scope_ = static_cast<int>(scopes_.size()) - 1;
    } else if (text_[at_] == '}') {
      ++at_, --depth;
      scope_ = scopes_[scope_].parent;
    } else {
      statement();
    }
  } while (depth);
  program_.code.emplace_back();
  program_.code.back().flow = Flow::kExit;
  program_.code.back().line = program_.code.size() > 1 ? program_.code.end()[-2].line : 1;
  program_.touched.emplace_back();
}

void Parser::statement() {
  if (at_word(".loc")) return location();
  if (text_[at_] == ';') {
    ++at_;
    return;
  }
  if (text_[at_] == '.') {
    const std::string found = until(';');
    if (!found.compare(0, 4, ".reg")) return registers(trimmed(found.substr(4)));
    if (!found.compare(0, 7, ".pragma")) return;
    if (!found.compare(0, 14, ".branchtargets")) {
      tables_[last_label_] = split(trimmed(found.substr(14)));
      return;
    }
    return variable(found);
  }
  size_t end = at_;
  while (end < text_.size() && (in_name(text_[end]) || text_[end] == '%')) ++end;
  size_t colon = end;
  while (colon < text_.size() && isspace(static_cast<unsigned char>(text_[colon]))) ++colon;
  if (end > at_ && text_[colon] == ':' && text_[colon + 1] != ':') {
    last_label_ = text_.substr(at_, end - at_);
    scopes_[scope_].labels[last_label_] = static_cast<int>(program_.code.size());
    return advance(colon + 1);
  }
  const int first = line_;
  const std::string found = until(';');
  const int last = line_;
  line_ = first;
  instruction(trimmed(found));
  line_ = last;
}

void Parser::location() {  // .loc file line column
  const std::string words = until('\n');
  char* end = nullptr;
  const int file = static_cast<int>(strtol(words.c_str() + 4, &end, 10));
  const int line = static_cast<int>(strtol(end, nullptr, 10));
  const auto name = files_.find(file);
  const std::string place = (name == files_.end() ? "file " + std::to_string(file) : name->second) +
                            ":" + std::to_string(line);
  const auto [found, fresh] = locations_.emplace(place, program_.sources.size());
  if (fresh) program_.sources.push_back(place);
  source_ = found->second;
}

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

void Parser::instruction(std::string statement) {
  Instruction i;
  Touched touched;
  i.line = line_, i.source = source_;
  if (statement[0] == '@') {
    const size_t end = statement.find_first_of(" \t\n");
    if (end == std::string::npos) fail("a predicate without an instruction");
    std::string guard = statement.substr(1, end - 1);
    i.guard_negated = guard[0] == '!';
    if (i.guard_negated) guard = guard.substr(1);
    i.guard = find(guard, 4).offset;
    touched.read.push_back(i.guard);
    statement = trimmed(statement.substr(end));
  }
  const size_t space = statement.find_first_of(" \t\n{[");
  const std::string opcode = statement.substr(0, space);
  std::vector<std::string> operands;
  if (space != std::string::npos) operands = split(statement.substr(space));
  Decoder decoder(i, touched, opcode, operands, *this);
  if (decoder.op() == "bra") {
    branch(decoder);
  } else if (decoder.op() == "brx") {
    indexed_branch(decoder);
  } else if (decoder.op() == "ret" || decoder.op() == "exit") {
    decoder.pass({"uni"});
    i.flow = Flow::kExit;
  } else {
    const auto known = decoders().find(decoder.op());
    if (known == decoders().end()) decoder.fail("opcode is not known");
    known->second(decoder);
  }
  decoder.finish();
  program_.code.push_back(i);
  program_.touched.push_back(std::move(touched));
}

void Parser::branch(Decoder& decoder) {
  decoder.pass({"uni"});
  decoder.need_count(1);
  decoder.i.flow = Flow::kBranch;
  branches_.push_back({static_cast<int>(program_.code.size()), scope_, decoder.text(0)});
}

void Parser::indexed_branch(Decoder& decoder) {
  decoder.need("idx");
  decoder.pass({"uni"});
  decoder.need_count(2);
  decoder.from(1, 0, 4);
  decoder.i.flow = Flow::kIndexedBranch;
  const auto table = tables_.find(decoder.text(1));
  if (table == tables_.end()) decoder.fail("needs the label of .branchtargets");
  const auto targets = std::make_shared<IndexedTargets>();
  targets->targets.resize(table->second.size());
  decoder.i.detail = targets;
  branches_.push_back({static_cast<int>(program_.code.size()), scope_, decoder.text(1)});
}

int Parser::label(const Branch& branch) {
  for (int s = branch.scope; s >= 0; s = scopes_[s].parent) {
    const auto found = scopes_[s].labels.find(branch.label);
    if (found != scopes_[s].labels.end()) return found->second;
  }
  line_ = program_.code[branch.instruction].line;
  fail("label " + branch.label + " is not known");
}

void Parser::resolve_branches() {
  for (const Branch& b : branches_) {
    Instruction& i = program_.code[b.instruction];
    if (i.flow == Flow::kBranch) {
      i.target = label(b);
      continue;
    }
    const auto resolved = std::make_shared<IndexedTargets>();
    for (const std::string& target : tables_[b.label]) {
      resolved->targets.push_back(label({b.instruction, b.scope, target}));
    }
    i.detail = resolved;
  }
}

void Parser::mark_fragments() {
  std::set<int> fragments;
  for (const Touched& t : program_.touched) {
    fragments.insert(t.fragments.begin(), t.fragments.end());
  }
  if (fragments.empty()) return;
  for (size_t n = 0; n < program_.code.size(); ++n) {
    const Touched& t = program_.touched[n];
    // Compilers put copies of accumulators between wgmma.fence and the wgmma.
    if (!t.fragments.empty() || t.renames) continue;
    for (int r : t.written) program_.code[n].writes_fragment |= fragments.count(r) != 0;
  }
}

Program parse(const std::string& text, const std::string& entry) {
  return Parser(text).parse(entry);
}

}  // namespace attnfast::ptx
