// temporal_attention on a CPU: the checks of a call, its small operands, and how it is cut into pieces. The work itself
// is temporal_attention_kernel.h.
#include "temporal_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "common/per_channel.h"
#include "common/processor.h"
#include "temporal_attention_kernel.h"

namespace lf {

AttentionKernels attention_kernels_portable(lf_dtype dtype) noexcept { return kernels_for(dtype); }

namespace {

constexpr int kHeadAxes = 6;
constexpr double kMostElements = 1ll << 55;  // that are counted: no memory holds as many
// Of a block, packed: in the second cache. The more pixels, the longer the runs that are read from each frame, and a
// core follows long ones at several times the rate.
constexpr int64_t kBlockFloats = 96 << 10;
constexpr int64_t kBlocksInAClip = 16;        // at least, for each thread: scratch memory stays small beside tensors
constexpr int64_t kMostPieces = 64;           // so that sums over pixels have few parts, whatever the threads
constexpr int64_t kStreamedFloats = 1 << 19;  // from where y is written past the caches
constexpr int64_t kSumsWorthAnElement = 16;   // multiply-adds that cost as much as an element of an op bound by memory

AttentionKernels kernels_of(lf_dtype dtype) {
#if defined(LF_WITH_AVX2)
  if (has_avx512()) return attention_kernels_avx512(dtype);
  if (has_avx2()) return attention_kernels_avx2(dtype);
#endif
  return attention_kernels_portable(dtype);
}

// --- checks ----------------------------------------------------------------------------------------------------------

using HeadShape = std::array<int64_t, kHeadAxes>;

HeadShape shape_of(const lf_temporal_attention& a) {
  return {a.batch, a.frames, a.height, a.width, a.heads, a.channels};
}

lf_status check_sizes(const lf_temporal_attention& a) {
  if (a.dtype != LF_FLOAT32 && a.dtype != LF_FLOAT16 && a.dtype != LF_BFLOAT16) return LF_UNSUPPORTED_DTYPE;
  if (a.batch < 0 || std::min({a.frames, a.height, a.width, a.heads, a.channels}) < 1) return LF_INVALID_SHAPE;
  if (a.rotary && a.channels % 2 != 0) return LF_INVALID_SHAPE;
  double elements = 1;
  for (const int64_t size : shape_of(a)) elements *= static_cast<double>(size);
  const double unit = static_cast<double>(a.frames) * (static_cast<double>(a.channels) + kChunk);
  return std::max(elements, unit) <= kMostElements ? LF_OK : LF_INVALID_SHAPE;
}

lf_status check_operands(const lf_temporal_attention& a) {
  int64_t size;
  if (a.bias && lf_dtype_size(a.bias_dtype, &size) != LF_OK) return LF_UNSUPPORTED_DTYPE;
  if (a.window < -1 || !std::isfinite(a.scale)) return LF_INVALID_ARGUMENT;
  return a.batch == 0 || (a.q.data && a.k.data && a.v.data && a.y.data) ? LF_OK : LF_INVALID_ARGUMENT;
}

std::optional<Span> memory_of(const lf_temporal_attention& a, const lf_heads& of) {
  int64_t size;
  lf_dtype_size(a.dtype, &size);
  return span_of(of.data, shape_of(a).data(), of.strides, kHeadAxes, size);
}

// Of what is written, and lies apart from what is read and what else is written.
template <size_t N>
lf_status check_written(const lf_temporal_attention& a, const lf_heads& to, const lf_heads* const (&others)[N]) {
  if (!elements_apart(shape_of(a).data(), to.strides, kHeadAxes)) return LF_INVALID_STRIDES;
  for (const lf_heads* other : others) {
    if (!other->data || other == &to) continue;
    if (const lf_status status = check_apart(memory_of(a, *other), memory_of(a, to))) return status;
  }
  return LF_OK;
}

lf_status check_read(const lf_temporal_attention& a) {
  for (const lf_heads* of : {&a.q, &a.k, &a.v, &a.y}) {
    if (!memory_of(a, *of)) return LF_INVALID_STRIDES;
  }
  return LF_OK;
}

lf_status check(const lf_temporal_attention& a) {
  const lf_status status = check_sizes(a);
  return status == LF_OK ? check_operands(a) : status;
}

lf_status check_y(const lf_temporal_attention& a) {
  const lf_heads* const read[] = {&a.q, &a.k, &a.v};
  const lf_status status = check_read(a);
  return status == LF_OK ? check_written(a, a.y, read) : status;
}

lf_status check_gradients(const lf_temporal_attention& a) {
  const lf_heads* const others[] = {&a.q, &a.k, &a.v, &a.y, &a.gq, &a.gk, &a.gv};
  if (const lf_status status = check_read(a)) return status;
  for (const lf_heads* to : {&a.gq, &a.gk, &a.gv}) {
    const lf_status status = to->data ? check_written(a, *to, others) : LF_OK;
    if (status != LF_OK) return status;
  }
  const int64_t size = a.heads * (2 * a.frames - 1);
  const int64_t dense = 1;
  for (const lf_heads* of : others) {
    if (!a.gbias || !of->data) continue;
    const std::optional<Span> sums = span_of(a.gbias, &size, &dense, 1, sizeof *a.gbias);
    if (const lf_status status = check_apart(memory_of(a, *of), sums)) return status;
  }
  return LF_OK;
}

// --- small operands --------------------------------------------------------------------------------------------------

constexpr double kMostBias = 2e38;

// What is added to the scores, and which rows it leaves without a frame.
struct Table {
  std::vector<float> lags;
  std::unique_ptr<bool[]> empty;
  int64_t step = 0;

  explicit Table(const lf_temporal_attention& a) {
    if (!a.bias && !a.causal && a.window < 0) return;
    const int64_t size = 2 * a.frames - 1, heads = a.bias ? a.heads : 1, stride = size + kMostTurned;
    step = a.bias ? stride : 0;
    lags.resize(heads * stride);
    bool none = false;
    for (int64_t head = 0; head < heads; ++head) none = fill(a, head, lags.data() + head * stride) || none;
    if (a.bias && none) find_empty(a);
  }

 private:
  // Only -inf leaves a frame out: what is finite stays so, also with a score added.
  static float in_powers_of_two(double bias) {
    const double most = std::isinf(bias) ? std::numeric_limits<double>::infinity() : kMostBias;
    const double scaled = -kSiluScale * bias;  // NaN stays NaN
    return static_cast<float>(scaled > most ? most : scaled < -most ? -most : scaled);
  }

  // Returns whether a frame is left out.
  static bool fill(const lf_temporal_attention& a, int64_t head, float* row) {
    const int64_t size = 2 * a.frames - 1;
    if (a.bias) {
      with_type(a.bias_dtype, [&](auto element) {
        const auto* from = static_cast<const decltype(element)*>(a.bias) + head * a.bias_strides[0];
        for (int64_t i = 0; i < size; ++i) {
          row[i] = in_powers_of_two(static_cast<double>(widen(from[i * a.bias_strides[1]])));
        }
      });
    }
    bool none = false;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t lag = i - (a.frames - 1);
      const bool out = (a.causal && lag < 0) || (a.window >= 0 && std::abs(lag) > a.window);
      if (out) row[i] = -std::numeric_limits<float>::infinity();
      none = none || row[i] == -std::numeric_limits<float>::infinity();
    }
    return none;
  }

  // Row t sees the lags t - T + 1 .. t: how many of them in a row, up to the last, are left out?
  void find_empty(const lf_temporal_attention& a) {
    empty = std::make_unique<bool[]>(a.heads * a.frames);
    for (int64_t head = 0; head < a.heads; ++head) {
      int64_t in_a_row = 0;
      for (int64_t i = 0; i < 2 * a.frames - 1; ++i) {
        const bool out = lags[head * step + i] == -std::numeric_limits<float>::infinity();
        in_a_row = out ? in_a_row + 1 : 0;
        if (i >= a.frames - 1) empty[head * a.frames + i - (a.frames - 1)] = in_a_row >= a.frames;
      }
    }
  }
};

// --- how -------------------------------------------------------------------------------------------------------------

int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
int64_t whole_lines(int64_t floats) { return parts_of(floats, kChunk) * kChunk; }

int64_t elements_of(const lf_temporal_attention& a) {
  return a.batch * a.frames * a.height * a.width * a.heads * a.channels;
}

void choose_blocks(AttentionPlan& plan, int64_t operands, int64_t threads) {
  const lf_temporal_attention& a = plan.task;
  const int64_t floats = std::min(kBlockFloats, elements_of(a) / (kBlocksInAClip * threads));
  const int64_t units = std::max<int64_t>(1, floats / (operands * plan.unit_size));
  plan.head_blocks = parts_of(a.heads, std::min(units, a.heads));
  plan.heads = parts_of(a.heads, plan.head_blocks);
  plan.pixel_blocks = parts_of(plan.clip_pixels, std::clamp<int64_t>(units / a.heads, 1, plan.clip_pixels));
  plan.pixels = parts_of(plan.clip_pixels, plan.pixel_blocks);
  plan.operands = plan.heads * plan.pixels;
  plan.blocks = a.batch * plan.pixel_blocks * plan.head_blocks;
  plan.pieces = std::min(plan.blocks, kMostPieces);
}

void lay_out_scratch(AttentionPlan& plan, int64_t operands, bool backward) {
  const int64_t pitch = 3 * plan.kernels.lanes, frames = plan.task.frames;
  int64_t end = operands * plan.operands * plan.unit_size;
  const auto take = [&end](int64_t floats) {
    const int64_t start = end;
    end += whole_lines(floats);
    return start;
  };
  plan.factors_at = take(backward ? 0 : plan.operands * frames);
  plan.turned_at = take(plan.chunks * kChunk * pitch);
  plan.scores_at = take(frames * pitch);
  plan.gradient_at = take(backward ? plan.chunks * kChunk * pitch : 0);
  plan.slopes_at = take(backward ? kMostLanes + frames * pitch : 0) + kMostLanes;
  plan.lags_size = 2 * frames + 2 * kMostTurned;
  plan.lags_at = take(backward ? plan.heads * plan.lags_size : 0);
  plan.scratch_size = end;
}

// Where y is more than a core's caches hold, reading its lines before they are overwritten would cost as much as
// writing.
bool can_stream(const lf_temporal_attention& a) {
  bool whole = a.channels % kChunk == 0 && reinterpret_cast<uintptr_t>(a.y.data) % kLine == 0;
  for (int axis = 0; axis < kHeadAxes - 1; ++axis) whole = whole && a.y.strides[axis] % kChunk == 0;
  return whole && a.dtype == LF_FLOAT32 && a.y.strides[kHeadAxes - 1] == 1 && elements_of(a) >= kStreamedFloats;
}

AttentionPlan plan_attention(const lf_temporal_attention& a, const Table& table) {
  AttentionPlan plan{};
  plan.task = a;
  plan.kernels = kernels_of(a.dtype);
  plan.scale = static_cast<float>(a.scale);
  plan.table = table.lags.empty() ? nullptr : table.lags.data();
  plan.table_step = table.step;
  plan.empty = table.empty.get();
  plan.clip_pixels = a.height * a.width;
  plan.chunks = parts_of(a.channels, kChunk);
  plan.unit_size = plan.chunks * a.frames * kChunk;
  return plan;
}

int64_t threads_worth(const lf_temporal_attention& a, int64_t num_threads) {
  const double of_element = 4 + 2 * static_cast<double>(a.frames) / kSumsWorthAnElement;
  const double elements = static_cast<double>(elements_of(a));
  const double worth = elements * of_element / static_cast<double>(elements_worth_a_thread());
  return static_cast<int64_t>(std::clamp(worth, 1.0, static_cast<double>(num_threads)));
}

void run_pieces(const AttentionPlan& plan, int64_t threads,
                void (*piece)(const AttentionPlan&, int64_t, float*) noexcept) {
  threads = std::min(threads, plan.pieces);
  const Buffer<float> scratch(threads * plan.scratch_size);
  for_each_piece(plan.pieces, threads, [&](int64_t worker, int64_t i) {
    piece(plan, i, scratch.get() + worker * plan.scratch_size);
  });
}

void run(const lf_temporal_attention& a, int64_t num_threads) {
  const Table table(a);
  AttentionPlan plan = plan_attention(a, table);
  const int64_t threads = threads_worth(a, num_threads), operands = 3;
  plan.stream = can_stream(a);
  choose_blocks(plan, operands, threads);
  lay_out_scratch(plan, operands, false);
  run_pieces(plan, threads, plan.kernels.forward);
}

// Blocks as for one thread: by them the gradient of the bias is summed.
void run_back(const lf_temporal_attention& a, int64_t num_threads) {
  const Table table(a);
  AttentionPlan plan = plan_attention(a, table);
  const int64_t lags = a.gbias ? a.heads * (2 * a.frames - 1) : 0, operands = 6;
  choose_blocks(plan, operands, 1);
  lay_out_scratch(plan, operands, true);
  std::vector<double> sums(lags * plan.pieces);
  plan.lag_sums = a.gbias ? sums.data() : nullptr;
  run_pieces(plan, threads_worth(a, num_threads), plan.kernels.backward);
  for (int64_t i = 0; i < lags; ++i) {
    double sum = 0;
    for (int64_t piece = 0; piece < plan.pieces; ++piece) sum += sums[piece * lags + i];
    a.gbias[i] = static_cast<float>(sum);
  }
}

}  // namespace
}  // namespace lf

lf_status lf_temporal_attention_cpu(const lf_temporal_attention* arguments, int32_t num_threads) noexcept {
  if (!arguments || num_threads < 1) return LF_INVALID_ARGUMENT;
  return lf::guarded([&] {
    lf_status status = lf::check(*arguments);
    if (status != LF_OK || arguments->batch == 0) return status;
    status = lf::check_y(*arguments);
    if (status == LF_OK) lf::run(*arguments, num_threads);
    return status;
  });
}

lf_status lf_temporal_attention_backward_cpu(const lf_temporal_attention* arguments, int32_t num_threads) noexcept {
  if (!arguments || num_threads < 1) return LF_INVALID_ARGUMENT;
  return lf::guarded([&] {
    lf_status status = lf::check(*arguments);
    if (status != LF_OK) return status;
    if (arguments->batch > 0) status = lf::check_gradients(*arguments);
    if (status == LF_OK) lf::run_back(*arguments, num_threads);
    return status;
  });
}
