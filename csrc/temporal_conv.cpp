// temporal_conv on a CPU: the plan of a call, and the threads that work it off. See temporal_conv.h.
#include "temporal_conv.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cover.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/per_channel.h"
#include "common/processor.h"
#include "temporal_conv_kernel.h"

namespace lf {

ConvKernels conv_kernels_portable(lf_dtype dtype) noexcept { return kernels_for(dtype); }

namespace {

constexpr double kEps = 1e-5;
// Packed frames of one piece: they share half a megabyte of cache with weights.
constexpr int64_t kCacheFloats = 80 << 10;
constexpr int64_t kLeastPixels = 12, kMostPixels = 48;  // of a piece, where its frames allow
constexpr int64_t kMinimalChannels = 24, kMinimalFrames = 4;  // from where minimal filtering is worth its sums
constexpr int64_t kStreamedFloats = 1 << 19;  // from where y is written past the caches
constexpr int64_t kSumsWorthAThread = 32;     // multiply-adds that cost as much as an element of an op bound by memory

ConvKernels conv_kernels(lf_dtype dtype) {
#if defined(LF_WITH_AVX2)
  if (has_avx512()) return conv_kernels_avx512(dtype);
  if (has_avx2()) return conv_kernels_avx2(dtype);
#endif
  return conv_kernels_portable(dtype);
}

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
  const auto meets_y = [&](const lf_clip& clip, const Shape& shape) {
    return clip.data && meet(span_of(clip.data, shape.data(), clip.strides, kAxes, size),
                             span_of(a.y.data, out.data(), a.y.strides, kAxes, size));
  };
  return meets_y(a.x, in) || meets_y(a.residual, out) ? LF_SHARED_MEMORY : LF_OK;
}

// --- the plan --------------------------------------------------------------------------------------------------------

Place place_of(const lf_clip& clip) {
  const int64_t* s = clip.strides;
  return {static_cast<char*>(clip.data), s[kBatch], s[kChannel], s[kTime], s[kHeight], s[kWidth]};
}

class Convolution {
 public:
  Convolution(const lf_temporal_conv& a, int64_t num_threads) : a_(a), kernels_(conv_kernels(a.dtype)) {
    place();
    plan_.stream = can_stream();
    choose_blocks();
    lay_out_scratch();
    const double sums = static_cast<double>(plan_.in) * plan_.out * plan_.taps * plan_.batch * plan_.frames *
                        plan_.rows * plan_.pixels;
    const double worth = sums / kSumsWorthAThread / static_cast<double>(elements_worth_a_thread());
    threads_ = static_cast<int64_t>(std::clamp(worth, 1.0, static_cast<double>(num_threads)));
  }

  void run() {
    const int64_t frames = plan_.batch * plan_.frames, pieces = plan_.batch * plan_.rows * plan_.blocks;
    const bool normed = a_.norm_groups > 0;
    const bool many = a_.bias.data && (a_.bias.strides[0] != 0 || a_.bias.strides[1] != 0);
    const Buffer<float> factors(normed ? 2 * frames * plan_.depth : 0), bias((many ? frames : 1) * plan_.padded_out);
    const Buffer<float> weights(plan_.products * plan_.in * plan_.padded_out);
    const int64_t threads = std::min(threads_, pieces);
    const Buffer<float> scratch(threads * plan_.scratch_size);
    std::vector<double> partials(pieces * plan_.frames * plan_.stats_groups * 2);
    plan_.weights = weights.get();
    plan_.partials = partials.data();
    if (normed) {
      fold_norm(a_, plan_.depth, factors.get(), factors.get() + frames * plan_.depth);
      plan_.multiplier = factors.get();
      plan_.offset = factors.get() + frames * plan_.depth;
    }
    read_bias(bias.get(), many ? frames : 1);
    const auto scratch_of = [&](int64_t worker) { return scratch.get() + worker * plan_.scratch_size; };
    const int64_t width = 2 * kernels_.lanes, panels = (plan_.padded_out + width - 1) / width;
    for_each_piece(panels, plan_.in * plan_.out < 1 << 14 ? 1 : threads, [&](int64_t worker, int64_t panel) {
      kernels_.pack(plan_, panel, scratch_of(worker));
    });
    for_each_piece(pieces, threads, [&](int64_t worker, int64_t piece) {
      kernels_.piece(plan_, piece, scratch_of(worker));
    });
    if (plan_.stats_groups > 0) join_stats();
  }

 private:
  void place() {
    plan_.batch = a_.batch, plan_.in = a_.channels_in, plan_.out = a_.channels_out, plan_.frames = a_.frames;
    plan_.taps = a_.taps, plan_.radius = a_.taps / 2;
    plan_.replicate = a_.replicate != 0, plan_.silu = a_.silu != 0;
    plan_.stats_groups = a_.stats_groups;
    plan_.x = place_of(a_.x), plan_.residual = place_of(a_.residual), plan_.y = place_of(a_.y);
    const int64_t* s = a_.weight_strides;
    plan_.weight = {const_cast<char*>(static_cast<const char*>(a_.weight)), s[0], s[1], s[2], 0, 0};
    plan_.rows = a_.height, plan_.pixels = a_.width;
    const auto merges = [&](const Place& p) { return !p.data || a_.height == 1 || p.row == a_.width * p.pixel; };
    if (merges(plan_.x) && merges(plan_.residual) && merges(plan_.y)) plan_.pixels *= plan_.rows, plan_.rows = 1;
    plan_.minimal = plan_.taps == 3 && plan_.frames >= kMinimalFrames &&
                    std::min(plan_.in, plan_.out) >= kMinimalChannels;
    plan_.products = plan_.minimal ? kMinimalProducts : plan_.taps;
    plan_.depth = (plan_.in + kDepth - 1) / kDepth * kDepth;
    plan_.padded_out = (plan_.out + kernels_.lanes - 1) / kernels_.lanes * kernels_.lanes;
  }

  // Where y is more than a core's caches hold, reading its lines before they are overwritten would cost as much as
  // writing.
  bool can_stream() const {
    constexpr int64_t line = kDepth;
    const Place& y = plan_.y;
    const int64_t floats = plan_.batch * plan_.out * plan_.frames * plan_.rows * plan_.pixels;
    bool whole = plan_.out % line == 0 && reinterpret_cast<uintptr_t>(y.data) % (line * sizeof(float)) == 0;
    for (const int64_t stride : {y.batch, y.frame, y.row, y.pixel}) whole = whole && stride % line == 0;
    return whole && a_.dtype == LF_FLOAT32 && y.channel == 1 && floats >= kStreamedFloats;
  }

  // Pieces as large as the cache takes, for each has to go through all weights; and of few pixels several frames at
  // once.
  void choose_blocks() {
    const int64_t step = plan_.minimal ? 2 : 1;
    const auto frames_of = [&](int64_t group) {  // in packed memory at once
      return std::min(group + 2 * plan_.radius, plan_.frames) + (plan_.minimal ? kMinimalProducts * (group / 2) : 0);
    };
    const int64_t fitting = kCacheFloats / (frames_of(step) * plan_.depth);
    const int64_t most = std::clamp(fitting, kLeastPixels, kMostPixels);
    plan_.blocks = (plan_.pixels + most - 1) / most;
    plan_.block = (plan_.pixels + plan_.blocks - 1) / plan_.blocks;
    plan_.group = step;
    while (plan_.group < plan_.frames && plan_.group * plan_.block < step * kMostPixels &&
           frames_of(plan_.group + step) * plan_.block * plan_.depth <= kCacheFloats) {
      plan_.group += step;
    }
    plan_.slots = std::min(plan_.group + 2 * plan_.radius, plan_.frames);
    plan_.slot_size = plan_.depth * plan_.block;
  }

  void lay_out_scratch() {
    int64_t end = plan_.slots * plan_.slot_size;
    const auto take = [&](int64_t floats) {
      const int64_t start = end;
      end += (floats + kDepth - 1) / kDepth * kDepth;
      return start;
    };
    constexpr int64_t tile = kMostRows * kMostWidth;
    plan_.zeros_at = take(plan_.minimal ? plan_.slot_size : 0);
    plan_.filtered_at = take(plan_.minimal ? plan_.group / 2 * kMinimalProducts * plan_.slot_size : 0);
    plan_.parked_at = take(tile);
    plan_.tiles_at = take(2 * tile);
    plan_.residual_at = take(tile);
    plan_.stats_at = take(plan_.stats_groups > 0 ? 2 * plan_.frames * plan_.padded_out : 0);
    plan_.steps_at = take(plan_.products * kernels_.step_size / static_cast<int64_t>(sizeof(float)));
    plan_.scratch_size = std::max(end, kPackedAtOnce * plan_.taps * kMostWidth / 2);
  }

  void read_bias(float* to, int64_t rows) {
    plan_.bias = to;
    plan_.frame_bias = rows > 1 ? plan_.padded_out : 0;
    for (int64_t i = 0; i < rows; ++i, to += plan_.padded_out) {
      std::fill(to, to + plan_.padded_out, 0.0f);
      if (a_.bias.data) read_channels(a_.bias, i / plan_.frames, i % plan_.frames, plan_.out, to);
    }
  }

  // Of the pieces of each clip, in their order.
  void join_stats() const {
    const int64_t groups = plan_.stats_groups, of_frames = plan_.frames * groups;
    const int64_t pieces = plan_.rows * plan_.blocks;
    const double channels = static_cast<double>(plan_.out / groups);
    for (int64_t i = 0; i < plan_.batch * of_frames; ++i) {
      double count = 0, mean = 0, squares = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const double* partial = plan_.partials + 2 * ((i / of_frames * pieces + piece) * of_frames + i % of_frames);
        const int64_t block = piece % plan_.blocks;
        const int64_t pixels = (block + 1) * plan_.pixels / plan_.blocks - block * plan_.pixels / plan_.blocks;
        const double more = channels * static_cast<double>(pixels), apart = partial[0] - mean;
        mean += apart * (more / (count + more));
        squares += partial[1] + apart * apart * (count * more / (count + more));
        count += more;
      }
      a_.mean[i] = static_cast<float>(mean);
      a_.rstd[i] = static_cast<float>(1.0 / std::sqrt(squares / count + kEps));
    }
  }

  const lf_temporal_conv& a_;
  const ConvKernels kernels_;
  ConvPlan plan_{};
  int64_t threads_;
};

}  // namespace
}  // namespace lf

lf_status lf_temporal_conv_cpu(const lf_temporal_conv* arguments, int32_t num_threads) noexcept {
  if (!arguments || num_threads < 1) return LF_INVALID_ARGUMENT;
  return lf::guarded([&] {
    lf_status status = lf::check_sizes(*arguments);
    if (status == LF_OK) status = lf::check_operands(*arguments);
    if (status != LF_OK || arguments->batch == 0) return status;
    status = lf::check_y(*arguments);
    if (status == LF_OK) lf::Convolution(*arguments, num_threads).run();
    return status;
  });
}

int32_t lf_temporal_conv_lanes() noexcept { return static_cast<int32_t>(lf::conv_kernels(LF_FLOAT32).lanes); }
