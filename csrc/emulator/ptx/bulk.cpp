// cp.async.bulk: copies of whole tiles, loads that report to an mbarrier and stores in groups.
#include <algorithm>

#include "cells.h"
#include "tensor_map.h"

namespace attnfast::ptx {

void decode_thread_copy(Decoder& d);

namespace {

// Slots: 0 shared memory's address, 1 the map or global memory's, 2 the mbarrier, 3 the bytes of a
// copy without a map, 4 to 8 coordinates, the innermost first.
struct BulkKind : Detail {
  int dimensions = 0;  // 0: plain bytes
  bool loads = true;
  bool shared_wide = false, mbarrier_wide = false;
  int64_t shared_offset = 0, global_offset = 0, mbarrier_offset = 0;
  int reduces = -1;  // add, min, max of type
  Type type;
};

uint32_t shared_operand(Warp& w, const Instruction& i, const BulkKind& k, int l) {
  return Warp::shared_address(w.cell(i.operands[0], k.shared_wide, l) +
                              static_cast<uint64_t>(k.shared_offset));
}

uint32_t swizzled(const TensorMap& map, uint32_t address) {
  if (!map.swizzle) return address;
  const uint32_t rows = (1u << map.swizzle) - 1;  // of 16 bytes, that take part
  return address ^ ((address >> 7 & rows) << 4);
}

// The runs of 16 bytes of a box, as the map lays them out.
void fill_box(BulkCopy& copy, const TensorMap& map, uint32_t shared, const int32_t* start) {
  const int n = map.dimensions();
  const auto element = static_cast<uint32_t>(map.element_bytes());
  const uint32_t row_bytes = map.box[0] * element;
  uint32_t rows = 1;
  for (int d = 1; d < n; ++d) rows *= map.box[d];
  for (uint32_t row = 0; row < rows; ++row) {
    uint64_t global = map.address;
    bool inside = true;
    uint32_t left = row;
    for (int d = 1; d < n; ++d) {
      const int64_t at = start[d] + static_cast<int64_t>(left % map.box[d]);
      left /= map.box[d];
      inside &= at >= 0 && at < static_cast<int64_t>(map.dim[d]);
      global += static_cast<uint64_t>(at) * map.stride[d - 1];
    }
    for (uint32_t byte = 0; byte < row_bytes; byte += 16) {
      const int64_t first = start[0] + static_cast<int64_t>(byte / element);
      const int64_t have =
          std::clamp<int64_t>(static_cast<int64_t>(map.dim[0]) - first, 0, 16 / element);
      const bool here = inside && first >= 0 && have > 0;
      const auto bytes = static_cast<int>(here ? have * element : 0);
      const uint32_t to = swizzled(map, shared + row * row_bytes + byte);
      if (bytes)
        copy.runs.push_back({global + static_cast<uint64_t>(first) * element, to, bytes, true});
      if (bytes < 16)
        copy.runs.push_back({0, to + static_cast<uint32_t>(bytes), 16 - bytes, false});
    }
  }
  copy.bytes = rows * row_bytes;
}

void fill_bytes(BulkCopy& copy, uint64_t global, uint32_t shared, uint32_t bytes) {
  if (global % 16 || shared % 16 || bytes % 16) {
    throw Fault("misaligned: a bulk copy is of multiples of 16 bytes");
  }
  for (uint32_t n = 0; n < bytes; n += 16) copy.runs.push_back({global + n, shared + n, 16, true});
  copy.bytes = bytes;
}

std::unique_ptr<BulkCopy> made(Warp& w, const Instruction& i, const BulkKind& k, int l) {
  auto copy = std::make_unique<BulkCopy>();
  copy->warp = &w, copy->instruction = w.pc, copy->lane = l;
  const uint32_t shared = shared_operand(w, i, k, l);
  const uint64_t global = w.cell(i.operands[1], true, l) + static_cast<uint64_t>(k.global_offset);
  if (!k.dimensions) {
    fill_bytes(*copy, global, shared, w.lanes<uint32_t>(i.operands[3])[l]);
    return copy;
  }
  if (w.block.unacquired_maps.count(global)) {
    throw Fault("a tensor map is used with no fence.proxy.tensormap after it was made");
  }
  TensorMap map;
  if (global % 64) throw Fault("misaligned: a tensor map at no multiple of 64 bytes");
  std::memcpy(&map, w.access(Space::kGlobal, global, 64, l, false, false, nullptr), sizeof map);
  map.check();
  if (map.dimensions() != k.dimensions) throw Fault("the tensor map has other dimensions");
  if (shared % 128) throw Fault("misaligned: a tile in shared memory at no multiple of 128 bytes");
  int32_t start[5] = {};
  for (int n = 0; n < k.dimensions; ++n) start[n] = w.lanes<int32_t>(i.operands[4 + n])[l];
  fill_box(*copy, map, shared, start);
  return copy;
}

void load(Warp& w, const Instruction& i, Mask m) {
  const auto& k = static_cast<const BulkKind&>(*i.detail);
  each_lane(m, [&](int l) {
    std::unique_ptr<BulkCopy> copy = made(w, i, k, l);
    copy->mbarrier = Warp::shared_address(w.cell(i.operands[2], k.mbarrier_wide, l) +
                                          static_cast<uint64_t>(k.mbarrier_offset));
    w.block.mbarriers.check(copy->mbarrier, w.by(l));
    for (const BulkCopy::Run& r : copy->runs) {
      if (r.inside) w.block.launch.global.read(r.global, r.bytes, w.by(l));
      w.block.shared.begin_write(r.shared, r.bytes, w.by(l));
    }
    w.block.start(std::move(copy));
  });
}

template <class T>
void reduce(char* to, const char* from, int bytes, int operation) {
  for (int n = 0; n < bytes; n += static_cast<int>(sizeof(T))) {
    T x, y;
    std::memcpy(&x, to + n, sizeof x), std::memcpy(&y, from + n, sizeof y);
    x = operation == 0 ? x + y : operation == 1 ? std::min(x, y) : std::max(x, y);
    std::memcpy(to + n, &x, sizeof x);
  }
}

// Reads shared memory and writes global memory.
void finish(Warp& w, BulkCopy& copy) {
  if (copy.done) return;
  const auto* kind =
      static_cast<const BulkKind*>(w.block.launch.program.code[copy.instruction].detail.get());
  GlobalMemory& global = w.block.launch.global;
  const Access by{w.position, copy.lane, copy.instruction};
  for (const BulkCopy::Run& r : copy.runs) {
    if (!r.inside) continue;
    const char* from = w.block.shared.at(r.shared);
    if (kind->reduces < 0) {
      std::memcpy(global.write(r.global, r.bytes, by, from), from, r.bytes);
    } else {
      char* to = global.update(r.global, r.bytes, by);
      if (kind->type.kind == Type::kFloat) {
        reduce<float>(to, from, r.bytes, kind->reduces);
      } else if (kind->type.kind == Type::kSigned) {
        reduce<int32_t>(to, from, r.bytes, kind->reduces);
      } else {
        reduce<uint32_t>(to, from, r.bytes, kind->reduces);
      }
    }
  }
  copy.done = true;
}

void store(Warp& w, const Instruction& i, Mask m) {
  const auto& k = static_cast<const BulkKind&>(*i.detail);
  each_lane(m, [&](int l) {
    std::unique_ptr<BulkCopy> copy = made(w, i, k, l);
    copy->group = w.committed_stores[l];
    for (const BulkCopy::Run& r : copy->runs)
      w.block.shared.begin_async_read(r.shared, r.bytes, w.by(l));
    if (w.block.launch.random.below(2)) finish(w, *copy);
    w.stores.push_back(std::move(copy));
  });
}

void commit(Warp& w, const Instruction&, Mask m) {
  each_lane(m, [&](int l) { ++w.committed_stores[l]; });
}

void wait(Warp& w, const Instruction& i, Mask m) {
  const auto done = [&](const std::unique_ptr<BulkCopy>& c) {
    if (!has(m, c->lane) || c->group >= w.committed_stores[c->lane] - i.variant) return false;
    finish(w, *c);
    for (const BulkCopy::Run& r : c->runs)
      w.block.shared.end_async_read(r.shared, r.bytes, w.by(c->lane));
    return true;
  };
  w.stores.erase(std::remove_if(w.stores.begin(), w.stores.end(), done), w.stores.end());
}

void take_hint(Decoder& d, size_t* count) {
  const bool hint = d.take("L2::cache_hint");
  *count = d.count() - hint;
  if (hint) d.read(d.text(*count), 8);
}

void take_reduction(Decoder& d, BulkKind& k) {
  k.reduces = d.need_one({"add", "min", "max"});
  if (k.dimensions) {
    k.type = {Type::kFloat, 32, false};  // the map has the type
    return;
  }
  k.type = d.take_type();
  if (k.type.bits != 32) d.fail("reduces 32 bits");
}

void take_map(Decoder& d, BulkKind& k, size_t place) {
  std::string base;
  std::vector<std::string> coordinates;
  d.split_address(place, &base, &coordinates);
  if (static_cast<int>(coordinates.size()) != k.dimensions) d.fail("has other coordinates");
  d.i.operands[1] = d.read(base, 8);
  for (int n = 0; n < k.dimensions; ++n) d.i.operands[4 + n] = d.read(coordinates[n], 4);
}

void decode_transfer(Decoder& d, bool tensor, bool reduces) {
  const auto k = std::make_shared<BulkKind>();
  if (tensor) {
    k->dimensions = d.need_one({"1d", "2d", "3d", "4d", "5d"}) + 1;
    d.pass({"tile"});
  }
  k->loads = d.take("mbarrier::complete_tx::bytes");
  if (!k->loads) d.need("bulk_group");
  d.need_one({"shared::cta", "shared::cluster"}), d.need("global");
  if (reduces) take_reduction(d, *k);
  size_t count;
  take_hint(d, &count);
  const size_t shared = k->loads ? 0 : 1, global = k->loads ? 1 : 0;
  const size_t wanted = 2 + !tensor + k->loads;
  if (count != wanted) d.fail("takes " + std::to_string(wanted) + " operands");
  k->shared_offset = d.second_address(0, shared, &k->shared_wide);
  bool wide = true;
  if (tensor) {
    take_map(d, *k, global);
  } else {
    k->global_offset = d.second_address(1, global, &wide);
    d.from(3, 2, 4);
  }
  if (!wide) d.fail("needs a 64-bit address");
  if (k->loads) k->mbarrier_offset = d.second_address(2, wanted - 1, &k->mbarrier_wide);
  d.i.detail = k;
  d.i.run = k->loads ? load : store;
}

void nothing(Warp&, const Instruction&, Mask) {}

void decode_cp(Decoder& d) {
  const bool reduces = d.take("reduce");
  d.need("async");
  if (!d.take("bulk")) {
    if (reduces) d.fail("is not known");
    return decode_thread_copy(d);
  }
  if (d.take("commit_group")) {
    d.need_count(0);
    d.i.run = commit;
  } else if (d.take("wait_group")) {
    d.pass({"read"});  // writes are done as early
    d.need_count(1);
    d.i.variant = static_cast<int>(d.number(0));
    d.i.run = wait;
  } else {
    const bool tensor = d.take("tensor");
    if (d.take("prefetch")) {
      d.need_one({"1d", "2d", "3d", "4d", "5d"}), d.need("L2"), d.need("global");
      d.i.run = nothing;
      return;
    }
    decode_transfer(d, tensor, reduces);
  }
}

}  // namespace

void add_copies(Decoders& known) { known["cp"] = decode_cp; }

}  // namespace attnfast::ptx
