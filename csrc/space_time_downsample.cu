// space_time_downsample on a CUDA device; see space_time_downsample.h.
#include "space_time_downsample.h"

#include "common/resample_device.h"
#include "common/temporal_resize_device.h"

namespace lf {
namespace {

constexpr Direction kDirection = Direction::kDown;

lf_status forward(const lf_space_time* arguments, int device, cudaStream_t stream) {
  SpaceTimeCall call;
  const lf_status status = read_call(arguments, kDirection, Purpose::kForward, call);
  if (status != LF_OK || call.empty) return status;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  return run_call(
      *arguments, call, [=](const Resample& r) { return gather_fine_cuda<Downsampling>(r, stream); },
      [=](const TemporalResize& r, void* workspace) {
        return temporal_resize_cuda(r, arguments->wgmma != 0, workspace, device, stream);
      },
      [=](const TemporalResize& r) { return temporal_resize_cuda_bytes(r, arguments->wgmma != 0); });
}

lf_status adjoint(const lf_space_time* arguments, int device, cudaStream_t stream) {
  SpaceTimeCall call;
  const lf_status status = read_call(arguments, kDirection, Purpose::kAdjoint, call);
  if (status != LF_OK || call.empty) return status;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  return gather_coarse_cuda<Downsampling>(call.resample, stream);
}

}  // namespace
}  // namespace lf

lf_status lf_space_time_downsample_cuda(const lf_space_time* arguments, int32_t device, void* stream) noexcept {
  return lf::guarded([&] { return lf::forward(arguments, device, static_cast<cudaStream_t>(stream)); });
}

lf_status lf_space_time_downsample_adjoint_cuda(const lf_space_time* arguments, int32_t device,
                                             void* stream) noexcept {
  return lf::guarded([&] { return lf::adjoint(arguments, device, static_cast<cudaStream_t>(stream)); });
}
