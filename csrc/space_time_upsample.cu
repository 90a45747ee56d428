// space_time_upsample on a CUDA device; see space_time_upsample.h.
#include "space_time_upsample.h"

#include "common/space_time_device.h"

using Op = lf::SpaceTimeOnCuda<lf::Direction::kUp, lf::Upsampling>;

lf_status lf_space_time_upsample_cuda(const lf_space_time* arguments, int32_t device, void* stream) noexcept {
  return Op::forward(arguments, device, stream);
}

lf_status lf_space_time_upsample_adjoint_cuda(const lf_space_time* arguments, int32_t device, void* stream) noexcept {
  return Op::adjoint(arguments, device, stream);
}
