// As much of CUDA's runtime as csrc/ uses, for a compiler of the host. There is one device, number 0, of compute
// capability 9.0, and a kernel runs block after block, its threads in turn (fibers.h). It proves indices, arithmetic
// and what threads wait for where there is no device; nothing about speed.
#ifndef LF_EMULATION_CUDA_RUNTIME_API_H
#define LF_EMULATION_CUDA_RUNTIME_API_H

#include <cstddef>
#include <cstdint>
#include <utility>

#include "fibers.h"
#include "stream.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);  // of a launch that failed: why

namespace lf::emulation {
extern int multiprocessors, compute_capability;  // 80, 90: what the device says of itself
extern bool context;  // whether the thread has one: the runtime makes one where it needs it, the driver does not
}

inline void __syncthreads() {
  int nothing = 0;
  lf::emulation::meet("__syncthreads", lf::emulation::kWholeBlock, nothing, [](auto&&) {});
}

inline void __syncwarp() {
  int nothing = 0;
  lf::emulation::meet("__syncwarp", 32, nothing, [](auto&&) {});
}

template <class T> T __shfl_sync(unsigned /*mask: all*/, T value, int source) {
  struct Operand {
    T value;
    int source;
  } mine{value, source};
  lf::emulation::meet("__shfl_sync", 32, mine, [](const auto& lane) {
    T values[32];
    for (int i = 0; i < 32; ++i) values[i] = lane(i).value;
    for (int i = 0; i < 32; ++i) lane(i).value = values[lane(i).source & 31];
  });
  return mine.value;
}

// How much dynamic shared memory a kernel may have until it has been told of more.
constexpr size_t kSharedWithoutAsking = 48 * 1024;

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  lf::emulation::context = true;
  lf::emulation::allow_shared(reinterpret_cast<void (*)()>(kernel), bytes);
  return bytes >= 0 && bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

// The runtime's own template: the kernel's type says what its parameters are.
template <class... Parameters, size_t... I>
cudaError_t launch_emulated(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** parameters, size_t shared,
                            std::index_sequence<I...>) {
  if (shared > kSharedWithoutAsking && shared > lf::emulation::allowed_shared(reinterpret_cast<void (*)()>(kernel))) {
    return cudaErrorInvalidValue;
  }
  if (block.x == 0 || block.x * block.y * block.z > 1024 || grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidValue;
  }
  const bool done = lf::emulation::run_grid(grid, block, shared, [=] {
    kernel(*static_cast<std::remove_reference_t<Parameters>*>(parameters[I])...);
  });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** parameters, size_t shared,
                             cudaStream_t stream) {
  lf::emulation::context = true;
  if (stream != LF_EMULATED_STREAM) return cudaErrorInvalidResourceHandle;
  return launch_emulated(kernel, grid, block, parameters, shared, std::index_sequence_for<Parameters...>());
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** parameters, size_t shared, cudaStream_t);

template <class T> T __ldg(const T* at) { return *at; }

#endif  // LF_EMULATION_CUDA_RUNTIME_API_H
