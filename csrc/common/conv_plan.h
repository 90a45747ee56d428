// Convolutions over time on a CPU: temporal_conv, and the learned resizes of space_time_downsample and _upsample.
//
// An op fills in a ConvTask. Its plan (conv_plan.cpp) is made for any processor: memory, threads. The kernels
// (conv_kernel.h) are compiled once for each width of vectors, and do one piece of a plan at a time.
//
// A piece is some pixels of a clip, in all frames: time is convolved, so that pieces need nothing of one another. Its
// frames are read into packed memory in turn, normalised on the way, where all taps and output channels find them:
//
//   frame    [channel / kDepth][pixel][kDepth]: what a kernel reads next is always a constant distance away
//   weights  [panel][product][input channel][width of the panel], a panel being the output channels of one kernel call
//
// What is summed for an output is products of a frame and a matrix of weights, a sum of taps. With W_k for tap k, and
// r = taps / 2, of a stride s and of frames that each stand for c `copies`:
//
//   kDirect  y[i] = sum_k W_k x[s i - r + k]
//   kPhases  y[c v + p]: taps that fall on the same frame are added up beforehand. They are the same taps for all
//            phases p from r to c - 1 - r, so that these are one sum, stored several times
//
// Three taps over enough frames and channels are done by minimal filtering. F(2, 3): of inputs d0..d3 and weights
// g0..g2 both outputs y0 = d0 g0 + d1 g1 + d2 g2 and y1 = d1 g0 + d2 g1 + d3 g2 are had from four products, not six:
//
//   m3 = (d2 - d1) (g0 - g1 + g2) / 2,  m2 = (d1 + d2) (g0 + g1 + g2) / 2,  m1 = (d0 - d2) g0,  m4 = (d3 - d1) g2
//   y0 = m2 + m3 + m1,  y1 = m2 - m3 + m4
//
// and F(2, 2): m(a, b) = a g0 + b g2 and m(b, c) = b g0 + c g2 from three, not four:
//
//   m0 = b (g0 + g2),  m(a, b) = m0 + (a - b) g0,  m(b, c) = m0 + (c - b) g2
//
//   kFiltered      F(2, 3): 4 products for two outputs
//   kFilteredDown  stride 2, y[i] = W_1 x[2i] + m(x[2i-1], x[2i+1]): 5 products for two outputs
//   kFilteredUp    with p(v) = W_1 x[v] between the frames u = v - 1 and v lie y[c u + c-1] = p(u) + m(x[u], x[v]) and
//                  y[c v] = m(x[u], x[v]) + p(v), each the sum of two neighbours of m, p, m, p, ..: 5 products for two
//                  frames of x, and 2 more where c > 2, for the phases between, y[c v + p] = (W_0 + W_1 + W_2) x[v]
#ifndef LF_COMMON_CONV_PLAN_H
#define LF_COMMON_CONV_PLAN_H

#include <cstdint>

#include "lumiere_fast.h"

namespace lf {

constexpr int64_t kDepth = 16;         // channels that lie together in a packed frame: a cache line of them
constexpr int64_t kMostRows = 12;      // pixels of one kernel call, at most
constexpr int64_t kMostWidth = 32;     // output channels of one
constexpr int64_t kMostRuns = 6;       // runs of output frames of one
constexpr int64_t kMostFiltered = 7;   // products of one, where they are filtered
constexpr int64_t kPackedAtOnce = 64;  // input channels whose weights are turned round together

static inline int64_t whole_depth(int64_t channels) { return (channels + kDepth - 1) / kDepth * kDepth; }

// What is to be done. Plain data: the kernels, which are compiled for newer processors, must not lend their copy of a
// function to the rest.
struct ConvTask {
  lf_dtype dtype;
  int64_t batch, in, out, frames, out_frames, height, width, taps;
  int64_t stride = 1;  // frames of x from one of y to the next
  int64_t copies = 1;  // frames that each one of x stands for; one of stride and copies is 1
  bool replicate = false, silu = false;
  int64_t stats_groups = 0;  // 0 for none
  lf_clip x{}, residual{}, y{};
  const void* weight = nullptr;  // (out, in, taps), of the dtype
  int64_t weight_strides[3] = {};
  lf_per_channel bias{};

  const float* multiplier = nullptr;  // the norm's: of each frame and channel, whole_depth(in) a frame; null for none
  const float* offset = nullptr;
  bool norm_silu = true;  // whether SiLU follows it
  double* partials = nullptr;  // of each piece, frame and group: mean, and sum of the squared distances from it
};

enum class ConvSchedule { kDirect, kPhases, kFiltered, kFilteredDown, kFilteredUp };

// Where a tensor lies, in elements from its first.
struct Place {
  char* data;  // null where there is none
  int64_t batch, channel, frame, row, pixel;
};

struct ConvPlan;

// Compiled for one width of vectors and one dtype.
struct ConvKernels {
  int64_t lanes;
  int64_t step_size;  // in bytes
  void (*pack)(const ConvPlan&, int64_t panel, float* scratch) noexcept;  // one panel of the weights
  void (*piece)(const ConvPlan&, int64_t piece, float* scratch) noexcept;
};

struct ConvPlan {
  ConvTask task;
  ConvKernels kernels;
  ConvSchedule schedule;
  int64_t radius;
  int64_t rows, pixels;  // H and W, or 1 and H*W where rows lie behind one another everywhere
  bool stream;           // y past the caches: floats, whole vectors at multiples of their size
  bool ahead;            // x is asked for ahead: each frame's pixels lie together, and all of it is in no cache
  Place x, residual, y;

  const float* bias;   // `padded_out` floats
  int64_t frame_bias;  // the step to the next frame's, or 0
  float* weights;      // packed

  int64_t products;           // matrices of packed weights
  int64_t depth, padded_out;  // of the channels, rounded up to kDepth and to vectors
  int64_t block, blocks;      // pixels of a piece, and pieces of a row
  int64_t pieces;

  // A piece goes through its turns in order, `step` together: frames of y, or of x where these have copies. Turns
  // [i, j) take the frames of x from stride i - before to stride (j - 1) + after.
  int64_t turns, step, before, after;
  int64_t group;             // turns for which the packed weights are gone through at a time
  int64_t slots, slot_size;  // frames of packed memory, and floats of one
  int64_t filtered;          // sums and differences of frames for one step

  // A thread's scratch memory, in floats from its start, which is a multiple of 64 bytes.
  int64_t zeros_at, filtered_at, parked_at, carried_at, tiles_at, residual_at, stats_at, steps_at, scratch_size;

  int64_t threads, bias_rows;
  int64_t weights_at, scratch_at, size;  // of the memory that it runs in, in floats; the bias comes first
};

// With at most so many threads; little work takes fewer.
ConvPlan plan_conv(const ConvTask& task, int64_t num_threads);

// The bytes of memory that any plan of this task takes: operands may be null, their strides are not looked at. Where
// they are more than can be counted, more than there can be.
int64_t conv_bytes(const ConvTask& task, int64_t num_threads);

// In memory of plan.size floats, at a multiple of 64 bytes.
void run_conv(ConvPlan& plan, void* memory);

ConvKernels conv_kernels(lf_dtype dtype);  // for the processor at hand
ConvKernels conv_kernels_portable(lf_dtype dtype) noexcept;
ConvKernels conv_kernels_avx2(lf_dtype dtype) noexcept;
ConvKernels conv_kernels_avx512(lf_dtype dtype) noexcept;

}  // namespace lf

#endif  // LF_COMMON_CONV_PLAN_H
