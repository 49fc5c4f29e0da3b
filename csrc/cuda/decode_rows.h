// The rows that decoding's kernels read.
#pragma once
#include "arguments.h"
#include "prims/prims.h"

namespace attnfast::cuda {

// Queries of the heads that share a key head, and keys of a cache, contiguous or in pages.
template <class Element>
struct PackedQueries {
  const Element* data;
  int64_t h, t;  // strides
  int T, end, columns;
  bool aligned;
  ATTNFAST_DEVICE bool has(int r) const { return r < end; }
  ATTNFAST_DEVICE int64_t offset(int r) const { return r / T * h + r % T * t; }
};

template <class Element>
struct CachedRows {
  const Element* data;  // of the key head; of the batch entry too, where there are no pages
  int64_t page_stride, stride;
  const int32_t* pages;  // of the batch entry; null: contiguous
  int page_size, num_pages;
  int begin, end, columns;
  bool aligned;
  ATTNFAST_DEVICE bool has(int r) const { return r >= begin && r < end && (!pages || num_pages); }
  ATTNFAST_DEVICE int64_t offset(int r) const {
    if (!pages) return r * stride;
    const int page = min_of(max_of(load_global(pages + r / page_size), 0), num_pages - 1);
    return page * page_stride + r % page_size * stride;
  }
};

template <class Element>
ATTNFAST_DEVICE CachedRows<Element> cached(const DecodeParams& p, const View& x, int b, int h_kv,
                                           int begin, int end, int64_t columns, bool aligned) {
  const auto* data = static_cast<const Element*>(x.data) + h_kv * x.h;
  const int32_t* pages = p.page_table ? p.page_table + b * p.pages_per_sequence : nullptr;
  return {pages ? data : data + b * x.b,
          x.b,
          x.t,
          pages,
          static_cast<int>(p.page_size),
          static_cast<int>(p.num_pages),
          begin,
          end,
          static_cast<int>(columns),
          aligned};
}

}  // namespace attnfast::cuda
