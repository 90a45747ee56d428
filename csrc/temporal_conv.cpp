// temporal_conv on a CPU: the checks of a call, the norm in front of the convolution and the statistics behind it. The
// convolution itself is common/conv_plan.h.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/conv_plan.h"
#include "common/cover.h"
#include "common/memory.h"
#include "common/per_channel.h"

namespace lf {
namespace {

constexpr double kEps = 1e-5;

// --- small operands --------------------------------------------------------------------------------------------------

// The norm folded into one multiplier and one offset of each frame and channel.
void fold_norm(const lf_temporal_conv& a, int64_t depth, float* multipliers, float* offsets) {
  const auto given = [](const lf_per_channel& of) { return of.data ? &of : nullptr; };
  const Modulators modulators{given(a.norm_weight), given(a.norm_bias), given(a.norm_scale), given(a.norm_shift)};
  const int64_t of_group = a.channels_in / a.norm_groups;
  std::vector<float> mean(a.norm_groups), rstd(a.norm_groups);
  std::fill_n(multipliers, a.batch * a.frames * depth, 0.0f);
  std::fill_n(offsets, a.batch * a.frames * depth, 0.0f);
  for (int64_t i = 0; i < a.batch * a.frames; ++i, multipliers += depth, offsets += depth) {
    const int64_t clip = i / a.frames, frame = i % a.frames;
    read_channels(a.norm_mean, clip, frame, a.norm_groups, mean.data());
    read_channels(a.norm_rstd, clip, frame, a.norm_groups, rstd.data());
    modulators.fold(clip, frame, a.channels_in, multipliers, offsets);
    for (int64_t c = 0; c < a.channels_in; ++c) {
      const int64_t group = c / of_group;
      multipliers[c] *= rstd[group];
      offsets[c] -= mean[group] * multipliers[c];
    }
  }
}

// --- checks ----------------------------------------------------------------------------------------------------------

bool divides(int64_t groups, int64_t channels) { return groups == 0 || (groups > 0 && channels % groups == 0); }

lf_status check_factors(const lf_per_channel& factors, bool needed) {
  int64_t size;
  if (!factors.data) return needed ? LF_INVALID_ARGUMENT : LF_OK;
  return lf_dtype_size(factors.dtype, &size);
}

lf_status check_sizes(const lf_temporal_conv& a) {
  if (a.dtype != LF_FLOAT32 && a.dtype != LF_FLOAT16 && a.dtype != LF_BFLOAT16) return LF_UNSUPPORTED_DTYPE;
  const auto sizes = {a.channels_in, a.channels_out, a.frames, a.height, a.width, a.taps};
  if (a.batch < 0 || std::min(sizes) < 1 || a.taps % 2 == 0) return LF_INVALID_SHAPE;
  return divides(a.norm_groups, a.channels_in) && divides(a.stats_groups, a.channels_out) ? LF_OK : LF_INVALID_SHAPE;
}

lf_status check_operands(const lf_temporal_conv& a) {
  if (a.batch > 0 && (!a.x.data || !a.y.data || !a.weight)) return LF_INVALID_ARGUMENT;
  if (a.batch > 0 && a.stats_groups > 0 && (!a.mean || !a.rstd)) return LF_INVALID_ARGUMENT;
  const bool normed = a.batch > 0 && a.norm_groups > 0;
  for (const lf_per_channel* factors : {&a.norm_mean, &a.norm_rstd}) {
    if (const lf_status status = check_factors(*factors, normed)) return status;
  }
  for (const lf_per_channel* factors : {&a.bias, &a.norm_weight, &a.norm_bias, &a.norm_scale, &a.norm_shift}) {
    if (const lf_status status = check_factors(*factors, false)) return status;
  }
  return LF_OK;
}

lf_status check_y(const lf_temporal_conv& a) {
  const Shape in{a.batch, a.channels_in, a.frames, a.height, a.width};
  const Shape out{a.batch, a.channels_out, a.frames, a.height, a.width};
  if (!elements_apart(out.data(), a.y.strides, kAxes)) return LF_INVALID_STRIDES;
  int64_t size;
  lf_dtype_size(a.dtype, &size);
  const auto span = [size](const lf_clip& clip, const Shape& shape) {
    return span_of(clip.data, shape.data(), clip.strides, kAxes, size);
  };
  const lf_status status = a.x.data ? check_apart(span(a.x, in), span(a.y, out)) : LF_OK;
  return status != LF_OK || !a.residual.data ? status : check_apart(span(a.residual, out), span(a.y, out));
}

// --- the convolution -------------------------------------------------------------------------------------------------

ConvTask task_of(const lf_temporal_conv& a) {
  ConvTask task{a.dtype, a.batch, a.channels_in, a.channels_out, a.frames, a.frames, a.height, a.width, a.taps};
  task.replicate = a.replicate != 0, task.silu = a.silu != 0, task.norm_silu = a.norm_linear == 0;
  task.stats_groups = a.stats_groups;
  task.x = a.x, task.residual = a.residual, task.y = a.y;
  task.weight = a.weight;
  std::copy_n(a.weight_strides, 3, task.weight_strides);
  task.bias = a.bias;
  return task;
}

// Of the pieces of each clip, in their order.
void join_stats(const lf_temporal_conv& a, const ConvPlan& plan) {
  const int64_t of_frames = a.frames * a.stats_groups, pieces = plan.rows * plan.blocks;
  const double channels = static_cast<double>(a.channels_out / a.stats_groups);
  for (int64_t i = 0; i < a.batch * of_frames; ++i) {
    double count = 0, mean = 0, squares = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const double* partial = plan.task.partials + 2 * ((i / of_frames * pieces + piece) * of_frames + i % of_frames);
      const int64_t block = piece % plan.blocks;
      const int64_t pixels = (block + 1) * plan.pixels / plan.blocks - block * plan.pixels / plan.blocks;
      const double more = channels * static_cast<double>(pixels), apart = partial[0] - mean;
      mean += apart * (more / (count + more));
      squares += partial[1] + apart * apart * (count * more / (count + more));
      count += more;
    }
    a.mean[i] = static_cast<float>(mean);
    a.rstd[i] = static_cast<float>(1.0 / std::sqrt(squares / count + kEps));
  }
}

void run(const lf_temporal_conv& a, int64_t num_threads) {
  ConvTask task = task_of(a);
  const int64_t depth = whole_depth(a.channels_in), factors_size = a.norm_groups > 0 ? a.batch * a.frames * depth : 0;
  const Buffer<float> factors(2 * factors_size);
  if (a.norm_groups > 0) {
    fold_norm(a, depth, factors.get(), factors.get() + factors_size);
    task.multiplier = factors.get();
    task.offset = factors.get() + factors_size;
  }
  ConvPlan plan = plan_conv(task, num_threads);
  std::vector<double> partials(plan.pieces * a.frames * a.stats_groups * 2);
  plan.task.partials = partials.data();
  const Buffer<float> memory(plan.size);
  run_conv(plan, memory.get());
  if (a.stats_groups > 0) join_stats(a, plan);
}

}  // namespace
}  // namespace lf

lf_status lf_temporal_conv_cpu(const lf_temporal_conv* arguments, int32_t num_threads) noexcept {
  if (!arguments || num_threads < 1) return LF_INVALID_ARGUMENT;
  return lf::guarded([&] {
    lf_status status = lf::check_sizes(*arguments);
    if (status == LF_OK) status = lf::check_operands(*arguments);
    if (status != LF_OK || arguments->batch == 0) return status;
    status = lf::check_y(*arguments);
    if (status == LF_OK) lf::run(*arguments, num_threads);
    return status;
  });
}

int32_t lf_temporal_conv_lanes() noexcept { return static_cast<int32_t>(lf::conv_kernels(LF_FLOAT32).lanes); }
