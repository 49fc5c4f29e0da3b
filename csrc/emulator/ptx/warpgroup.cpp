// wgmma.mma_async: each warp of a warpgroup makes its 16 rows.
#include "warpgroup.h"

#include <algorithm>

#include "cells.h"
#include "fast.h"

namespace attnfast::ptx {

// m64nNkK: operands as they are in the text.
struct WarpgroupProduct : Detail {
  int N = 0, K = 16;
  Type type;
  bool narrow = false;  // fp16 accumulators
  bool a_transposed = false, b_transposed = false, negates_a = false, negates_b = false;
  std::vector<int> d, a;  // registers
  int a_descriptor = -1, b_descriptor = -1, scale = -1;
};

namespace {

// What a descriptor says of a matrix in shared memory.
struct Matrix {
  explicit Matrix(uint64_t descriptor)
      : start(static_cast<uint32_t>(descriptor & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4) {
    const int mode = static_cast<int>(descriptor >> 62);
    width = mode == 0 ? 16 : mode == 1 ? 128 : mode == 2 ? 64 : 32;
    if (descriptor >> 49 & 7) throw Fault("wgmma: a base offset is not known");
  }

  // Of the 16 bytes in which the element lies. By rows of k (K-major), groups of 8 rows `stride`
  // bytes apart; transposed by columns, groups of 8 columns `stride` bytes apart, and rows beyond
  // the swizzle's width `leading`. Without a swizzle, blocks of 8 rows of 16 bytes.
  uint32_t chunk(bool transposed, int row, int k, int per_chunk) const {
    uint32_t a = start;
    const int bytes = 16 / per_chunk;
    if (width == 16) {
      a += transposed ? row / per_chunk * stride + k % 8 * 16 + k / 8 * leading
                      : row % 8 * 16 + row / 8 * stride + k / per_chunk * leading;
      return a;
    }
    if (transposed) {
      const int along = row * bytes;
      a += along % width + along / width * leading + k % 8 * width + k / 8 * stride;
    } else {
      a += row % 8 * width + row / 8 * stride + k * bytes;
    }
    a &= ~15u;
    return a ^ ((a >> 7 & (width / 16 - 1)) << 4);
  }

  uint32_t start, leading, stride;
  int width;  // of the swizzle
};

float element(const WarpgroupProduct& s, const char* chunk, int index) {
  if (s.type.kind == Type::kTf32) {
    uint32_t x;
    std::memcpy(&x, chunk + 4 * index, 4);
    return float_of_bits(x & ~0x1FFFu);
  }
  uint16_t x;
  std::memcpy(&x, chunk + 2 * index, 2);
  return from_half(x, s.type.kind == Type::kBFloat);
}

// Calls f(address, row, k) for every 16 bytes of a matrix of `rows` rows from `first` on.
template <class F>
void each_chunk(const WarpgroupProduct& s, const Matrix& matrix, bool transposed, int first,
                int rows, F f) {
  const int per = s.type.kind == Type::kTf32 ? 4 : 8;
  for (int row = first; row < first + rows; row += transposed ? per : 1) {
    for (int k = 0; k < s.K; k += transposed ? 1 : per) {
      f(matrix.chunk(transposed, row, k, per), row, k);
    }
  }
}

// Calls f(address, row, k, whether of a) for all of shared memory that this warp's part reads.
template <class F>
void each_operand(const Warp& w, const Products::Product& p, F f) {
  const WarpgroupProduct& s = *p.shape;
  if (s.a.empty()) {
    each_chunk(s, Matrix(p.a), s.a_transposed, w.index % 4 * 16, 16,
               [&](uint32_t address, int row, int k) { f(address, row, k, true); });
  }
  each_chunk(s, Matrix(p.b), s.b_transposed, 0, s.N,
             [&](uint32_t address, int row, int k) { f(address, row, k, false); });
}

void read_registers(Warp& w, const WarpgroupProduct& s, float* a) {
  const int per = s.type.kind == Type::kTf32 ? 1 : 2;
  for (size_t r = 0; r < s.a.size(); ++r) {
    const auto* from = w.lanes<uint32_t>(s.a[r]);
    const int row = static_cast<int>(r) % 2 * 8, k = static_cast<int>(r) / 2 * 4 * per;
    for (int l = 0; l < kLanes; ++l) {
      for (int part = 0; part < per; ++part) {
        const float x = per == 1 ? float_of_bits(from[l] & ~0x1FFFu)
                                 : from_half(static_cast<uint16_t>(from[l] >> 16 * part),
                                             s.type.kind == Type::kBFloat);
        a[(row + l / 4) * s.K + k + l % 4 * per + part] = x;
      }
    }
  }
}

uint32_t rounded(const WarpgroupProduct& s, uint32_t before, int part, float x) {
  if (!s.narrow) return bits_of_float(x);
  const uint32_t half = to_half(x, false);
  return part ? (before & 0xFFFF) | half << 16 : (before & 0xFFFF0000) | half;
}

// Where (row, column) of this warp's tile is kept: which register and lane, which half.
template <class F>
void each_result(const WarpgroupProduct& s, F f) {
  for (int n = 0; n < s.N / 2; ++n) {  // a lane's elements in order
    const int reg = s.narrow ? n / 2 : n;
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4 + n / 2 % 2 * 8, column = n / 4 * 8 + l % 4 * 2 + n % 2;
      f(reg * kLanes + l, s.narrow ? n % 2 : 0, row * s.N + column);
    }
  }
}

void compute(Warp& w, Products::Product& p, std::vector<uint32_t>& values) {
  const WarpgroupProduct& s = *p.shape;
  std::vector<float> a(16 * s.K), b(s.K * s.N), d(16 * s.N);
  if (!s.a.empty()) read_registers(w, s, a.data());
  const int first = w.index % 4 * 16;
  const int per = s.type.kind == Type::kTf32 ? 4 : 8;
  each_operand(w, p, [&](uint32_t address, int row, int k, bool of_a) {
    const char* chunk = w.block.shared.at(address);
    const bool transposed = of_a ? s.a_transposed : s.b_transposed;
    for (int n = 0; n < per; ++n) {
      const int r = row + (transposed ? n : 0), c = k + (transposed ? 0 : n);
      (of_a ? a[(r - first) * s.K + c] : b[c * s.N + r]) = element(s, chunk, n);
    }
  });
  if (s.negates_a != s.negates_b) {
    for (float& x : a) x = -x;
  }
  if (p.accumulates) {
    each_result(s, [&](int value, int part, int place) {
      d[place] = s.narrow ? from_half(static_cast<uint16_t>(values[value] >> 16 * part), false)
                          : float_of_bits(values[value]);
    });
  }
  const int at_once = w.block.launch.options.rounded_sums ? 0 : s.K;
  multiply_add(d.data(), a.data(), b.data(), 16, s.N, s.K, at_once);
  each_result(s, [&](int value, int part, int place) {
    values[value] = rounded(s, values[value], part, d[place]);
  });
  p.done = true;
}

Products::Accumulator& accumulator(Products& products, const WarpgroupProduct& s) {
  for (auto& x : products.accumulators) {
    if (x.registers == s.d) return x;
  }
  throw Fault("a wgmma lacks its accumulators");
}

// Takes the accumulators out of the registers, unless an earlier wgmma has done so.
void take_accumulators(Warp& w, const WarpgroupProduct& s) {
  Products& products = *w.products;
  for (const auto& x : products.accumulators) {
    if (x.registers == s.d) return;
    for (int r : s.d) {
      if (std::find(x.registers.begin(), x.registers.end(), r) != x.registers.end()) {
        throw Fault("a wgmma shares accumulators with another one of another shape");
      }
    }
  }
  Products::Accumulator taken{s.d, {}};
  for (int r : s.d) {
    auto* x = w.lanes<uint32_t>(r);
    taken.values.insert(taken.values.end(), x, x + kLanes);
    std::fill(x, x + kLanes, kPoison);
  }
  products.accumulators.push_back(std::move(taken));
}

void check_fragments(const Products& products, const WarpgroupProduct& s) {
  const auto fenced = [&](int r) { return !products.unfenced.count(r); };
  const bool first = std::none_of(products.accumulators.begin(), products.accumulators.end(),
                                  [&](const auto& x) { return x.registers == s.d; });
  const bool all = std::all_of(s.a.begin(), s.a.end(), fenced) &&
                   (!first || std::all_of(s.d.begin(), s.d.end(), fenced));
  if (!all) throw Fault("a wgmma uses registers that were written with no wgmma.fence after");
}

// The warps of a warpgroup execute the same wgmma, in the same order.
void check_order(Warp& w) {
  std::vector<int>& order = w.block.warpgroup_order[w.index / 4];
  const auto n = static_cast<size_t>(w.products->issued++);
  if (n == order.size()) {
    order.push_back(w.pc);
  } else if (order[n] != w.pc) {
    throw Fault("the warps of a warpgroup execute different wgmma", order[n]);
  }
}

void issue(Warp& w, const Instruction& i, Mask m) {
  const auto& s = static_cast<const WarpgroupProduct&>(*i.detail);
  if (m != kAll) throw Fault("wgmma without all lanes of the warp");
  Products& products = *w.products;
  Products::Product p{&s, 0, w.cell(s.b_descriptor, true, 0), true, false, products.groups, w.pc};
  if (s.a.empty()) p.a = w.cell(s.a_descriptor, true, 0);
  if (s.scale >= 0) p.accumulates = w.lanes<uint32_t>(s.scale)[0] != 0;
  if (w.block.launch.options.checks) {
    check_order(w);
    check_fragments(products, s);
  }
  each_operand(w, p, [&](uint32_t address, int, int, bool) {
    w.block.shared.begin_async_read(address, 16, w.by(kTogether));
  });
  take_accumulators(w, s);
  // It runs now, or when it is waited for; those of a warp in their order.
  const bool waits = !products.queue.empty() && !products.queue.back().done;
  if (!waits && w.block.launch.random.below(2)) compute(w, p, accumulator(products, s).values);
  products.queue.push_back(p);
}

void commit(Warp& w, const Instruction&, Mask) { ++w.products->groups; }

// Gives the registers back those accumulators that no wgmma under way has.
void give_accumulators(Warp& w) {
  Products& products = *w.products;
  auto& all = products.accumulators;
  const auto idle = [&](const Products::Accumulator& x) {
    return std::none_of(products.queue.begin(), products.queue.end(),
                        [&](const auto& p) { return p.shape->d == x.registers; });
  };
  for (const auto& x : all) {
    if (!idle(x)) continue;
    for (size_t r = 0; r < x.registers.size(); ++r) {
      std::memcpy(w.lanes<uint32_t>(x.registers[r]), &x.values[r * kLanes], 4 * kLanes);
    }
  }
  all.erase(std::remove_if(all.begin(), all.end(), idle), all.end());
}

void wait(Warp& w, const Instruction& i, Mask) {
  Products& products = *w.products;
  size_t done = 0;
  for (; done < products.queue.size(); ++done) {
    Products::Product& p = products.queue[done];
    if (p.group >= products.groups - i.variant) break;
    if (!p.done) compute(w, p, accumulator(products, *p.shape).values);
    each_operand(w, p, [&](uint32_t address, int, int, bool) {
      w.block.shared.end_async_read(address, 16, w.by(kTogether));
    });
  }
  products.queue.erase(products.queue.begin(), products.queue.begin() + static_cast<long>(done));
  give_accumulators(w);
}

void fence(Warp& w, const Instruction&, Mask) { w.products->unfenced.clear(); }

void decode_shape(Decoder& d, WarpgroupProduct& s) {
  const Type b = d.take_type(), a = d.take_type(), into = d.take_type();
  const bool fp16 = a.half() && a.kind == Type::kFloat;
  s.type = a, s.narrow = into.half(), s.K = a.kind == Type::kTf32 ? 8 : 16;
  if (a.kind != b.kind || a.bits != b.bits || (!a.half() && a.kind != Type::kTf32) ||
      into.kind != Type::kFloat || into.bits > 32 || (s.narrow && !fp16)) {
    d.fail("these types are not known");
  }
  for (int n = 8; n <= 256 && !s.N; n += 8) {
    if (d.take("m64n" + std::to_string(n) + "k" + std::to_string(s.K))) s.N = n;
  }
  if (!s.N) d.fail("this shape is not known of this type");
}

// +1 or -1, and whether it is -1.
bool negated(Decoder& d, size_t place) {
  const int64_t x = d.number(place);
  if (x != 1 && x != -1) d.fail("needs 1 or -1");
  return x < 0;
}

void decode_product(Decoder& d) {
  const auto s = std::make_shared<WarpgroupProduct>();
  decode_shape(d, *s);
  d.need_count(4, 8);
  for (const std::string& part : d.parts(0)) s->d.push_back(d.fragment(part));
  if (static_cast<int>(s->d.size()) != s->N / (s->narrow ? 4 : 2)) {
    d.fail("has another number of accumulators");
  }
  if (d.is_vector(1)) {
    for (const std::string& part : d.parts(1)) s->a.push_back(d.fragment(part));
    if (s->a.size() != 4) d.fail("has another number of registers");
  } else {
    s->a_descriptor = d.read(d.text(1), 8);
  }
  s->b_descriptor = d.read(d.text(2), 8);
  bool predicate_negated;
  s->scale = d.read_predicate(3, &predicate_negated);
  if (predicate_negated) d.fail("a negated predicate is not known");
  if (d.count() > 5) s->negates_a = negated(d, 4), s->negates_b = negated(d, 5);
  const bool half = s->type.half();
  const size_t wanted = 6 + (half ? (s->a.empty() ? 2 : 1) : 0);
  if (d.count() != wanted) d.fail("takes " + std::to_string(wanted) + " operands");
  if (half && s->a.empty()) s->a_transposed = d.number(6) != 0;
  if (half) s->b_transposed = d.number(wanted - 1) != 0;
  d.i.detail = s;
  d.i.run = issue;
}

void decode_wgmma(Decoder& d) {
  const int what = d.need_one({"mma_async", "fence", "commit_group", "wait_group"});
  d.need("sync"), d.need("aligned");
  d.i.meets = true;
  if (what == 0) return decode_product(d);
  d.need_count(what == 3 ? 1 : 0);
  if (what == 3) d.i.variant = static_cast<int>(d.number(0));
  const Execute runs[] = {nullptr, fence, commit, wait};
  d.i.run = runs[what];
}

}  // namespace

void Products::check(const Program& program, int at) {
  const Touched& t = program.touched[at];
  if (!t.fragments.empty()) return;
  const auto in_accumulators = [&](int r) {
    return std::any_of(accumulators.begin(), accumulators.end(), [&](const auto& x) {
      return std::find(x.registers.begin(), x.registers.end(), r) != x.registers.end();
    });
  };
  for (const Product& p : queue) {
    for (int r : t.written) {
      const auto& a = p.shape->a;
      if (std::find(a.begin(), a.end(), r) == a.end()) continue;
      throw Fault("a register is written while a wgmma that is not waited for reads it",
                  p.instruction);
    }
  }
  if (!queue.empty()) {
    const bool touches = std::any_of(t.written.begin(), t.written.end(), in_accumulators) ||
                         std::any_of(t.read.begin(), t.read.end(), in_accumulators);
    if (touches) {
      throw Fault("an accumulator is used while its wgmma is not waited for",
                  queue.back().instruction);
    }
  }
  if (program.code[at].writes_fragment) unfenced.insert(t.written.begin(), t.written.end());
}

void add_warpgroup(Decoders& known) { known["wgmma"] = decode_wgmma; }

}  // namespace attnfast::ptx
