// The plan of a convolution over time, and the threads that work it off. See conv_plan.h.
#include "common/conv_plan.h"

#include <algorithm>

#include "common/conv_kernel.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/per_channel.h"
#include "common/processor.h"

namespace lf {

ConvKernels conv_kernels_portable(lf_dtype dtype) noexcept { return kernels_for(dtype); }

ConvKernels conv_kernels(lf_dtype dtype) {
#if defined(LF_WITH_AVX2)
  if (has_avx512()) return conv_kernels_avx512(dtype);
  if (has_avx2()) return conv_kernels_avx2(dtype);
#endif
  return conv_kernels_portable(dtype);
}

namespace {

// Packed frames of one piece: they share half a megabyte of cache with weights.
constexpr int64_t kCacheFloats = 80 << 10;
constexpr int64_t kLeastPixels = 12, kMostPixels = 48;  // of a piece, where its frames allow
constexpr int64_t kFilteredChannels = 24, kFilteredFrames = 4;  // from where minimal filtering is worth its sums
constexpr int64_t kStreamedFloats = 1 << 19;  // from where y is written past the caches
constexpr int64_t kFarFloats = 1 << 18;       // from where x is asked for ahead
constexpr int64_t kSumsWorthAThread = 32;     // multiply-adds that cost as much as an element of an op bound by memory
constexpr double kMostFloats = 1ll << 58;     // that are counted
constexpr int64_t kUncounted = INT64_MAX / 2;

Place place_of(const lf_clip& clip) {
  const int64_t* s = clip.strides;
  return {static_cast<char*>(clip.data), s[kBatch], s[kChannel], s[kTime], s[kHeight], s[kWidth]};
}

int64_t whole_lines(int64_t floats) { return (floats + kDepth - 1) / kDepth * kDepth; }

// --- what is done ----------------------------------------------------------------------------------------------------

ConvSchedule schedule_of(const ConvTask& task) {
  const bool filtered = task.taps == 3 && std::min(task.frames, task.out_frames) >= kFilteredFrames &&
                        std::min(task.in, task.out) >= kFilteredChannels;
  if (task.copies > 1) return filtered ? ConvSchedule::kFilteredUp : ConvSchedule::kPhases;
  if (filtered && task.stride == 1) return ConvSchedule::kFiltered;
  return filtered && task.stride == 2 ? ConvSchedule::kFilteredDown : ConvSchedule::kDirect;
}

void choose_turns(ConvPlan& plan) {
  const ConvTask& task = plan.task;
  const int64_t r = plan.radius, c = task.copies;
  plan.step = plan.schedule >= ConvSchedule::kFiltered ? 2 : 1;
  plan.filtered = 0;
  plan.turns = task.out_frames;
  plan.before = plan.after = r;
  switch (plan.schedule) {
    case ConvSchedule::kDirect: plan.products = task.taps; break;
    case ConvSchedule::kPhases:
      plan.products = task.taps - 1 + std::min(c, task.taps);
      plan.turns = task.frames;
      plan.before = plan.after = r / c + (r % c != 0);
      break;
    case ConvSchedule::kFiltered: plan.products = plan.filtered = 4; break;
    case ConvSchedule::kFilteredDown: plan.products = 4, plan.filtered = 2; break;
    case ConvSchedule::kFilteredUp:
      plan.products = c > 2 ? 5 : 4;
      plan.filtered = 2;
      plan.turns = task.frames + 1;  // the last one is beyond the clip, and gives what lies before that
      plan.before = 1, plan.after = 0;
      break;
  }
}

// --- how ------------------------------------------------------------------------------------------------------------

// Frames of x that some turns take together.
int64_t frames_of(const ConvPlan& plan, int64_t turns) {
  const int64_t window = plan.before + plan.after;
  if (window >= plan.task.frames) return plan.task.frames;
  return std::min(plan.task.stride * (std::min(turns, plan.turns) - 1) + window + 1, plan.task.frames);
}

// Pieces as large as the cache takes, for each has to go through all weights; and of few pixels several turns at once.
void choose_blocks(ConvPlan& plan) {
  const int64_t step = plan.step;
  const auto packed_of = [&](int64_t group) { return frames_of(plan, group) + plan.filtered * (group / step); };
  const int64_t fitting = kCacheFloats / packed_of(step) / plan.depth;
  const int64_t most = std::clamp(fitting, kLeastPixels, kMostPixels);
  plan.blocks = (plan.pixels + most - 1) / most;
  plan.block = (plan.pixels + plan.blocks - 1) / plan.blocks;
  plan.pieces = plan.task.batch * plan.rows * plan.blocks;
  plan.group = step;
  while (plan.group < plan.turns && plan.group * plan.block < step * kMostPixels &&
         packed_of(plan.group + step) * plan.block * plan.depth <= kCacheFloats) {
    plan.group += step;
  }
  plan.slots = frames_of(plan, plan.group);
  plan.slot_size = plan.depth * plan.block;
}

void lay_out_scratch(ConvPlan& plan) {
  const bool filtered = plan.filtered > 0;
  int64_t end = plan.slots * plan.slot_size;
  const auto take = [&](int64_t floats) {
    const int64_t start = end;
    end += whole_lines(floats);
    return start;
  };
  constexpr int64_t tile = kMostRows * kMostWidth;
  const int64_t steps = std::max(plan.task.taps, kMostFiltered), step_size = plan.kernels.step_size;
  plan.zeros_at = take(filtered ? plan.slot_size : 0);
  plan.filtered_at = take(plan.group / plan.step * plan.filtered * plan.slot_size);
  plan.parked_at = take(tile);
  plan.carried_at = take(plan.schedule == ConvSchedule::kFilteredUp ? plan.block * plan.padded_out : 0);
  plan.tiles_at = take(kMostRuns * tile);
  plan.residual_at = take(tile);
  plan.stats_at = take(plan.task.stats_groups > 0 ? 2 * plan.task.frames * plan.padded_out : 0);
  plan.steps_at = take(steps * step_size / static_cast<int64_t>(sizeof(float)));
  plan.scratch_size = whole_lines(std::max(end, kPackedAtOnce * plan.task.taps * kMostWidth / 2));
}

void lay_out(ConvPlan& plan, int64_t rows, int64_t pixels, int64_t num_threads) {
  plan.rows = rows, plan.pixels = pixels;
  choose_blocks(plan);
  lay_out_scratch(plan);
  plan.threads = std::min(num_threads, plan.pieces);
  plan.weights_at = whole_lines(plan.bias_rows * plan.padded_out);
  plan.scratch_at = plan.weights_at + whole_lines(plan.products * plan.task.in * plan.padded_out);
  plan.size = plan.scratch_at + plan.threads * plan.scratch_size;
}

// All but where things lie.
ConvPlan plan_task(const ConvTask& task) {
  ConvPlan plan{};
  plan.task = task;
  plan.kernels = conv_kernels(task.dtype);
  plan.schedule = schedule_of(task);
  plan.radius = task.taps / 2;
  choose_turns(plan);
  const int64_t lanes = plan.kernels.lanes;
  plan.depth = whole_depth(task.in);
  plan.padded_out = (task.out + lanes - 1) / lanes * lanes;
  const bool many = task.bias.data && (task.bias.strides[0] != 0 || task.bias.strides[1] != 0);
  plan.bias_rows = many ? task.batch * task.out_frames : 1;
  return plan;
}

// Where y is more than a core's caches hold, reading its lines before they are overwritten would cost as much as
// writing.
bool can_stream(const ConvTask& task, const Place& y) {
  constexpr int64_t line = kDepth;
  const int64_t floats = task.batch * task.out * task.out_frames * task.height * task.width;
  bool whole = task.out % line == 0 && reinterpret_cast<uintptr_t>(y.data) % (line * sizeof(float)) == 0;
  for (const int64_t stride : {y.batch, y.frame, y.row, y.pixel}) whole = whole && stride % line == 0;
  return whole && task.dtype == LF_FLOAT32 && y.channel == 1 && floats >= kStreamedFloats;
}

int64_t threads_worth(const ConvTask& task, int64_t num_threads) {
  const double sums = static_cast<double>(task.in) * task.out * task.taps * task.batch * task.out_frames *
                      task.height * task.width;
  const double worth = sums / kSumsWorthAThread / static_cast<double>(elements_worth_a_thread());
  return static_cast<int64_t>(std::clamp(worth, 1.0, static_cast<double>(num_threads)));
}

void read_bias(const ConvPlan& plan, float* to) {
  const ConvTask& task = plan.task;
  for (int64_t i = 0; i < plan.bias_rows; ++i, to += plan.padded_out) {
    std::fill(to, to + plan.padded_out, 0.0f);
    if (task.bias.data) read_channels(task.bias, i / task.out_frames, i % task.out_frames, task.out, to);
  }
}

}  // namespace

ConvPlan plan_conv(const ConvTask& task, int64_t num_threads) {
  ConvPlan plan = plan_task(task);
  plan.x = place_of(task.x), plan.residual = place_of(task.residual), plan.y = place_of(task.y);
  plan.stream = can_stream(task, plan.y);
  plan.ahead = plan.x.channel == 1 && plan.x.pixel == task.in &&
               task.batch * task.in * task.frames * task.height * task.width >= kFarFloats;
  const auto merges = [&](const Place& p) { return !p.data || task.height == 1 || p.row == task.width * p.pixel; };
  const bool merged = merges(plan.x) && merges(plan.residual) && merges(plan.y);
  lay_out(plan, merged ? 1 : task.height, merged ? task.height * task.width : task.width,
          threads_worth(task, num_threads));
  return plan;
}

int64_t conv_bytes(const ConvTask& task, int64_t num_threads) {
  const double in = static_cast<double>(task.in) + kDepth, out = static_cast<double>(task.out) + kMostWidth;
  const double taps = static_cast<double>(task.taps) + kMostFiltered;
  const double frames = std::min(static_cast<double>(task.frames), 2.0 * kMostPixels * task.stride + taps);
  const double scratch = kMostPixels * (in * (frames + 4.0 * kMostPixels) + out) + 64 * kMostRows * kMostWidth +
                         kPackedAtOnce * kMostWidth * taps;
  if (2 * taps * in * out + scratch * static_cast<double>(num_threads) > kMostFloats) return kUncounted;
  ConvPlan plan = plan_task(task);
  lay_out(plan, task.height, task.width, num_threads);
  const int64_t apart = plan.size;
  lay_out(plan, 1, task.height * task.width, num_threads);
  return std::max(apart, plan.size) * static_cast<int64_t>(sizeof(float));
}

void run_conv(ConvPlan& plan, void* memory) {
  auto* const floats = static_cast<float*>(memory);
  const ConvTask& task = plan.task;
  read_bias(plan, floats);
  plan.bias = floats;
  plan.frame_bias = plan.bias_rows > 1 ? plan.padded_out : 0;
  plan.weights = floats + plan.weights_at;
  const auto scratch_of = [&](int64_t worker) { return floats + plan.scratch_at + worker * plan.scratch_size; };
  const int64_t width = 2 * plan.kernels.lanes, panels = (plan.padded_out + width - 1) / width;
  for_each_piece(panels, task.in * task.out < 1 << 14 ? 1 : plan.threads, [&](int64_t worker, int64_t panel) {
    plan.kernels.pack(plan, panel, scratch_of(worker));
  });
  for_each_piece(plan.pieces, plan.threads, [&](int64_t worker, int64_t piece) {
    plan.kernels.piece(plan, piece, scratch_of(worker));
  });
}

}  // namespace lf
