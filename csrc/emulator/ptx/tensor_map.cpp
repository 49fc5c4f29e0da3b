#include "tensor_map.h"

#include "cells.h"

namespace attnfast::ptx {

int TensorMap::element_bytes() const {
  constexpr int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
  if (type >= sizeof bytes / sizeof bytes[0]) throw Fault("a tensor map of an unknown type");
  return bytes[type];
}

void TensorMap::check() const {
  if (mark != kMark) throw Fault("there is no tensor map that this kernel has made");
  const int n = dimensions();
  uint32_t needed = 1u << kAddress | 1u << kRank | 1u << kType | 1u << kSwizzle;
  for (int d = 0; d < n; ++d) {
    needed |= 1u << (kBox + d) | 1u << (kDim + d) | 1u << (kElementStride + d);
    if (d) needed |= 1u << (kStride + d - 1);
  }
  if (needed & ~set) throw Fault("a tensor map of which some fields were never set");
  if (address % 16) throw Fault("misaligned: a tensor map's address is no multiple of 16");
  for (int d = 0; d + 1 < n; ++d) {
    if (stride[d] % 16) throw Fault("misaligned: a tensor map's stride is no multiple of 16");
  }
  for (int d = 0; d < n; ++d) {
    if (!box[d] || box[d] > 256) throw Fault("a tensor map's box has 1 to 256 elements");
    if (element_stride[d] != 1) throw Fault("a tensor map's element stride is known as 1");
  }
  const uint32_t inner = box[0] * static_cast<uint32_t>(element_bytes());
  if (inner % 16) throw Fault("a tensor map's inner box is no multiple of 16 bytes");
  if (swizzle > 3 || interleave) throw Fault("a tensor map's swizzle or interleave is not known");
  if (swizzle && inner > 16u << swizzle)
    throw Fault("a tensor map's box is wider than its swizzle");
}

namespace {

// tensormap.replace: slot 0 the map, 2 the value; variant the field.
void set_field(TensorMap& map, int field, uint64_t value) {
  const auto word = static_cast<uint32_t>(value);
  if (field == TensorMap::kAddress) {
    map.address = value;
  } else if (field == TensorMap::kRank) {
    if (word > 4) throw Fault("a tensor map of more than 5 dimensions");
    map.rank = static_cast<uint8_t>(word);
  } else if (field == TensorMap::kType) {
    map.type = static_cast<uint8_t>(word);
  } else if (field == TensorMap::kInterleave) {
    map.interleave = static_cast<uint8_t>(word);
  } else if (field == TensorMap::kSwizzle) {
    map.swizzle = static_cast<uint8_t>(word);
  } else if (field == TensorMap::kFill) {
    map.fill = static_cast<uint8_t>(word);
  } else if (field >= TensorMap::kElementStride) {
    map.element_stride[field - TensorMap::kElementStride] = word;
  } else if (field >= TensorMap::kStride) {
    map.stride[field - TensorMap::kStride] = value;
  } else if (field >= TensorMap::kDim) {
    map.dim[field - TensorMap::kDim] = word;
  } else {
    map.box[field - TensorMap::kBox] = word;
  }
  map.set |= 1u << field;
  map.mark = TensorMap::kMark;
}

void replace(Warp& w, const Instruction& i, Mask m) {
  each_lane(m, [&](int l) {
    const uint64_t address =
        w.cell(i.operands[0], i.wide_address, l) + static_cast<uint64_t>(i.offset);
    TensorMap map;
    std::memcpy(&map, w.access(i.space, address, 128, l, false, false, nullptr), sizeof map);
    set_field(map, i.variant, w.cell(i.operands[2], i.bytes == 8, l));
    const auto* data = reinterpret_cast<const char*>(&map);
    char whole[128];
    std::memcpy(whole, w.access(i.space, address, 128, l, false, false, nullptr), 128);
    std::memcpy(whole, data, sizeof map);
    std::memcpy(w.access(i.space, address, 128, l, true, false, whole), whole, 128);
  });
}

void decode_replace(Decoder& d) {
  d.need("tile"), d.need("b1024");
  const Type type = d.take_type();
  const bool shared = d.take_one({"shared::cta", "shared"}) >= 0;
  if (!shared) d.need("global");
  d.i.space = shared ? Space::kShared : Space::kGlobal;
  const int fields[] = {TensorMap::kAddress,      TensorMap::kRank,    TensorMap::kType,
                        TensorMap::kInterleave,   TensorMap::kSwizzle, TensorMap::kFill,
                        TensorMap::kBox,          TensorMap::kDim,     TensorMap::kStride,
                        TensorMap::kElementStride};
  const int which =
      d.need_one({"global_address", "rank", "elemtype", "interleave_layout", "swizzle_mode",
                  "fill_mode", "box_dim", "global_dim", "global_stride", "element_stride"});
  const bool indexed = which >= 6;
  d.need_count(2 + indexed);
  d.address(0, 0);
  d.i.variant = fields[which];
  if (indexed) {
    const int64_t dimension = d.number(1);
    if (dimension < 0 || dimension > (which == 8 ? 3 : 4)) d.fail("has no such dimension");
    d.i.variant += static_cast<int>(dimension);
  }
  d.i.bytes = type.bytes();
  d.from(2, 1 + indexed, type.bytes());
  d.i.run = replace;
}

// tensormap.cp_fenceproxy: from shared to global memory, by all lanes of a warp.
void publish(Warp& w, const Instruction& i, Mask m) {
  const int l = __builtin_ctz(m);
  const uint64_t to = w.cell(i.operands[0], true, l) + static_cast<uint64_t>(i.offset);
  const auto from = Warp::shared_address(w.cell(i.operands[1], i.wide_registers, l) +
                                         static_cast<uint64_t>(i.variant));
  for (const uint64_t address : {to, uint64_t{from}}) {
    if (address % 128) {
      throw Fault("misaligned: a tensor map at " + std::to_string(address) +
                  ", no multiple of 128 bytes");
    }
  }
  const char* data = w.access(Space::kShared, from, 128, kTogether, false, false, nullptr);
  std::memcpy(w.access(Space::kGlobal, to, 128, l, true, false, data), data, 128);
  w.block.unacquired_maps.insert(to);
}

// fence.proxy.tensormap::generic: what was published may be used from here on.
void acquire(Warp& w, const Instruction& i, Mask m) {
  if (i.operands[0] < 0) return;
  each_lane(m, [&](int l) {
    w.block.unacquired_maps.erase(w.cell(i.operands[0], i.wide_address, l) +
                                  static_cast<uint64_t>(i.offset));
  });
}

void decode_tensor_map(Decoder& d) {
  if (d.take("replace")) return decode_replace(d);
  d.need("cp_fenceproxy"), d.need("global"), d.need("shared::cta");
  d.need("tensormap::generic"), d.need("release"), d.need("sync"), d.need("aligned");
  d.pass_scope();
  d.need_count(3);
  bool wide;
  d.i.variant = static_cast<int>(d.second_address(1, 1, &d.i.wide_registers));
  d.i.offset = d.second_address(0, 0, &wide);
  if (!wide) d.fail("needs a 64-bit address");
  if (d.number(2) != 128) d.fail("copies 128 bytes");
  d.i.meets = true;
  d.i.run = publish;
}

}  // namespace

void decode_tensor_map_fence(Decoder& d) {
  d.i.operands[0] = -1;
  if (d.count()) {
    d.need_count(2);
    d.address(0, 0);
    if (d.number(1) != 128) d.fail("is of 128 bytes");
  }
  d.i.run = acquire;
}

void add_tensor_maps(Decoders& known) { known["tensormap"] = decode_tensor_map; }

}  // namespace attnfast::ptx
