// Learned resizing in time on a CUDA device, which is current.
#ifndef LF_COMMON_TEMPORAL_RESIZE_DEVICE_H
#define LF_COMMON_TEMPORAL_RESIZE_DEVICE_H

#include "common/device.h"
#include "common/space_time.h"

namespace lf {

// By mma.sync.
lf_status temporal_resize_mma(const TemporalResize& resize, int device, cudaStream_t stream);

// By wgmma and bulk copies. LF_UNSUPPORTED_DEVICE too where the library was not built for sm_90a.
lf_status temporal_resize_wgmma(const TemporalResize& resize, void* workspace, int device, cudaStream_t stream);

inline lf_status temporal_resize_cuda(const TemporalResize& resize, bool wgmma, void* workspace, int device,
                                      cudaStream_t stream) {
  return wgmma ? temporal_resize_wgmma(resize, workspace, device, stream)
               : temporal_resize_mma(resize, device, stream);
}

}  // namespace lf

#endif  // LF_COMMON_TEMPORAL_RESIZE_DEVICE_H
