// Launching what nvcc made of a kernel: its PTX, on the machine in ptx/.
#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>

#include "launch.h"
#include "ptx/api.h"

namespace attnfast::emulator {

namespace {

using Loaded = std::unique_ptr<void, decltype(&ptx_free)>;

constexpr int kRoom = 1 << 14;  // bytes of a message

struct File {
  std::string text;
  std::map<std::string, Loaded> kernels;  // those that have run
};

// A folder of .ptx files, and which of them holds a kernel.
struct Folder {
  std::map<std::string, File> files;  // by path
  std::map<std::string, File*> with;  // by kernel

  explicit Folder(const std::string& path) {
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      if (entry.path().extension() != ".ptx") continue;
      std::ifstream stream(entry.path());
      File& file = files[entry.path()];
      file.text = {std::istreambuf_iterator<char>(stream), {}};
      const std::string word = ".entry ";
      for (size_t at = 0; (at = file.text.find(word, at)) != std::string::npos;) {
        at += word.size();
        with[file.text.substr(at, file.text.find('(', at) - at)] = &file;
      }
    }
  }
};

std::mutex mutex;

std::map<std::string, Folder>& folders() {
  static std::map<std::string, Folder> instance;
  return instance;
}

void* load(const std::string& path, const std::string& kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  Folder& folder = folders().try_emplace(path, path).first->second;
  const auto found = folder.with.find(kernel);
  if (found == folder.with.end()) {
    throw std::runtime_error("no PTX of " + kernel + " in " + path);
  }
  File& file = *found->second;
  const auto known = file.kernels.find(kernel);
  if (known != file.kernels.end()) return known->second.get();
  char message[kRoom];
  void* loaded = ptx_load(file.text.c_str(), kernel.c_str(), message, kRoom);
  if (!loaded) throw std::runtime_error(message);
  file.kernels.emplace(kernel, Loaded(loaded, ptx_free));
  return loaded;
}

}  // namespace

std::vector<int> ptx_lines(const std::string& path) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<long> runs;
  for (auto& [folder, contents] : folders()) {
    const auto file = contents.files.find(path);
    if (file == contents.files.end()) continue;
    const std::string& text = file->second.text;
    runs.resize(std::count(text.begin(), text.end(), '\n') + 1);
    for (auto& [name, kernel] : file->second.kernels) {
      ptx_runs(kernel.get(), runs.data(), static_cast<int>(runs.size()));
    }
  }
  std::vector<int> lines;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (runs[i]) lines.push_back(static_cast<int>(i) + 1);
  }
  return lines;
}

void run_ptx(const void* kernel, const Launch& launch, const Session& session, const void* params) {
  check_launch(launch, session);
  Dl_info symbol;
  if (!dladdr(kernel, &symbol) || !symbol.dli_sname) {
    throw std::runtime_error("emulator: the library does not export " + launch.kernel);
  }
  std::vector<PtxRange> ranges;
  for (const Region& r : session.memory.regions()) ranges.push_back({r.begin, r.end, r.writable});
  const uint32_t grid[3] = {static_cast<uint32_t>(launch.blocks), 1, 1};
  char message[kRoom];
  if (ptx_launch(load(settings().ptx, symbol.dli_sname), grid, launch.threads, launch.shared_bytes,
                 params, ranges.data(), static_cast<int>(ranges.size()), schedule(), kPtxChecks,
                 message, kRoom) < 0) {
    throw std::runtime_error(launch.kernel + ": " + message);
  }
}

}  // namespace attnfast::emulator
