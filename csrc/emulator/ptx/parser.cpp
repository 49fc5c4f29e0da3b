#include "parser.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>

namespace attnfast::ptx {

namespace {

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

}  // namespace

int element_bytes(const std::string& word) {
  static const std::set<std::string> kinds = {"u", "s", "b", "f"};
  if (word.size() < 3 || word[0] != '.' || !kinds.count(word.substr(1, 1))) return 0;
  return isdigit(static_cast<unsigned char>(word[2])) ? atoi(word.c_str() + 2) / 8 : 0;
}

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

Program parse(const std::string& text, const std::string& entry) {
  return Parser(text).parse(entry);
}

}  // namespace attnfast::ptx
