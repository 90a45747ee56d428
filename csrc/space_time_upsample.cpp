// space_time_upsample on a CPU; see space_time_upsample.h.
#include "space_time_upsample.h"

#include "common/space_time_cpu.h"

using Op = lf::SpaceTimeOnCpu<lf::Direction::kUp, lf::Upsampling>;

lf_status lf_space_time_upsample_cpu(const lf_space_time* arguments, int32_t num_threads) noexcept {
  return Op::forward(arguments, num_threads);
}

lf_status lf_space_time_upsample_adjoint_cpu(const lf_space_time* arguments, int32_t num_threads) noexcept {
  return Op::adjoint(arguments, num_threads);
}

lf_status lf_space_time_upsample_workspace(const lf_space_time* arguments, int32_t num_threads,
                                           int64_t* bytes) noexcept {
  return Op::workspace(arguments, num_threads, bytes);
}
