// ldmatrix, stmatrix and mma, with fragments as the PTX ISA draws them: lane l holds row l / 4 and
// columns of l % 4.
#include "cells.h"
#include "fast.h"

namespace attnfast::ptx {

namespace {

// ---- Eight rows of 16 bytes a matrix; lanes 8 k to 8 k + 7 have the addresses of matrix k's rows

uint32_t row_address(Warp& w, const Instruction& i, int lane) {
  return Warp::shared_address(w.cell(i.operands[0], i.wide_address, lane) +
                              static_cast<uint64_t>(i.offset));
}

void load_matrix(Warp& w, const Instruction& i, Mask) {
  uint32_t out[4][kLanes];
  for (int k = 0; k < i.count; ++k) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) {
      const uint32_t address = row_address(w, i, 8 * k + r);
      std::memcpy(rows[r], w.access(Space::kShared, address, 16, kTogether, false, false, nullptr),
                  16);
    }
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, t = l % 4 * 2;
      const uint32_t low = i.variant ? rows[t][g] : rows[g][t];
      const uint32_t high = i.variant ? rows[t + 1][g] : rows[g][t + 1];
      out[k][l] = low | high << 16;
    }
  }
  for (int k = 0; k < i.count; ++k) {
    std::memcpy(w.lanes<uint32_t>(i.operands[1 + k]), out[k], sizeof out[k]);
  }
}

void store_matrix(Warp& w, const Instruction& i, Mask) {
  for (int k = 0; k < i.count; ++k) {
    uint16_t rows[8][8];
    const auto* from = w.lanes<uint32_t>(i.operands[1 + k]);
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, t = l % 4 * 2;
      (i.variant ? rows[t][g] : rows[g][t]) = static_cast<uint16_t>(from[l]);
      (i.variant ? rows[t + 1][g] : rows[g][t + 1]) = static_cast<uint16_t>(from[l] >> 16);
    }
    for (int r = 0; r < 8; ++r) {
      const auto* data = reinterpret_cast<const char*>(rows[r]);
      const uint32_t address = row_address(w, i, 8 * k + r);
      std::memcpy(w.access(Space::kShared, address, 16, kMany, true, false, data), data, 16);
    }
  }
}

void decode_matrix(Decoder& d) {
  const bool loads = d.op() == "ldmatrix";
  d.need("sync"), d.need("aligned"), d.need("m8n8"), d.need("b16");
  d.pass({"shared", "shared::cta"});
  d.i.variant = d.take("trans");
  d.i.count = d.take_number("x");
  if (d.i.count != 1 && d.i.count != 2 && d.i.count != 4) d.fail("needs x1, x2 or x4");
  d.need_count(2);
  d.address(0, loads ? 1 : 0);
  const std::vector<std::string> parts = d.parts(loads ? 0 : 1);
  if (static_cast<int>(parts.size()) != d.i.count) d.fail("has another number of registers");
  for (int k = 0; k < d.i.count; ++k) {
    d.i.operands[1 + k] = loads ? d.written(parts[k], 4) : d.read(parts[k], 4);
  }
  d.i.meets = true;
  d.i.run = loads ? load_matrix : store_matrix;
}

// ---- mma.m16n8kK

enum Element { kF16, kBf16, kTf32 };

float element(uint32_t x, int part, Element e) {
  if (e == kTf32) return float_of_bits(x & ~0x1FFFu);
  return from_half(static_cast<uint16_t>(x >> 16 * part), e == kBf16);
}

int products_at_once(const Launch& launch, Element e) {
  if (launch.options.rounded_sums) return 0;
  const int halves = launch.program.target < 80 ? 4 : 8;
  return e == kTf32 ? halves / 2 : halves;
}

// Slots: 4 of d, then a, b, c; 2 of d and c if they are fp16.
template <int K, Element E>
void multiply(Warp& w, const Instruction& i, Mask) {
  constexpr int per = E == kTf32 ? 1 : 2;  // elements of a register
  constexpr int na = 16 * K / kLanes / per, nb = 8 * K / kLanes / per;
  const bool narrow = i.variant != 0;  // d and c are fp16
  const int nd = narrow ? 2 : 4;
  float a[16][K], b[K][8], c[16][8];
  for (int r = 0; r < na; ++r) {
    const auto* from = w.lanes<uint32_t>(i.operands[nd + r]);
    for (int l = 0; l < kLanes; ++l) {
      float* to = &a[l / 4 + r % 2 * 8][l % 4 * per + r / 2 * 4 * per];
      for (int part = 0; part < per; ++part) to[part] = element(from[l], part, E);
    }
  }
  for (int r = 0; r < nb; ++r) {
    const auto* from = w.lanes<uint32_t>(i.operands[nd + na + r]);
    for (int l = 0; l < kLanes; ++l) {
      for (int part = 0; part < per; ++part) {
        b[l % 4 * per + part + r * 4 * per][l / 4] = element(from[l], part, E);
      }
    }
  }
  for (int r = 0; r < 4; ++r) {
    const auto* from = w.lanes<uint32_t>(i.operands[nd + na + nb + (narrow ? r / 2 : r)]);
    for (int l = 0; l < kLanes; ++l) {
      c[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2] =
          narrow ? element(from[l], r % 2, kF16) : float_of_bits(from[l]);
    }
  }
  multiply_add(c[0], a[0], b[0], 16, 8, K, products_at_once(w.block.launch, E));
  for (int r = 0; r < 4; ++r) {
    auto* to = w.lanes<uint32_t>(i.operands[narrow ? r / 2 : r]);
    for (int l = 0; l < kLanes; ++l) {
      const float x = c[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
      if (!narrow) {
        to[l] = bits_of_float(x);
      } else {
        const uint32_t half = to_half(x, false);
        to[l] = r % 2 ? (to[l] & 0xFFFF) | half << 16 : half;
      }
    }
  }
}

void decode_mma(Decoder& d) {
  d.need("sync"), d.need("aligned"), d.need("row"), d.need("col");
  const Type c = d.take_type(), b = d.take_type(), a = d.take_type(), into = d.take_type();
  const bool narrow = c.half();
  const bool same = a.kind == b.kind && a.bits == b.bits && c.kind == Type::kFloat &&
                    into.kind == c.kind && into.bits == c.bits && (narrow || c.bits == 32);
  const bool fp16 = a.half() && a.kind == Type::kFloat;
  if (!same || (narrow && !fp16)) d.fail("these types are not known");
  const int shape = d.need_one({"m16n8k16", "m16n8k8", "m16n8k4"});
  struct Known {
    int shape;
    Type::Kind kind;
    int bits, a, b;  // registers
    Execute run;
  };
  const Known all[] = {{0, Type::kFloat, 16, 4, 2, multiply<16, kF16>},
                       {0, Type::kBFloat, 16, 4, 2, multiply<16, kBf16>},
                       {1, Type::kFloat, 16, 2, 1, multiply<8, kF16>},
                       {1, Type::kBFloat, 16, 2, 1, multiply<8, kBf16>},
                       {1, Type::kTf32, 32, 4, 2, multiply<8, kTf32>},
                       {2, Type::kTf32, 32, 2, 1, multiply<4, kTf32>}};
  const int results = narrow ? 2 : 4;
  d.need_count(4);
  for (const Known& k : all) {
    if (k.shape != shape || k.kind != a.kind || k.bits != a.bits) continue;
    const size_t registers[] = {static_cast<size_t>(results), static_cast<size_t>(k.a),
                                static_cast<size_t>(k.b), static_cast<size_t>(results)};
    int slot = 0;
    for (int place = 0; place < 4; ++place) {
      const std::vector<std::string> parts = d.parts(place);
      if (parts.size() != registers[place]) d.fail("has another number of registers");
      for (const std::string& part : parts) {
        d.i.operands[slot++] = place ? d.read(part, 4) : d.written(part, 4);
      }
    }
    d.i.run = k.run;
  }
  if (!d.i.run) d.fail("this shape is not known of this type");
  d.i.variant = narrow;
  d.i.meets = true;
}

}  // namespace

void add_matrices(Decoders& known) {
  known["ldmatrix"] = known["stmatrix"] = decode_matrix;
  known["mma"] = decode_mma;
}

}  // namespace attnfast::ptx
