// The primitives on the GPU: sm_80 and later, and sm_75 by what it has instead.
#pragma once
#include <cuda_runtime.h>

#define ATTNFAST_KERNEL __global__ void
#define ATTNFAST_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define ATTNFAST_PARAMS const __grid_constant__
#define ATTNFAST_DEVICE __device__ __forceinline__
#define ATTNFAST_UNROLL _Pragma("unroll")
#define ATTNFAST_NO_UNROLL _Pragma("unroll 1")

namespace attnfast::cuda {

// Whether this pass compiles for sm_75, which has neither bf16 products nor cp.async.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTuring = true;
#else
constexpr bool kTuring = false;
#endif

// The most shared memory of a block that this pass's code may ask for. It also runs where there is
// less (sm_80's on sm_86) or more (sm_86's on sm_90): the host takes the smaller (launch.cu).
#ifdef __CUDA_ARCH__
constexpr int kPassShared = shared_of(__CUDA_ARCH__ / 10);
#else
constexpr int kPassShared = shared_of(90);
#endif

// Whether a kernel has code in this pass: it is empty where the host never launches it, on sm_75
// with bf16 or in a form that is not for it (!kOnTuring), elsewhere in a form that is for sm_75.
template <class Element, bool kOnTuring = true, bool kElsewhere = true>
ATTNFAST_DEVICE constexpr bool has_code() {
  return kTuring ? __is_same(Element, Float16) && kOnTuring : kElsewhere;
}

// Whether a block can have this much shared memory here. A kernel that needs more has no code but
// fail(), an error of the launch, should the host launch it all the same.
ATTNFAST_DEVICE constexpr bool has_shared(int bytes) { return bytes <= kPassShared; }
ATTNFAST_DEVICE void fail() { asm volatile("trap;"); }

ATTNFAST_DEVICE int thread_index() { return threadIdx.x; }
ATTNFAST_DEVICE int64_t block_index() { return blockIdx.x; }

// A barrier of all threads of the block.
ATTNFAST_DEVICE void sync_block() { __syncthreads(); }
// Orders the memory accesses of the warp's lanes.
ATTNFAST_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
ATTNFAST_DEVICE T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
}
ATTNFAST_DEVICE bool any_lane(bool x) { return __any_sync(0xFFFFFFFFu, x); }

ATTNFAST_DEVICE uint32_t shared_memory() {
  extern __shared__ __align__(1024) char dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

template <class T>
ATTNFAST_DEVICE T load_shared(uint32_t address) {
  T x;
  if constexpr (sizeof(T) == 16) {
    auto* w = reinterpret_cast<uint32_t*>(&x);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    auto* w = reinterpret_cast<uint32_t*>(&x);
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(w[0]), "=r"(w[1])
                 : "r"(address)
                 : "memory");
  } else {
    static_assert(sizeof(T) == 4);
    asm volatile("ld.shared.b32 %0, [%1];"
                 : "=r"(*reinterpret_cast<uint32_t*>(&x))
                 : "r"(address)
                 : "memory");
  }
  return x;
}

template <class T>
ATTNFAST_DEVICE void store_shared(uint32_t address, T x) {
  const auto* w = reinterpret_cast<const uint32_t*>(&x);
  if constexpr (sizeof(T) == 16) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(w[0]), "r"(w[1])
                 : "memory");
  } else {
    static_assert(sizeof(T) == 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(w[0]) : "memory");
  }
}

template <class T>
ATTNFAST_DEVICE T load_global(const T* p) {
  return *p;
}
template <class T>
ATTNFAST_DEVICE void store_global(T* p, T x) {
  *p = x;
}

// Between blocks of one launch. The number of earlier calls with this address, which is 0 at first.
ATTNFAST_DEVICE int32_t take_ticket(int32_t* tickets) { return atomicAdd(tickets, 1); }
// Waits until `at` holds `turn`: what was stored before it was passed on can then be read, by the
// warp's other lanes after sync_warp.
ATTNFAST_DEVICE void await_turn(const int32_t* at, int32_t turn) {
  int32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
  } while (now != turn);
}
// Stores `turn`, after all that this lane has stored, and before sync_warp the warp's others.
ATTNFAST_DEVICE void pass_turn(int32_t* at, int32_t turn) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(at), "r"(turn) : "memory");
}
// 16 bytes that blocks hand to each other: past the L1 caches, which do not see each other's.
ATTNFAST_DEVICE Floats4 load_handed(const Floats4* p) {
  Floats4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(p)
               : "memory");
  return x;
}
ATTNFAST_DEVICE void store_handed(Floats4* p, Floats4 x) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}

// 16 bytes to shared memory, from global memory, or zeros if `valid` is 0 instead of 16. They are
// there after commit_copies and wait_copies, for other threads after a barrier too; on sm_75 at
// once.
ATTNFAST_DEVICE void copy_async(uint32_t to, const void* from, int valid) {
  if constexpr (kTuring) {
    Words4 x{0, 0, 0, 0};
    if (valid) x = load_global(static_cast<const Words4*>(from));
    store_shared(to, x);
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid)
                 : "memory");
  }
}
// Makes the copies since the last commit one group.
ATTNFAST_DEVICE void commit_copies() {
  if constexpr (!kTuring) asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all of this thread's groups but the newest kNewest.
template <int kNewest>
ATTNFAST_DEVICE void wait_copies() {
  if constexpr (!kTuring) asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Four 8 x 8 matrices of 2-byte elements, whose rows begin at the addresses of lanes 8i to 8i + 7:
// r[i] holds elements (lane / 4, lane % 4 * 2 + {0, 1}) of matrix i.
ATTNFAST_DEVICE void load_matrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same of the transposed matrices.
ATTNFAST_DEVICE void load_matrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d[16 x 8] += a[16 x 8] b[8 x 8] in fp16, all that sm_75 has (PTX ISA, mma.m16n8k8).
ATTNFAST_DEVICE void multiply_accumulate_eight(float (&d)[4], uint32_t a0, uint32_t a1,
                                               uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
      " {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// d[16 x 8] += a[16 x 16] b[16 x 8], products of Element summed in float (PTX ISA, mma.m16n8k16).
template <class Element>
ATTNFAST_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (kTuring) {
    multiply_accumulate_eight(d, a[0], a[1], b0);
    multiply_accumulate_eight(d, a[2], a[3], b1);
  } else if constexpr (__is_same(Element, Float16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// d = a b, likewise: what begins a sum, without registers set to zero first.
template <class Element>
ATTNFAST_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kTuring) {
    d[0] = d[1] = d[2] = d[3] = 0.0f;
    multiply_accumulate<Element>(d, a, b0, b1);
  } else if constexpr (__is_same(Element, Float16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  }
}

// 2^x, subnormal results flushed to zero, to about 2 ulp.
ATTNFAST_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The upper half of a float, rounded to nearest: cvt for sm_75, which has none for bf16.
ATTNFAST_DEVICE uint32_t round_to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// Two floats rounded to nearest as one word, `low` in its lower half.
template <class Element>
ATTNFAST_DEVICE uint32_t pack(float low, float high) {
  uint32_t x;
  if constexpr (__is_same(Element, Float16)) {
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(x)
        : "f"(low), "f"(high));
  } else if constexpr (kTuring) {
    x = round_to_bf16(low) | round_to_bf16(high) << 16;
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  }
  return x;
}

template <class Element>
ATTNFAST_DEVICE float to_float(Element x) {
  if constexpr (__is_same(Element, Float16)) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
  } else {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
  }
}

ATTNFAST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

}  // namespace attnfast::cuda
