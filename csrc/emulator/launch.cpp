#include "launch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>

#include "../cuda/launch_kernel.h"
#include "../cuda/memory_limits.h"

namespace attnfast::emulator {

Settings& settings() {
  static Settings instance;
  return instance;
}

Counts& counted() {
  static Counts instance;
  return instance;
}

Gpu asked_for() {
  const char* asked = std::getenv("ATTNFAST_EMULATOR_ARCH");
  const int arch = asked ? std::atoi(asked) : 80;
  for (const int known : {75, 80, 86, 89, 90, 100, 120}) {
    if (arch == known) return {arch, cuda::shared_of(arch)};
  }
  throw std::invalid_argument("emulator: there is no sm_" + std::to_string(arch));
}

void check_launch(const Launch& launch, const Session& session) {
  if (launch.threads % kWarp) throw std::runtime_error("emulator: blocks consist of whole warps");
  if (launch.shared_bytes > session.gpu.shared_limit) {
    throw std::runtime_error("emulator: " + launch.kernel + " asks for " +
                             std::to_string(launch.shared_bytes) + " bytes of shared memory, sm_" +
                             std::to_string(session.gpu.arch) + " has " +
                             std::to_string(session.gpu.shared_limit));
  }
}

uint64_t schedule() {
  const char* seed = std::getenv("ATTNFAST_EMULATOR_SEED");
  return seed ? std::strtoull(seed, nullptr, 10) : 0;
}

void run_blocks(Launch launch, const Session& session) {
  check_launch(launch, session);
  launch.seed = schedule();
  launch.memory = &session.memory, launch.gpu = session.gpu;
  launch.sabotage = settings().sabotage, launch.counting = settings().counting;

  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  const int64_t most = std::min<int64_t>(session.host_threads, launch.blocks);
  std::atomic<int> workers{static_cast<int>(std::max<int64_t>(most, 1))};
  Handed handed;
  launch.handed = &handed, launch.stop = &stop, launch.workers = &workers;
  std::mutex mutex;
  std::string fault;
  const auto work = [&] {
    thread_local std::unique_ptr<Block> block;  // keeps its stacks from launch to launch
    if (!block) block = std::make_unique<Block>();
    for (int64_t i; !stop && (i = next++) < launch.blocks;) {
      const std::string failed = block->run(launch, i);
      if (failed.empty()) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      if (fault.empty()) fault = failed;
      stop = true;
    }
    --workers;
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [place, count] : block->counts()) counted()[place].add(count);
    block->counts().clear();
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < most; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (!fault.empty()) throw std::runtime_error(fault);
}

}  // namespace attnfast::emulator

namespace attnfast::cuda {

int shared_limit(void* stream) { return static_cast<emulator::Session*>(stream)->gpu.shared_limit; }
bool on_turing(void* stream) { return static_cast<emulator::Session*>(stream)->gpu.turing(); }

}  // namespace attnfast::cuda
