// Instructions of NVIDIA's devices that C++ has no words for, from compute capability 8.0 on: asynchronous copies
// and a warp's matrices. csrc/tests/emulation/common/ptx.h says the same for a processor of the host.
#ifndef LF_COMMON_PTX_H
#define LF_COMMON_PTX_H

#include <cuda_runtime_api.h>

#include "common/scalar.h"

namespace lf {

// What the launch gave the block, at a multiple of 1024 bytes.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(1024) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes from a multiple of 16 to another; those past the first `bytes` become zeros and are not read.
__device__ inline void start_copy(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// One store to a multiple of 16, which a compiler may make four of where it is left to.
__device__ inline void store_16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Makes one group of the copies this thread has started since the last.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the latest `kOpen` groups of this thread are done. Others see them only behind a barrier.
template <int kOpen> __device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Four 8 x 8 matrices of 2-byte elements: lane i gives the address of row i % 8 of matrix i / 8, and gets elements
// 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of each.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// sum += a b of a warp: a is 16 x 16, b 16 x 8. With g = lane / 4 and q = lane % 4 a lane holds of
//   a    rows g, g + 8, g, g + 8 at columns 2q, 2q, 2q + 8, 2q + 8, each with its right neighbour
//   b    rows 2q, 2q + 8 of column g, each with its lower neighbour
//   sum  row g at columns 2q, 2q + 1, and row g + 8 there
template <class T>
__device__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_upper, uint32_t b_lower);

template <>
__device__ inline void multiply_add<BFloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_upper,
                                              uint32_t b_lower) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
}

template <>
__device__ inline void multiply_add<Half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_upper,
                                          uint32_t b_lower) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
}

// Both rounded to nearest, `low` in the lower half.
template <class T> __device__ uint32_t narrow_pair(float low, float high);

template <> __device__ inline uint32_t narrow_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <> __device__ inline uint32_t narrow_pair<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace lf

#endif  // LF_COMMON_PTX_H
