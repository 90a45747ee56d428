// space_time_downsample on a CUDA device; see space_time_downsample.h.
#include "space_time_downsample.h"

#include "common/space_time_device.h"

using Op = lf::SpaceTimeOnCuda<lf::Direction::kDown, lf::Downsampling>;

lf_status lf_space_time_downsample_cuda(const lf_space_time* arguments, int32_t device, void* stream) noexcept {
  return Op::forward(arguments, device, stream);
}

lf_status lf_space_time_downsample_adjoint_cuda(const lf_space_time* arguments, int32_t device, void* stream) noexcept {
  return Op::adjoint(arguments, device, stream);
}
