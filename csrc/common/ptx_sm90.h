// Instructions of compute capability 9.0 (sm_90a) that C++ has no words for: barriers in shared memory, bulk copies of
// tensor tiles, and matrix products of a warpgroup. csrc/tests/emulation/common/ptx_sm90.h says the same for a
// processor of the host.
#ifndef LF_COMMON_PTX_SM90_H
#define LF_COMMON_PTX_SM90_H

#include <cuda.h>

#include "common/ptx.h"

namespace lf {

// A barrier's phase is over when `count` arrivals and all expected bytes are in.
__device__ inline void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes what this thread wrote to shared memory, barriers too, known to bulk copies.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and has the phase wait for bytes of bulk copies too.
__device__ inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is over; phases are 0, 1, 0, 1 ... Of the parity 1 a fresh barrier has one behind it.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over = 0;
  while (!over) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Fetches the description of a tensor, so that the first copy does not wait for it.
__device__ inline void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the tile of the tensor that begins at (c0, c1, c2[, c3]), innermost first, to shared memory; what lies outside
// the tensor is zeros. All of the tile's bytes count for the barrier.
__device__ inline void bulk_load(uint32_t to, const CUtensorMap& map, int c0, int c1, int c2, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
      ::"r"(to), "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
      : "memory");
}
__device__ inline void bulk_load(uint32_t to, const CUtensorMap& map, int c0, int c1, int c2, int c3,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];"
      ::"r"(to), "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}

// How many registers each thread of a warpgroup has from here on; all of them get here.
template <int kRegisters> __device__ inline void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> __device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product, and wherever its registers were touched since the last one.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kOpen of the groups committed last are under way.
template <int kOpen> __device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

// Until none is, and then sums may be read: no reading of them moves above this.
template <int kSize> __device__ inline void wgmma_wait_for(float (&sums)[kSize]) {
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// sums (+)= A B^T for 64 rows of A and kColumns rows of B, 16 channels of each, by their descriptors. Thread i of the
// warpgroup has of row 16 (i / 32) + i % 32 / 4 + 8 h and column 8 j + 2 (i % 4) + e the sum 4 j + 2 h + e.
template <class T, int kColumns>
__device__ void wgmma(float (&sums)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate);

// clang-format off
#define LF_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21" \
  ", %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41" \
  ", %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61" \
  ", %62, %63"
#define LF_NAMES_96 \
  LF_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83" \
  ", %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LF_NAMES_128 \
  LF_NAMES_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112" \
  ", %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define LF_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define LF_16(i) LF_4(i), LF_4(i + 4), LF_4(i + 8), LF_4(i + 12)
#define LF_SUMS_64 LF_16(0), LF_16(16), LF_16(32), LF_16(48)
#define LF_SUMS_96 LF_SUMS_64, LF_16(64), LF_16(80)
#define LF_SUMS_128 LF_SUMS_96, LF_16(96), LF_16(112)

// The operands after the sums are the descriptors of A and B, and whether to accumulate.
#define LF_WGMMA(T, type, columns, names, operands, a_name, b_name, accumulate_name)                               \
  template <>                                                                                                      \
  __device__ inline void wgmma<T, columns>(float (&sums)[columns / 2], uint64_t a, uint64_t b, bool accumulate) {  \
    asm volatile("{\n"                                                                                             \
                 ".reg .pred accumulate;\n"                                                                        \
                 "setp.ne.b32 accumulate, " accumulate_name ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, "            \
                 a_name ", " b_name ", accumulate, 1, 1, 0, 0;\n"                                                  \
                 "}"                                                                                               \
                 : operands                                                                                        \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))                                               \
                 : "memory");                                                                                      \
  }
#define LF_WGMMAS(T, type)                                                           \
  LF_WGMMA(T, type, 128, LF_NAMES_64, LF_SUMS_64, "%64", "%65", "%66")               \
  LF_WGMMA(T, type, 192, LF_NAMES_96, LF_SUMS_96, "%96", "%97", "%98")               \
  LF_WGMMA(T, type, 256, LF_NAMES_128, LF_SUMS_128, "%128", "%129", "%130")
LF_WGMMAS(BFloat16, "bf16")
LF_WGMMAS(Half, "f16")

#undef LF_WGMMAS
#undef LF_WGMMA
#undef LF_SUMS_128
#undef LF_SUMS_96
#undef LF_SUMS_64
#undef LF_16
#undef LF_4
#undef LF_NAMES_128
#undef LF_NAMES_96
#undef LF_NAMES_64
// clang-format on

}  // namespace lf

#endif  // LF_COMMON_PTX_SM90_H
