// The engines of the space-time ops on a CUDA device. The device the call is for is current.
#ifndef LF_COMMON_SPACE_TIME_DEVICE_H
#define LF_COMMON_SPACE_TIME_DEVICE_H

#include "common/device.h"
#include "common/resample_device.h"
#include "common/space_time.h"

namespace lf {

template <class Taps> lf_status gather_fine_cuda(const Resample& resample, cudaStream_t stream) {
  return GatherLaunch<ToCoarse<Taps>>(resample).run(stream);
}
template <class Taps> lf_status gather_coarse_cuda(const Resample& resample, cudaStream_t stream) {
  return GatherLaunch<ToFine<Taps>>(resample).run(stream);
}

// LF_UNSUPPORTED_DEVICE too where the library was not built for sm_90a.
lf_status temporal_resize_wgmma(const TemporalResize& resize, void* workspace, int device, cudaStream_t stream);

// By mma.sync (common/temporal_resize_mma.cu), or by wgmma and bulk copies (common/temporal_resize_wgmma.cu).
lf_status temporal_resize_cuda(const TemporalResize& resize, bool wgmma, void* workspace, int device,
                               cudaStream_t stream);

}  // namespace lf

#endif  // LF_COMMON_SPACE_TIME_DEVICE_H
