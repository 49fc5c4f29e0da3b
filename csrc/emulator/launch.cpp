#include "launch.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>

namespace attnfast::emulator {

Settings& settings() {
  static Settings instance;
  return instance;
}

Counts& counted() {
  static Counts instance;
  return instance;
}

void run_blocks(Launch launch, const Session& session) {
  if (launch.threads % kWarp) throw std::runtime_error("emulator: blocks consist of whole warps");
  const char* seed = std::getenv("ATTNFAST_EMULATOR_SEED");
  launch.seed = seed ? std::strtoull(seed, nullptr, 10) : 0;
  launch.memory = &session.memory;
  launch.sabotage = settings().sabotage, launch.counting = settings().counting;

  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
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
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [place, count] : block->counts()) counted()[place].add(count);
    block->counts().clear();
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < session.host_threads && i < launch.blocks; ++i)
    helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (!fault.empty()) throw std::runtime_error(fault);
}

}  // namespace attnfast::emulator
