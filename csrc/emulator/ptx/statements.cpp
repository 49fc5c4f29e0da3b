// The body of a kernel: scopes, labels, instructions, where branches lead.
#include "parser.h"

#include <cstdlib>
#include <set>

namespace attnfast::ptx {

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

}  // namespace attnfast::ptx
