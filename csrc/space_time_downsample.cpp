// space_time_downsample on a CPU; see space_time_downsample.h.
#include "space_time_downsample.h"

#include "common/resample.h"

namespace lf {
namespace {

constexpr Direction kDirection = Direction::kDown;

lf_status forward(const lf_space_time* arguments, int64_t num_threads) {
  SpaceTimeCall call;
  const lf_status status = read_call(arguments, kDirection, Purpose::kForward, call);
  if (status != LF_OK) return status;
  return run_call(
      *arguments, call, [=](const Resample& r) { return gather_fine_cpu<Downsampling>(r, num_threads); },
      [=](const TemporalResize& r, void* workspace) { return temporal_resize_cpu(r, workspace, num_threads); },
      [=](const TemporalResize& r) { return temporal_resize_cpu_bytes(r, num_threads); });
}

lf_status adjoint(const lf_space_time* arguments, int64_t num_threads) {
  SpaceTimeCall call;
  const lf_status status = read_call(arguments, kDirection, Purpose::kAdjoint, call);
  return status != LF_OK || call.empty ? status : gather_coarse_cpu<Downsampling>(call.resample, num_threads);
}

}  // namespace
}  // namespace lf

lf_status lf_space_time_downsample_cpu(const lf_space_time* arguments, int32_t num_threads) noexcept {
  if (num_threads < 1) return LF_INVALID_ARGUMENT;
  return lf::guarded([&] { return lf::forward(arguments, num_threads); });
}

lf_status lf_space_time_downsample_adjoint_cpu(const lf_space_time* arguments, int32_t num_threads) noexcept {
  if (num_threads < 1) return LF_INVALID_ARGUMENT;
  return lf::guarded([&] { return lf::adjoint(arguments, num_threads); });
}

lf_status lf_space_time_downsample_workspace(const lf_space_time* arguments, int32_t num_threads,
                                             int64_t* bytes) noexcept {
  return lf::workspace(arguments, lf::kDirection, num_threads, bytes);
}
