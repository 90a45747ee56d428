// space_time_downsample on a CPU; see space_time_downsample.h.
#include "space_time_downsample.h"

#include "common/space_time_cpu.h"

using Op = lf::SpaceTimeOnCpu<lf::Direction::kDown, lf::Downsampling>;

lf_status lf_space_time_downsample_cpu(const lf_space_time* arguments, int32_t num_threads) noexcept {
  return Op::forward(arguments, num_threads);
}

lf_status lf_space_time_downsample_adjoint_cpu(const lf_space_time* arguments, int32_t num_threads) noexcept {
  return Op::adjoint(arguments, num_threads);
}

lf_status lf_space_time_downsample_workspace(const lf_space_time* arguments, int32_t num_threads,
                                             int64_t* bytes) noexcept {
  return Op::workspace(arguments, num_threads, bytes);
}
