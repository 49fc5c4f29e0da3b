// The 128 bytes that describe a tensor to bulk copies, as this machine writes them.
//
// NVIDIA's format is not documented: kernels make maps with tensormap.replace, field by field, and
// only such maps are understood.
#pragma once
#include <cstdint>

#include "program.h"

namespace attnfast::ptx {

struct TensorMap {
  static constexpr uint32_t kMark = 0x50414D54;
  enum Field {
    kAddress,
    kRank,
    kType,
    kInterleave,
    kSwizzle,
    kFill,
    kBox,
    kDim = kBox + 5,
    kStride = kDim + 5,
    kElementStride = kStride + 4,
    kFields = kElementStride + 5
  };

  uint64_t address;
  uint64_t stride[4];  // bytes; of dimensions from the second on
  uint32_t dim[5], box[5], element_stride[5];
  uint8_t rank, type, interleave, swizzle, fill, padding[3];  // rank: less one
  uint32_t set;                                               // fields, by bit
  uint32_t mark;                                              // that there is one
  uint32_t rest[2];

  int dimensions() const { return rank + 1; }
  int element_bytes() const;
  // Raises Fault for what is not set or not allowed.
  void check() const;
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace attnfast::ptx
