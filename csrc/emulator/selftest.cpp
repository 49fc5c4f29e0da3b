#include "selftest.h"

#include <stdexcept>
#include <vector>

#include "../cuda/prims/prims.h"
#include "launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128, kRounds = 6;

struct Arguments {
  const uint32_t* in;
  uint32_t* out;
  int32_t* turns;
  Floats4* handed;
};

const std::string* planted = nullptr;
bool has(const char* bug) { return *planted == bug; }

// Every round hands each thread the number of the thread opposite, through shared memory.
//   Bugs: "no barrier after writes", "no barrier after reads"
void exchange(const Arguments a) {
  const int t = thread_index(), opposite = kThreads - 1 - t;
  uint32_t x = load_global(a.in + t);
  for (int round = 0; round < kRounds; ++round) {
    store_shared(shared_memory() + t * 4, x + round);
    if (!has("no barrier after writes")) sync_block();
    x = load_shared<uint32_t>(shared_memory() + opposite * 4);
    if (!has("no barrier after reads")) sync_block();
  }
  store_global(a.out + t, x);
}
uint32_t exchanged(const std::vector<uint32_t>& in, int t) {
  return in[t] + kRounds * (kRounds - 1) / 2;  // an even number of rounds
}

// The same between the lanes of a warp.
//   Bugs: "no sync_warp after writes", "no sync_warp after reads"
void exchange_in_warp(const Arguments a) {
  const int t = thread_index(), opposite = t ^ 31;
  uint32_t x = load_global(a.in + t);
  for (int round = 0; round < kRounds; ++round) {
    store_shared(shared_memory() + t * 4, x + round);
    if (!has("no sync_warp after writes")) sync_warp();
    x = load_shared<uint32_t>(shared_memory() + opposite * 4);
    if (!has("no sync_warp after reads")) sync_warp();
  }
  store_global(a.out + t, x);
}

// A ring of two stages, filled by copies one round ahead: sums what all threads fetched.
//   Bugs: "no wait", "wait for too few", "no barrier when full", "no barrier when empty",
//   "no commit", "never waited"
void ring(const Arguments a) {
  const int t = thread_index(), neighbour = (t + kWarpSize) % kThreads;
  const auto stage = [](int round) { return shared_memory() + round % 2 * kThreads * 16; };
  const auto fetch = [&](int round) {
    copy_async(stage(round) + t * 16, a.in + (round * kThreads + t) * 4, 16);
    if (!has("no commit")) commit_copies();
  };
  uint32_t sum = 0;
  fetch(0);
  for (int round = 0; round < kRounds; ++round) {
    if (round + 1 < kRounds) fetch(round + 1);
    if (has("wait for too few")) {
      wait_copies<2>();
    } else if (!has("no wait") && !has("never waited")) {
      if (round + 1 < kRounds)
        wait_copies<1>();
      else
        wait_copies<0>();
    }
    if (!has("no barrier when full")) sync_block();
    if (!has("never waited")) sum += load_shared<Words4>(stage(round) + neighbour * 16).w;
    if (!has("no barrier when empty")) sync_block();
  }
  store_global(a.out + t, sum);
}
uint32_t ring_sum(const std::vector<uint32_t>& in, int t) {
  uint32_t sum = 0;
  for (int r = 0; r < kRounds; ++r) {
    sum += in[(r * kThreads + (t + kWarpSize) % kThreads) * 4 + 3];
  }
  return sum;
}

// Each warp puts 8 rows of 8 chunks into shared memory, swizzled, and reads them as matrices.
//   Bugs: "wrong swizzle", "no sync_warp"
void matrices(const Arguments a) {
  const int t = thread_index(), lane = t % kWarpSize, row = lane % 8;
  const uint32_t mine = shared_memory() + t / kWarpSize * 1024;
  for (int chunk = lane / 8; chunk < 8; chunk += 4) {
    const uint32_t* from = a.in + t / kWarpSize * 256 + row * 32 + chunk * 4;
    store_shared(mine + row * 128 + (chunk ^ row) * 16,
                 load_global(reinterpret_cast<const Words4*>(from)));
  }
  if (!has("no sync_warp")) sync_warp();
  uint32_t r[4];
  const int chunk = lane / 8;
  const int place = has("wrong swizzle") ? chunk : chunk ^ row;
  load_matrix(r, mine + row * 128 + place * 16);
  store_global(a.out + t, r[0] + 3 * r[1] + 5 * r[2] + 7 * r[3]);
}
uint32_t matrix_sum(const std::vector<uint32_t>& in, int t) {
  const int lane = t % kWarpSize;
  uint32_t sum = 0;
  for (uint32_t m = 0; m < 4; ++m) {
    sum += (2 * m + 1) * in[t / kWarpSize * 256 + lane / 4 * 32 + m * 4 + lane % 4];
  }
  return sum;
}

// Products of two fixed matrices, added up by the lanes. fp16 unless the bug "bf16" is planted,
// which sm_75 does not have.
void products(const Arguments a) {
  const int t = thread_index();
  const uint32_t one = has("bf16") ? 0x3F803F80u : 0x3C003C00u, x[4] = {one, one, one, one};
  float d[4] = {};
  if (has("bf16")) {
    multiply_accumulate<BFloat16>(d, x, one, one);
  } else {
    multiply_accumulate<Float16>(d, x, one, one);
  }
  store_global(a.out + t, static_cast<uint32_t>(d[0] + d[1] + d[2] + d[3]));
}
uint32_t product_sum(const std::vector<uint32_t>&, int) { return 4 * 16; }

// A sum over each warp, and accesses and collectives that go wrong.
//   Bugs: "read past the end", "read before the beginning", "write past the end", "write to an
//   input", "misaligned", "shared out of bounds", "shared never written", "copy past the end",
//   "half a warp", "different collectives", "one lane leaves", "barrier in one warp",
//   "different barriers"
void collectives(const Arguments a) {
  const int t = thread_index(), lane = t % kWarpSize;
  const int past = has("read past the end") && t == 77 ? 1 << 20 : 0;
  const int before = has("read before the beginning") && t == 0 ? 1 : 0;
  uint32_t x = load_global(a.in + t + past - before);
  if (has("misaligned")) load_global(reinterpret_cast<const Words2*>(a.in + 1));
  if (has("shared out of bounds")) store_shared(shared_memory() + 4096 + t * 4, x);
  if (has("shared never written")) x += load_shared<uint32_t>(shared_memory() + t * 4);
  if (has("copy past the end")) {
    copy_async(shared_memory() + t * 16, a.in + (1 << 20), 16);
    commit_copies();
    wait_copies<0>();
  }
  if (has("one lane leaves") && t == 40) return;
  if (has("half a warp") && lane < 16) x += shuffle_xor(x, 1);
  if (has("different collectives")) lane < 16 ? void(shuffle_xor(x, 1)) : void(any_lane(true));
  if (has("barrier in one warp") && t < kWarpSize) sync_block();
  if (has("different barriers")) {
    if (t < kWarpSize) {
      sync_block();
    } else {
      sync_block();
    }
  }
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) x += shuffle_xor(x, lanes);
  const int beyond = has("write past the end") && t == 5 ? kThreads : 0;
  store_global(a.out + t + beyond, x);
  if (has("write to an input") && t == 9) store_global(const_cast<uint32_t*>(a.in), x);
}
uint32_t warp_sum(const std::vector<uint32_t>& in, int t) {
  uint32_t sum = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) sum += in[t / kWarpSize * kWarpSize + lane];
  return sum;
}

// Blocks add to sums one after the other, in the order of their tickets; the last stores them.
//   Bugs: "no wait", "no pass", "no sync_warp after the wait", "no sync_warp before the pass"
constexpr int kAdding = 4;

void hand_over(const Arguments a) {
  const int t = thread_index();
  if (t == 0) store_shared(shared_memory(), take_ticket(a.turns));
  sync_block();
  const auto ticket = load_shared<int32_t>(shared_memory());
  int32_t* turn = a.turns + 1 + t / kWarpSize;
  Floats4 x{0.0f, 0.0f, 0.0f, 0.0f};
  if (ticket > 0) {
    if (t % kWarpSize == 0 && !has("no wait")) await_turn(turn, ticket);
    if (!has("no sync_warp after the wait")) sync_warp();
    x = load_handed(a.handed + t);
  }
  x.w += static_cast<float>(load_global(a.in + ticket * kThreads + t) % 1024);
  if (ticket + 1 == kAdding) return store_global(a.out + t, static_cast<uint32_t>(x.w));
  store_handed(a.handed + t, x);
  if (!has("no sync_warp before the pass")) sync_warp();
  if (t % kWarpSize == 0 && !has("no pass")) pass_turn(turn, ticket + 1);
}
uint32_t handed_sum(const std::vector<uint32_t>& in, int t) {
  uint32_t sum = 0;
  for (int ticket = 0; ticket < kAdding; ++ticket) sum += in[ticket * kThreads + t] % 1024;
  return sum;
}

struct SmallKernel {
  const char* name;
  void (*kernel)(const Arguments);
  uint32_t (*expected)(const std::vector<uint32_t>&, int);
  int64_t blocks = 1;
};
constexpr SmallKernel kKernels[] = {
    {"exchange", exchange, exchanged},
    {"exchange in warp", exchange_in_warp, exchanged},
    {"ring", ring, ring_sum},
    {"matrices", matrices, matrix_sum},
    {"collectives", collectives, warp_sum},
    {"products", products, product_sum},
    {"hand over", hand_over, handed_sum, kAdding},
};

}  // namespace
}  // namespace attnfast::cuda

namespace attnfast::emulator {

void run_selftest(const std::string& name, const std::string& bug) {
  using namespace attnfast::cuda;
  std::vector<uint32_t> in(kRounds * kThreads * 4), out(kThreads, 0xFFFFFFFFu);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i * 2654435761u >> 8);
  std::vector<int32_t> turns(1 + kThreads / kWarpSize);
  std::vector<Floats4> handed(kThreads);
  Session session;
  session.gpu = asked_for();
  session.host_threads = 2;
  session.memory.allow(in.data(), in.size() * 4, false, "in");
  session.memory.allow(out.data(), out.size() * 4, true, "out");
  session.memory.allow(turns.data(), turns.size() * 4, true, "turns");
  session.memory.allow(handed.data(), handed.size() * 16, true, "handed");
  planted = &bug;
  for (const SmallKernel& k : kKernels) {
    if (name != k.name) continue;
    launch(name, k.kernel, k.blocks, kThreads, 4096, session,
           Arguments{in.data(), out.data(), turns.data(), handed.data()});
    for (int t = 0; t < kThreads; ++t) {
      if (out[t] != k.expected(in, t)) {
        throw std::runtime_error("emulator: a wrong result of " + name + " in thread " +
                                 std::to_string(t));
      }
    }
    return;
  }
  throw std::invalid_argument("emulator: there is no kernel named " + name);
}

}  // namespace attnfast::emulator
