// What the two halves of temporal_conv on a CPU share. The plan (temporal_conv.cpp) is made for any processor: checks,
// memory, threads. The kernels (temporal_conv_kernel.h) are compiled once for each width of vectors, and do one piece
// of a plan at a time.
//
// A piece is some pixels of a clip, in all frames: time is convolved, so that pieces need nothing of one another. Its
// frames are read into packed memory in turn, normalised on the way, where all taps and output channels find them:
//
//   frame    [channel / kDepth][pixel][kDepth]: what a kernel reads next is always a constant distance away
//   weights  [panel][product][input channel][width of the panel], a panel being the output channels of one kernel call
//
// Three taps over enough frames and channels are done by minimal filtering, F(2, 3): of inputs d0..d3 and weights
// g0..g2 both outputs y0 = d0 g0 + d1 g1 + d2 g2 and y1 = d1 g0 + d2 g1 + d3 g2 are had from four products, not six:
//
//   m3 = (d2 - d1) (g0 - g1 + g2) / 2,  m2 = (d1 + d2) (g0 + g1 + g2) / 2,  m1 = (d0 - d2) g0,  m4 = (d3 - d1) g2
//   y0 = m2 + m3 + m1,  y1 = m2 - m3 + m4
#ifndef LF_TEMPORAL_CONV_H
#define LF_TEMPORAL_CONV_H

#include <cstdint>

#include "lumiere_fast.h"

namespace lf {

constexpr int64_t kDepth = 16;            // channels that lie together in a packed frame: a cache line of them
constexpr int64_t kMinimalProducts = 4;   // of F(2, 3)
constexpr int64_t kMostRows = 12;         // pixels of one kernel call, at most
constexpr int64_t kMostWidth = 32;        // output channels of one
constexpr int64_t kPackedAtOnce = 64;     // input channels whose weights are turned round together

// Where a tensor lies, in elements from its first.
struct Place {
  char* data;  // null where there is none
  int64_t batch, channel, frame, row, pixel;
};

// Plain data: the kernels, which are compiled for newer processors, must not lend their copy of a function to the rest.
struct ConvPlan {
  int64_t batch, in, out, frames, taps, radius;
  int64_t rows, pixels;  // H and W, or 1 and H*W where rows lie behind one another everywhere
  int64_t stats_groups;  // 0 for none
  bool replicate, silu, minimal;
  bool stream;  // y past the caches: floats, whole vectors at multiples of their size
  Place x, residual, y;
  Place weight;  // batch: the step to the next output channel, frame: to the next tap

  const float* multiplier;  // the norm's: of each frame and channel, `depth` floats a frame; null for none
  const float* offset;
  const float* bias;   // `padded_out` floats
  int64_t frame_bias;  // the step to the next frame's, or 0
  float* weights;      // packed
  double* partials;    // of each piece, frame and group: mean, and sum of the squared distances from it

  int64_t products;           // of one output, or of two where they are minimal
  int64_t depth, padded_out;  // of the channels, rounded up to kDepth and to vectors
  int64_t block, blocks;      // pixels of a piece, and pieces of a row
  int64_t group;              // frames for which the packed weights are gone through at a time
  int64_t slots, slot_size;   // frames of packed memory, and floats of one

  // A thread's scratch memory, in floats from its start, which is a multiple of 64 bytes.
  int64_t zeros_at, filtered_at, parked_at, tiles_at, residual_at, stats_at, steps_at, scratch_size;
};

// Compiled for one width of vectors and one dtype.
struct ConvKernels {
  int64_t lanes;
  int64_t step_size;  // in bytes
  void (*pack)(const ConvPlan&, int64_t panel, float* scratch) noexcept;  // one panel of the weights
  void (*piece)(const ConvPlan&, int64_t piece, float* scratch) noexcept;
};

ConvKernels conv_kernels_portable(lf_dtype dtype) noexcept;
ConvKernels conv_kernels_avx2(lf_dtype dtype) noexcept;
ConvKernels conv_kernels_avx512(lf_dtype dtype) noexcept;

}  // namespace lf

#endif  // LF_TEMPORAL_CONV_H
