// torch.ops.attnfast.emulator_*: what tests ask of the emulator beside running kernels.
#include <sstream>
#include <string>

#include "../emulator/launch.h"
#include "../emulator/selftest.h"
#include "tensors.h"

namespace {

using attnfast::emulator::Sabotage;

// Has one call of a primitive, or the addresses it is given, go wrong from now on: kind is "none",
// "omit", "omit in one lane", "shift" or "flip"; place is "op file line".
void emulator_sabotage(std::string kind, std::string place, int64_t amount) {
  Sabotage s;
  const std::string kinds[] = {"none", "omit", "omit in one lane", "shift", "flip"};
  int which = -1;
  for (int i = 0; i < 5; ++i) which = kinds[i] == kind ? i : which;
  STD_TORCH_CHECK(which >= 0, "emulator: there is no sabotage named ", kind);
  s.kind = static_cast<Sabotage::Kind>(which);
  std::istringstream words(place);
  words >> s.op >> s.file >> s.line;
  s.amount = amount;
  attnfast::emulator::settings().sabotage = s;
}

// Counts what primitives cost from now on, or stops.
void emulator_count(bool on) {
  attnfast::emulator::settings().counting = on;
  attnfast::emulator::counted().clear();
}

// A line "op file line requests cost least" for every place; names without blanks.
std::string emulator_counts() {
  std::ostringstream text;
  for (const auto& [place, count] : attnfast::emulator::counted()) {
    const auto& [file, line, op] = place;
    text << op << ' ' << file << ' ' << line << ' ' << count.requests << ' ' << count.cost << ' '
         << count.least << '\n';
  }
  return text.str();
}

// Has launches run the PTX of this folder from now on; "" for the kernels' C++.
void emulator_ptx(std::string folder) { attnfast::emulator::settings().ptx = folder; }

// The lines of a .ptx file that have run since it was loaded, as "1 2 3".
std::string emulator_ptx_lines(std::string file) {
  std::ostringstream text;
  for (const int line : attnfast::emulator::ptx_lines(file)) text << line << ' ';
  return text.str();
}

// Runs a small kernel that has a bug of that name, or none: "" names the sound ones.
void emulator_selftest(std::string kernel, std::string bug) {
  attnfast::emulator::run_selftest(kernel, bug);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ATTNFAST_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("emulator_sabotage", TORCH_BOX(&emulator_sabotage));
  m.impl("emulator_count", TORCH_BOX(&emulator_count));
  m.impl("emulator_counts", TORCH_BOX(&emulator_counts));
  m.impl("emulator_ptx", TORCH_BOX(&emulator_ptx));
  m.impl("emulator_ptx_lines", TORCH_BOX(&emulator_ptx_lines));
  m.impl("emulator_selftest", TORCH_BOX(&emulator_selftest));
}
