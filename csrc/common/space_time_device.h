// The functions of space_time_downsample and space_time_upsample on a CUDA device.
#ifndef LF_COMMON_SPACE_TIME_DEVICE_H
#define LF_COMMON_SPACE_TIME_DEVICE_H

#include "common/resample_device.h"
#include "common/temporal_resize_device.h"

namespace lf {

class CudaEngines {
 public:
  CudaEngines(bool wgmma, int device, void* stream)
      : wgmma_(wgmma), device_(device), stream_(static_cast<cudaStream_t>(stream)) {}

  template <class Work> lf_status use(const Work& work) const {
    const DeviceGuard guard(device_);
    return guard.error() == cudaSuccess ? work() : status_of(guard.error());
  }
  template <class Taps> lf_status gather_fine(const Resample& r) const { return gather_fine_cuda<Taps>(r, stream_); }
  template <class Taps> lf_status gather_coarse(const Resample& r) const {
    return gather_coarse_cuda<Taps>(r, stream_);
  }
  lf_status resize(const TemporalResize& r, void* workspace) const {
    return temporal_resize_cuda(r, wgmma_, workspace, device_, stream_);
  }
  int64_t resize_bytes(const TemporalResize& r) const { return temporal_resize_cuda_bytes(r, wgmma_); }

 private:
  bool wgmma_;
  int device_;
  cudaStream_t stream_;
};

template <Direction direction, class Taps> struct SpaceTimeOnCuda {
  static lf_status forward(const lf_space_time* arguments, int device, void* stream) noexcept {
    const bool wgmma = arguments && arguments->wgmma;
    return run_call<direction, Taps, Purpose::kForward>(arguments, CudaEngines(wgmma, device, stream));
  }
  static lf_status adjoint(const lf_space_time* arguments, int device, void* stream) noexcept {
    return run_call<direction, Taps, Purpose::kAdjoint>(arguments, CudaEngines(false, device, stream));
  }
};

}  // namespace lf

#endif  // LF_COMMON_SPACE_TIME_DEVICE_H
