// What space_time_downsample and space_time_upsample share: the checks of a call, and its parts as each engine takes
// them. An op is fixed taps, or a learned resize in time; where that one also resizes space, first the one, then the
// other, with a clip in the workspace between them.
#ifndef LF_COMMON_SPACE_TIME_H
#define LF_COMMON_SPACE_TIME_H

#include <array>

#include "common/resized_axis.h"
#include "common/memory.h"
#include "lumiere_fast.h"

namespace lf {

enum class Direction { kDown, kUp };

using Sizes = std::array<int64_t, kAxes>;

// Fixed taps, forward or adjoint: each element of `to` is gathered from `from`.
struct Resample {
  lf_dtype dtype;
  Sizes from_shape, to_shape;
  lf_clip from, to;
  ResizedAxis axes[3];  // T, H, W
};

// A learned resize in time. Frame i of the result is bias + sum_k weight[:, :, k] x[frame(i, k)], with r = taps / 2 and
//
//   down  frame(i, k) = factor i - r + k      up  frame(i, k) = floor((i - r + k) / factor)
//
// where that is a frame of x, and 0 where not.
struct TemporalResize {
  lf_dtype dtype;
  Direction direction;
  int64_t batch, in, out, frames, out_frames, height, width, factor, taps;
  lf_clip x, y;
  const void* weight;
  int64_t weight_strides[3];  // of the output channel, the input channel, the tap
  const void* bias;           // null for none
  int64_t bias_stride;
};

// A call taken apart.
struct SpaceTimeCall {
  bool empty, fixed, learned, learned_first;
  Resample resample;
  TemporalResize temporal;
  int64_t between;  // bytes of the clip between the two, at most a 16th of what can be counted
};

// What a call is looked at for.
enum class Purpose { kForward, kAdjoint, kWorkspace };

lf_status read_call(const lf_space_time* arguments, Direction direction, Purpose purpose, SpaceTimeCall& call) noexcept;

constexpr int64_t kWorkspaceUnit = 64;

// Whether a call has `needed` bytes to work in, in memory of their own.
lf_status check_workspace(const lf_space_time& arguments, const SpaceTimeCall& call, int64_t needed) noexcept;

inline int64_t whole_units(int64_t bytes) { return (bytes + kWorkspaceUnit - 1) / kWorkspaceUnit * kWorkspaceUnit; }

// Runs the parts of a call: gather(Resample), and engines.resize(TemporalResize, void* workspace), which needs
// engines.resize_bytes(TemporalResize) of it.
template <class Engines, class Gather>
lf_status run_parts(const lf_space_time& arguments, SpaceTimeCall& call, const Engines& engines, const Gather& gather) {
  if (!call.learned) return gather(call.resample);
  const lf_status room = check_workspace(arguments, call, call.between + engines.resize_bytes(call.temporal));
  if (room != LF_OK) return room;
  auto* const workspace = static_cast<char*>(arguments.workspace);
  const auto resize = [&] { return engines.resize(call.temporal, workspace + call.between); };
  if (!call.fixed) return resize();
  call.resample.to.data = call.learned_first ? call.resample.to.data : workspace;
  call.resample.from.data = call.learned_first ? workspace : call.resample.from.data;
  call.temporal.x.data = call.learned_first ? call.temporal.x.data : workspace;
  call.temporal.y.data = call.learned_first ? workspace : call.temporal.y.data;
  const lf_status status = call.learned_first ? resize() : gather(call.resample);
  if (status != LF_OK) return status;
  return call.learned_first ? gather(call.resample) : resize();
}

// An op of these taps in this direction, or its adjoint, by a device's engines; engines.use(work) runs work() where the
// device is current. Down goes to the coarse side, and its adjoint to the fine one: up it is the other way round.
template <Direction direction, class Taps, Purpose purpose, class Engines>
lf_status run_call(const lf_space_time* arguments, const Engines& engines) noexcept {
  return guarded([&] {
    SpaceTimeCall call;
    const lf_status status = read_call(arguments, direction, purpose, call);
    if (status != LF_OK || call.empty) return status;
    return engines.use([&] {
      return run_parts(*arguments, call, engines, [&](const Resample& resample) {
        constexpr bool to_coarse = (direction == Direction::kDown) == (purpose == Purpose::kForward);
        if constexpr (to_coarse) return engines.template gather_fine<Taps>(resample);
        else return engines.template gather_coarse<Taps>(resample);
      });
    });
  });
}

// lf_space_time_*_workspace.
lf_status workspace(const lf_space_time* arguments, Direction direction, int64_t num_threads, int64_t* bytes) noexcept;

// Of any device; without a CUDA half too. At most half of what can be counted, so that `between` can be added.
int64_t temporal_resize_cpu_bytes(const TemporalResize& resize, int64_t num_threads);
// Of weights as warpgroup instructions take them, where they do not lie so already.
int64_t temporal_resize_cuda_bytes(const TemporalResize& resize, bool wgmma);

}  // namespace lf

#endif  // LF_COMMON_SPACE_TIME_H
