// Learned resizing in time on a CPU: a convolution over time with a stride, or over frames that each stand for several.
#include <algorithm>

#include "common/conv_plan.h"
#include "common/space_time_cpu.h"

namespace lf {
namespace {

ConvTask task_of(const TemporalResize& r) {
  ConvTask task{r.dtype, r.batch, r.in, r.out, r.frames, r.out_frames, r.height, r.width, r.taps};
  (r.direction == Direction::kDown ? task.stride : task.copies) = r.factor;
  task.x = r.x, task.y = r.y;
  task.weight = r.weight;
  std::copy_n(r.weight_strides, 3, task.weight_strides);
  task.bias = {r.bias, {0, 0, r.bias_stride}, r.dtype};
  return task;
}

}  // namespace

int64_t temporal_resize_cpu_bytes(const TemporalResize& resize, int64_t num_threads) {
  return whole_units(conv_bytes(task_of(resize), num_threads));
}

lf_status temporal_resize_cpu(const TemporalResize& resize, void* workspace, int64_t num_threads) {
  ConvPlan plan = plan_conv(task_of(resize), num_threads);
  run_conv(plan, workspace);
  return LF_OK;
}

lf_status workspace(const lf_space_time* arguments, Direction direction, int64_t num_threads, int64_t* bytes) noexcept {
  if (!bytes || num_threads < 0) return LF_INVALID_ARGUMENT;
  SpaceTimeCall call;
  const lf_status status = read_call(arguments, direction, Purpose::kWorkspace, call);
  if (status != LF_OK) return status;
  *bytes = call.between;
  if (!call.learned || call.empty) return LF_OK;
  *bytes += num_threads ? temporal_resize_cpu_bytes(call.temporal, num_threads)
                        : temporal_resize_cuda_bytes(call.temporal, arguments->wgmma != 0);
  return LF_OK;
}

}  // namespace lf
