#include "block.h"

#include <algorithm>
#include <cstring>
#include <thread>

asm(R"(
.text
.globl attnfast_emulator_switch
.hidden attnfast_emulator_switch
.type attnfast_emulator_switch, @function
attnfast_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size attnfast_emulator_switch, .-attnfast_emulator_switch
)");

namespace attnfast::emulator {
namespace {

thread_local Block* running_block = nullptr;

}  // namespace

Block& Block::current() { return *running_block; }

std::string Block::run(const Launch& launch, int64_t index) {
  running_block = this;
  launch_ = &launch, index_ = index;
  random_ = Random(launch.seed * 0x10001 + static_cast<uint64_t>(index));
  landing_ = static_cast<Landing>(random_.below(3));
  const int warps = (launch.threads + kWarp - 1) / kWarp;
  shared_.reset(launch.shared_bytes, warps);
  lanes_.assign(launch.threads, Lane{});
  warps_.assign(warps, Warp{});
  for (Barrier& barrier : barriers_) barrier = Barrier{};
  copies_.clear(), under_way_.clear(), ready_.clear(), fault_.clear();
  last_counted_ = Place{};
  alive_ = launch.threads, starved_ = -1, starved_for_ = 0;
  for (int i = 0; i < launch.threads; ++i) {
    lanes_[i].sp = stacks_.begin(i, &Block::entry);
    ready_.push_back(i);
  }
  const uint32_t first = random_.below(launch.threads);
  running_ = ready_[first];
  ready_[first] = ready_.back(), ready_.pop_back();
  attnfast_emulator_switch(&host_, lanes_[running_].sp);
  if (launch.counting) {
    for (Warp& warp : warps_) warp.accesses.flush(&counts_);
  }
  running_block = nullptr;
  return fault_;
}

void Block::entry() {
  Block& block = current();
  block.launch_->body();
  block.leave();
}

void Block::leave() {
  Lane& lane = lanes_[running_];
  Warp& mine = warps_[warp()];
  for (const auto& group : lane.groups) {
    if (!group.empty()) fail("ended before its asynchronous copies were waited for");
  }
  if (!lane.open.empty()) fail("ended before its asynchronous copies were committed");
  if (mine.arrived) fail("left the kernel while lanes of its warp wait: " + mine.place.text());
  lane.done = true, lane.at = Place{};
  ++mine.done;
  if (--alive_ == 0) attnfast_emulator_switch(&lane.sp, host_);
  resume_another();
}

bool Block::targets(const Place& place) const {
  const Sabotage& s = launch_->sabotage;
  return s.line == place.line && s.op == place.op && s.file == place.file_name();
}

bool Block::enter(const Place& place) {
  lanes_[running_].at = place;
  if (launch_->counting && place != last_counted_) {
    counts_[{place.file_name(), place.line, place.op}];
    last_counted_ = place;
  }
  const Sabotage::Kind kind = launch_->sabotage.kind;
  if (kind == Sabotage::Kind::kOmit) return !targets(place);
  if (kind == Sabotage::Kind::kOmitInOneLane) return lane() != 5 || !targets(place);
  return true;
}

void Block::arrive(const Place& place, void* argument) {
  Warp& mine = warps_[warp()];
  if (mine.done) fail(place, "reached after lanes of the same warp have left the kernel");
  if (mine.arrived && mine.place != place) {
    fail(place, "divergence: other lanes of the warp are in " + mine.place.text());
  }
  mine.place = place;
  mine.arguments[lane()] = argument;
  if (++mine.arrived < kWarp) mine.waiting.push_back(running_);
}

void Block::sync(int id, int warps, const Place& place) {
  Warp& mine = warps_[warp()];
  Barrier& barrier = barriers_[id];
  arrive(place, nullptr);
  if (mine.arrived < kWarp) {
    mine.waiting.pop_back();
  } else {
    mine.arrived = 0;
    if (launch_->counting) mine.accesses.flush(&counts_);
    if (id == 0 && !barrier.warps.empty() && barrier.place != place) {
      fail(place, "divergence: other warps are in " + barrier.place.text());
    }
    barrier.place = place;
    barrier.warps.push_back(warp());
  }
  if (static_cast<int>(barrier.warps.size()) < warps) {
    barrier.waiting.push_back(running_);
    return resume_another();
  }
  shared_.join(barrier.warps);
  barrier.warps.clear();
  wake(&barrier.waiting);
  yield();  // the last to arrive is not the first to go on
}

void Block::sync_lanes(const Place& place) {
  meet(place, nullptr, [this](void**) { shared_.join_lanes(warp()); });
}

void Block::wait() { resume_another(); }

void Block::yield() {
  ready_.push_back(running_);
  resume_another();
}

void Block::pause(const Place& place, int64_t turn, int64_t passes) {
  constexpr int64_t kInVain = 1 << 16;  // turns of a lane, in which the others of its block go on
  if (*launch_->stop) fail(place, "ended: another block has failed");
  if (turn > kInVain && handed().in_vain(index_, passes, *launch_->workers)) {
    fail(place, "deadlock: no other block brings about what is awaited");
  }
  if (turn % 16 == 15) std::this_thread::yield();
  yield();
}

void Block::wake(std::vector<int>* lanes) {
  ready_.insert(ready_.end(), lanes->begin(), lanes->end());
  lanes->clear();
}

void Block::resume_another() {
  if (landing_ == Landing::kSometime && !under_way_.empty() && random_.below(64) == 0) {
    land(under_way_[random_.below(static_cast<uint32_t>(under_way_.size()))]);
  }
  if (ready_.empty()) fail("deadlock: " + where());
  // A fair schedule keeps all warps abreast, which hides missing barriers: hold one back a while.
  if (--starved_for_ < 0) {
    const auto warps = static_cast<uint32_t>(warps_.size());
    starved_ = random_.below(3) ? static_cast<int>(random_.below(warps)) : -1;
    starved_for_ = 1 << random_.below(16);
  }
  const auto n = static_cast<uint32_t>(ready_.size());
  uint32_t chosen = random_.below(n);
  for (int tries = 0; starved_ >= 0 && tries < 16 && ready_[chosen] / kWarp == starved_; ++tries) {
    chosen = random_.below(n);
  }
  const int next = ready_[chosen], previous = running_;
  ready_[chosen] = ready_.back(), ready_.pop_back();
  if (next == previous) return;
  running_ = next;
  attnfast_emulator_switch(&lanes_[previous].sp, lanes_[next].sp);
}

char* Block::read_shared(uint32_t address, int bytes, const Place& place, bool collective) {
  if (const char* fault = shared_.read(address, bytes, running_, collective)) {
    fail(place, "shared address " + std::to_string(address) + " " + fault);
  }
  if (launch_->counting && !collective) {
    warps_[warp()].accesses.add(lane(), place, Space::kShared, address, bytes);
  }
  return shared_.at(address);
}

char* Block::write_shared(uint32_t address, int bytes, const Place& place) {
  if (const char* fault = shared_.write(address, bytes, running_)) {
    fail(place, "shared address " + std::to_string(address) + " " + fault);
  }
  if (launch_->counting) {
    warps_[warp()].accesses.add(lane(), place, Space::kShared, address, bytes);
  }
  return shared_.at(address);
}

void Block::read_global(const void* address, int bytes, const Place& place) {
  if (const char* fault =
          launch_->memory->refuse(address, bytes, false, &lanes_[running_].region)) {
    fail(place, std::string(fault) + ": " + launch_->memory->describe(address, bytes));
  }
  const auto number = reinterpret_cast<uintptr_t>(address);
  if (number % bytes) fail(place, "a misaligned read of " + std::to_string(bytes) + " bytes");
  if (launch_->counting) {
    warps_[warp()].accesses.add(lane(), place, Space::kGlobal, number, bytes);
  }
}

void Block::write_global(const void* address, int bytes, const Place& place) {
  if (const char* fault = launch_->memory->refuse(address, bytes, true, &lanes_[running_].region)) {
    fail(place, std::string(fault) + ": " + launch_->memory->describe(address, bytes));
  }
  const auto number = reinterpret_cast<uintptr_t>(address);
  if (number % bytes) fail(place, "a misaligned write of " + std::to_string(bytes) + " bytes");
  if (launch_->counting) {
    warps_[warp()].accesses.add(lane(), place, Space::kGlobal, number, bytes);
  }
}

void Block::count(const Place& place, const std::vector<uint64_t>& addresses, int bytes) {
  if (!launch_->counting) return;
  counts_[{place.file_name(), place.line, place.op}].add(
      count_request(Space::kShared, addresses, bytes));
}

void Block::copy(uint32_t to, const void* from, int bytes, int valid, const Place& place) {
  const char* fault =
      gpu().turing() ? shared_.write(to, bytes, running_) : shared_.begin_copy(to, bytes, running_);
  if (fault) fail(place, "shared address " + std::to_string(to) + " " + fault);
  if (valid > 0) {
    const auto number = reinterpret_cast<uintptr_t>(from);
    if (number % bytes) fail(place, "a misaligned copy of " + std::to_string(bytes) + " bytes");
    if (const char* fault = launch_->memory->refuse(from, valid, false, &lanes_[running_].region)) {
      fail(place, std::string(fault) + ": " + launch_->memory->describe(from, valid));
    }
  }
  if (valid && valid != bytes) fail(place, "a copy of part of " + std::to_string(bytes) + " bytes");
  if (launch_->counting) {
    const auto number = reinterpret_cast<uintptr_t>(from);
    if (valid) warps_[warp()].accesses.add(lane(), place, Space::kGlobal, number, bytes);
    const Place shared{"copy_async:shared", place.file, place.line};
    warps_[warp()].accesses.add(lane(), shared, Space::kShared, to, bytes);
  }
  if (gpu().turing()) {
    std::memcpy(shared_.at(to), from, valid);
    std::memset(shared_.at(to) + valid, 0, bytes - valid);
    return;
  }
  copies_.push_back({to, from, bytes, valid, running_, false});
  lanes_[running_].open.push_back(copies_.size() - 1);
  under_way_.push_back(copies_.size() - 1);
  if (landing_ == Landing::kAtOnce) land(copies_.size() - 1);
}

void Block::land(size_t index) {
  Copy& copy = copies_[index];
  if (copy.landed) return;
  std::memcpy(shared_.at(copy.to), copy.from, copy.valid);
  std::memset(shared_.at(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
  copy.landed = true;
  for (size_t& x : under_way_) {
    if (x != index) continue;
    x = under_way_.back(), under_way_.pop_back();
    break;
  }
}

void Block::commit() {
  Lane& lane = lanes_[running_];
  lane.groups.push_back(std::move(lane.open));
  lane.open.clear();
}

void Block::wait_copies(int newest, const Place& place) {
  if (!enter(place)) return;
  Lane& lane = lanes_[running_];
  const size_t done = lane.groups.size() - std::min<size_t>(newest, lane.groups.size());
  for (size_t i = 0; i < done; ++i) {
    for (const size_t copy : lane.groups[i]) {
      land(copy);
      shared_.end_copy(copies_[copy].to, copies_[copy].bytes, running_);
    }
  }
  lane.groups.erase(lane.groups.begin(), lane.groups.begin() + done);
}

std::string Block::where() const {
  std::string text;
  for (size_t w = 0; w < warps_.size(); ++w) {
    std::vector<std::string> places;
    for (size_t i = w * kWarp; i < (w + 1) * kWarp && i < lanes_.size(); ++i) {
      const std::string place = lanes_[i].done ? "has left" : lanes_[i].at.text();
      if (places.empty() || places.back() != place) places.push_back(place);
    }
    text += (w ? "; warp " : "warp ") + std::to_string(w) + ": ";
    for (size_t i = 0; i < places.size() && i < 4; ++i) text += (i ? ", " : "") + places[i];
    if (places.size() > 4) text += ", ...";
  }
  return text;
}

void Block::fail(const Place& place, const std::string& message) {
  fail(place.text() + ": " + message);
}

void Block::fail(const std::string& message) {
  fault_ = "emulator: " + launch_->kernel + ", block " + std::to_string(index_) + ", warp " +
           std::to_string(warp()) + ", lane " + std::to_string(lane()) + ": " + message;
  void* abandoned;
  attnfast_emulator_switch(&abandoned, host_);
  __builtin_unreachable();
}

}  // namespace attnfast::emulator
