// ld, st, atom, red, and what only orders or hints.
#include <algorithm>

#include "cells.h"

namespace attnfast::ptx {

namespace {

uint64_t address_of(Warp& w, const Instruction& i, int lane) {
  return w.cell(i.operands[0], i.wide_address, lane) + static_cast<uint64_t>(i.offset);
}

// Whether other blocks see it, in order.
bool orders_blocks(const Instruction& i, uint64_t address) {
  const bool global = i.space == Space::kGeneric ? address < kWindow : i.space == Space::kGlobal;
  return i.strong && global;
}

void load(Warp& w, const Instruction& i, Mask m) {
  const int total = i.count * i.bytes;
  if (i.strong && i.space == Space::kGlobal && w.waits_in_vain(m)) return;
  each_lane(m, [&](int l) {
    const uint64_t address = address_of(w, i, l);
    const char* p = w.access(i.space, address, total, l, false, i.strong, nullptr);
    if (orders_blocks(i, address)) w.take(address, i.acquires);
    for (int k = 0; k < i.count; ++k, p += i.bytes) {
      uint64_t x = 0;
      std::memcpy(&x, p, i.bytes);
      if (i.extends_sign) {
        const int unused = 64 - 8 * i.bytes;
        x = static_cast<uint64_t>(static_cast<int64_t>(x << unused) >> unused);
      }
      if (i.wide_registers) {
        w.lanes<uint64_t>(i.operands[1 + k])[l] = x;
      } else {
        w.lanes<uint32_t>(i.operands[1 + k])[l] = static_cast<uint32_t>(x);
      }
    }
  });
}

void store(Warp& w, const Instruction& i, Mask m) {
  const int total = i.count * i.bytes;
  each_lane(m, [&](int l) {
    char data[64];
    for (int k = 0; k < i.count; ++k) {
      const uint64_t x = w.cell(i.operands[1 + k], i.wide_registers, l);
      std::memcpy(data + k * i.bytes, &x, i.bytes);
    }
    const uint64_t address = address_of(w, i, l);
    char* p = w.access(i.space, address, total, l, true, i.strong, data);
    if (orders_blocks(i, address)) w.pass(address, 1u << l, i.releases, false);
    std::memcpy(p, data, total);
  });
}

Space take_space(Decoder& d) {
  const int n = d.take_one({"global", "const", "shared", "shared::cta", "shared::cluster", "param",
                            "param::entry", "local"});
  const Space spaces[] = {Space::kGlobal, Space::kGlobal, Space::kShared, Space::kShared,
                          Space::kShared, Space::kParam,  Space::kParam,  Space::kLocal};
  return n < 0 ? Space::kGeneric : spaces[n];
}

// Orders and hints; whether the access is atomic by its order.
bool take_order(Decoder& d) {
  const int order = d.take_one({"acquire", "release", "acq_rel", "volatile", "relaxed", "mmio"});
  d.pass({"weak", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  d.take_prefix("L1::");
  const bool within = d.take("cta");  // its scope is the block
  d.pass_scope();
  d.i.acquires = (order == 0 || order == 2) && !within;
  d.i.releases = (order == 1 || order == 2) && !within;
  return order >= 0;
}

// .L2::cache_hint, which has a policy as the last operand; the number of operands without it.
size_t take_cache_hint(Decoder& d) {
  const bool hint = d.take("L2::cache_hint");
  d.take_prefix("L2::");
  if (!hint) return d.count();
  d.read(d.text(d.count() - 1), 8);
  return d.count() - 1;
}

void decode_access(Decoder& d) {
  const bool loads = d.op() != "st";
  const Type type = d.take_type();
  d.i.space = take_space(d);
  d.i.strong = take_order(d);
  if (take_cache_hint(d) != 2) d.fail("takes an address and a value");
  const int elements = std::max(d.take_number("v"), 1);
  const std::vector<std::string> parts = d.parts(loads ? 0 : 1);
  if (static_cast<int>(parts.size()) != elements) d.fail("has a vector of another size");
  if (elements > 8) d.fail("vectors have up to 8 elements");
  d.address(0, loads ? 1 : 0);
  d.i.count = elements;
  d.i.bytes = type.kind == Type::kPredicate ? 0 : type.bytes();
  if (!d.i.bytes) d.fail("has no type of memory");
  d.i.extends_sign = loads && type.kind == Type::kSigned;
  for (int k = 0; k < elements; ++k) {
    const Register r = loads ? d.written_any(parts[k], d.i.bytes) : d.read_any(parts[k], d.i.bytes);
    if (k && (r.bytes == 8) != d.i.wide_registers) d.fail("registers of two widths");
    if (r.bytes < 8 && d.i.bytes == 8) d.fail("operand " + parts[k] + " has another width");
    d.i.wide_registers = r.bytes == 8;
    d.i.operands[1 + k] = r.offset;
  }
  d.i.run = loads ? load : store;
}

// ---- Atomic operations

enum Atomic { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompare, kIncrement, kDecrement };

template <class T>
T updated(int operation, T old, T x, T y) {
  switch (operation) {
    case kAdd:
      if constexpr (std::is_integral_v<T>) {
        return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(x));
      }
      return old + x;
    case kMin:
      return std::min(old, x);
    case kMax:
      return std::max(old, x);
    case kExchange:
      return x;
    case kCompare:
      return old == x ? y : old;
    case kIncrement:
      return old >= x ? T(0) : T(old + 1);
    case kDecrement:
      return old == 0 || old > x ? x : T(old - 1);
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    return operation == kAnd ? old & x : operation == kOr ? old | x : old ^ x;
  }
  return old;
}

// Slot 0: the address, 1: what was there or none, 2 and 3: operands.
template <class T>
void atomic(Warp& w, const Instruction& i, Mask m) {
  const int vector = std::max(i.count, 1);
  each_lane(m, [&](int l) {
    const uint64_t address = address_of(w, i, l);
    const bool shared =
        i.space == Space::kShared || (i.space == Space::kGeneric && address / kWindow == 1);
    for (int k = 0; k < vector; ++k) {
      const int bytes = sizeof(T);
      const uint64_t a = address + k * bytes;
      if (address % (vector * bytes)) throw Fault("misaligned atomic operation");
      char* p = shared ? w.access(Space::kShared, a, bytes, l, true, true, nullptr)
                       : w.block.launch.global.update(a, bytes, w.by(l));
      if (!shared) w.take(a, i.acquires), w.pass(a, 1u << l, i.releases, true);
      T old;
      std::memcpy(&old, p, bytes);
      const auto x = static_cast<T>(w.lanes<Cell<T>>(i.operands[2 + k])[l]);
      T y{};
      if (i.variant == kCompare) y = static_cast<T>(w.lanes<Cell<T>>(i.operands[3])[l]);
      const T now = updated<T>(i.variant, old, x, y);
      std::memcpy(p, &now, bytes);
      if (i.operands[1] >= 0) w.lanes<Cell<T>>(i.operands[1])[l] = to_cell<T>(old);
    }
  });
}

void decode_atomic(Decoder& d) {
  const bool result = d.op() == "atom";
  const Type type = d.take_type();
  d.i.space = take_space(d);
  take_order(d);
  const size_t count = take_cache_hint(d);
  d.i.variant = d.need_one({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  d.i.count = std::max(d.take_number("v"), 1);
  const size_t values = d.i.variant == kCompare ? 2 : 1;
  if (count != 1 + result + values) d.fail("takes another number of operands");
  if (d.i.count > 1 && (result || values > 1)) d.fail("vectors are known of red only");
  d.address(0, result);
  const int bytes = type.bytes();
  d.i.operands[1] = -1;
  if (result) d.into(1, 0, bytes);
  const std::vector<std::string> parts = d.parts(1 + result);
  if (static_cast<int>(parts.size()) != d.i.count) d.fail("has a vector of another size");
  for (int k = 0; k < d.i.count; ++k) d.i.operands[2 + k] = d.read(parts[k], bytes);
  if (values == 2) d.from(3, 2 + result, bytes);
  if (type.kind == Type::kFloat && type.bits >= 32) {
    d.i.run = type.bits == 64 ? atomic<double> : atomic<float>;
  } else {
    d.i.run = with_integer(d, type, [](auto x) -> Execute { return atomic<decltype(x)>; });
  }
}

// ---- What changes nothing here

void nothing(Warp&, const Instruction&, Mask) {}
void fence_async(Warp& w, const Instruction&, Mask) { w.position.fence_async(); }
void fence(Warp& w, const Instruction&, Mask m) { w.fence(m); }
void zero(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) { w.lanes<uint64_t>(i.operands[0])[l] = 0; });
}

void decode_hint(Decoder& d) {  // prefetch, griddepcontrol, nanosleep
  d.pass({"global", "local", "L1", "L2", "level", "tensormap", "wait", "launch_dependents", "u32",
          "uniform"});
  d.take_prefix("L2::");
  d.i.run = nothing;
}

void decode_fence(Decoder& d) {  // fence, membar
  const bool orders = d.take_one({"sc", "acq_rel", "acquire", "release"}) >= 0;
  const bool within = d.take("cta");
  d.pass({"gl"}), d.pass_scope();
  d.i.run = nothing;
  if (!within && (orders || d.op() == "membar")) d.i.run = fence;
  if (d.take("mbarrier_init")) {
    d.pass({"release"});
    d.need_count(0);
  } else if (d.take("proxy")) {
    if (d.take("tensormap::generic")) return decode_tensor_map_fence(d);
    const int kind = d.need_one({"async", "async::generic", "alias"});
    d.pass({"global", "shared::cta", "shared::cluster"});
    d.take_prefix("sync_restrict::");
    if (kind < 2) d.i.run = fence_async;
  }
}

void decode_policy(Decoder& d) {  // createpolicy.fractional: only a hint
  d.need("fractional");
  d.take_prefix("L2::");
  d.take_type();
  d.into(0, 0, 8);
  d.i.run = zero;
}

}  // namespace

void add_memory(Decoders& known) {
  known["ld"] = known["ldu"] = known["st"] = decode_access;
  known["atom"] = known["red"] = decode_atomic;
  known["prefetch"] = known["prefetchu"] = decode_hint;
  known["griddepcontrol"] = known["nanosleep"] = decode_hint;
  known["fence"] = known["membar"] = decode_fence;
  known["createpolicy"] = decode_policy;
}

}  // namespace attnfast::ptx
