// As much of CUDA's runtime as csrc/*.cu uses, for a compiler of the host: a kernel runs thread after thread. It proves
// indices and arithmetic where there is no device; nothing about speed, and nothing that needs threads at once.
#ifndef LF_EMULATION_CUDA_RUNTIME_API_H
#define LF_EMULATION_CUDA_RUNTIME_API_H

#include <cstddef>
#include <cstdint>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_) : x(x_), y(1), z(1) {}
};

extern dim3 blockIdx, threadIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** parameters, size_t shared, cudaStream_t);

template <class T> T __ldg(const T* at) { return *at; }
template <class T> void __stwb(T* at, T value) { *at = value; }

// The runtime's own template: the kernel's type says what its parameter is.
template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void** parameters, size_t, cudaStream_t) {
  if (grid.x == 0 || grid.x > INT32_MAX || block.x > 1024) return cudaErrorInvalidDevice;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(*static_cast<const P*>(parameters[0]));
  }
  return cudaSuccess;
}

#endif  // LF_EMULATION_CUDA_RUNTIME_API_H
