// What every CUDA launch needs on the host.
#ifndef LF_COMMON_DEVICE_H
#define LF_COMMON_DEVICE_H

#include <cuda_runtime_api.h>

#include "common/cuda_error.h"

namespace lf {

inline lf_status status_of(cudaError_t error) noexcept {
  return error == cudaSuccess ? LF_OK : cuda_error(cudaGetErrorName(error), cudaGetErrorString(error));
}

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) noexcept {
    error_ = cudaGetDevice(&previous_);
    if (error_ != cudaSuccess || previous_ == device) return;
    error_ = cudaSetDevice(device);
    switched_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const noexcept { return error_; }

 private:
  int previous_ = 0;
  bool switched_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace lf

#endif  // LF_COMMON_DEVICE_H
