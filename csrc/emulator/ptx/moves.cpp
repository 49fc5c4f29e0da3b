// mov, with packing and unpacking of vectors, and conversions of addresses.
#include "cells.h"

namespace attnfast::ptx {

namespace {

struct Same {
  template <class T>
  T operator()(T a) const {
    return a;
  }
};
struct Truth {
  uint32_t operator()(uint32_t a) const { return a != 0; }
};
struct Sum {
  uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

uint64_t low_bits(int bits) { return bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

// mov.b32 d, {a, b}: slot 0, and from 1 on `count` parts of the `bytes`.
void pack(Warp& w, const Instruction& i, Mask m) {
  const int bits = 8 * i.bytes / i.count;
  each_lane(m, [&](int l) {
    uint64_t x = 0;
    for (int k = 0; k < i.count; ++k) {
      x |= (w.cell(i.operands[1 + k], bits == 64, l) & low_bits(bits)) << (bits * k % 64);
    }
    if (i.bytes == 8) {
      w.lanes<uint64_t>(i.operands[0])[l] = x;
    } else {
      w.lanes<uint32_t>(i.operands[0])[l] = static_cast<uint32_t>(x);
    }
  });
}

// mov.b32 {a, b}, d.
void unpack(Warp& w, const Instruction& i, Mask m) {
  const int bits = 8 * i.bytes / i.count;
  each_lane(m, [&](int l) {
    const uint64_t x = w.cell(i.operands[0], i.bytes == 8, l);
    for (int k = 0; k < i.count; ++k) {
      w.lanes<uint32_t>(i.operands[1 + k])[l] =
          static_cast<uint32_t>(x >> (bits * k) & low_bits(bits));
    }
  });
}

void decode_vector(Decoder& d, const Type& type, bool packs) {
  const std::vector<std::string> parts = d.parts(packs ? 1 : 0);
  d.i.bytes = type.bytes(), d.i.count = static_cast<int>(parts.size());
  const int each = d.i.bytes / d.i.count;
  if (each * d.i.count != d.i.bytes || each > 4 || !each) d.fail("parts of another size");
  if (packs) {
    d.into(0, 0, d.i.bytes);
  } else {
    d.from(0, 1, d.i.bytes);
  }
  for (int k = 0; k < d.i.count; ++k) {
    d.i.operands[1 + k] = packs ? d.read(parts[k], each) : d.written(parts[k], each);
  }
  d.i.run = packs ? pack : unpack;
}

void decode_mov(Decoder& d) {
  const Type type = d.take_type();
  d.need_count(2);
  const bool packs = d.is_vector(1);
  if (packs || d.is_vector(0)) return decode_vector(d, type, packs);
  same_operands(d, type, 1);
  d.renames();
  if (type.kind == Type::kPredicate) {
    d.i.run = unary<Truth, uint32_t>;
  } else {
    d.i.run = type.bytes() == 8 ? unary<Same, uint64_t> : unary<Same, uint32_t>;
  }
}

void decode_cvta(Decoder& d) {
  const bool to = d.take("to");
  const int space = d.need_one({"global", "shared", "const", "local", "param", "shared::cta"});
  const uint64_t windows[] = {0, kSharedWindow, 0, kLocalWindow, kParamWindow, kSharedWindow};
  const uint64_t shift = to ? 0 - windows[space] : windows[space];
  same_operands(d, d.take_type(), 1);
  d.i.operands[2] = d.read(std::to_string(static_cast<int64_t>(shift)), 8);
  d.i.run = binary<Sum, uint64_t>;
}

}  // namespace

void add_moves(Decoders& known) {
  known["mov"] = decode_mov;
  known["cvta"] = decode_cvta;
}

}  // namespace attnfast::ptx
