// temporal_attention on a CPU: what its kernels, which are compiled for several widths of vectors, share with the rest.
//
// A block is some neighbouring pixels by some heads: units, each one sequence of T frames. Its operands are packed as
// floats into memory that fits a core's caches, read frame by frame so that what lies together in a frame is read
// together, worked on unit by unit, and the results leave in the order in which operands came.
#ifndef LF_TEMPORAL_ATTENTION_H
#define LF_TEMPORAL_ATTENTION_H

#include <cstdint>

#include "lumiere_fast.h"

namespace lf {

constexpr int64_t kChunk = 16;        // channels that lie together in a packed row: a cache line of them
constexpr int64_t kMostTurned = 32;   // queries at a time, at most
constexpr int64_t kMostLanes = 16;

struct AttentionPlan;

// Compiled for one width of vectors and one dtype.
struct AttentionKernels {
  int64_t lanes;
  void (*forward)(const AttentionPlan&, int64_t piece, float* scratch) noexcept;
  void (*backward)(const AttentionPlan&, int64_t piece, float* scratch) noexcept;
};

struct AttentionPlan {
  lf_temporal_attention task;
  AttentionKernels kernels;
  bool stream;         // y past the caches
  float scale;
  const float* table;  // log2(e) times what is added to scores, by lag: -inf leaves a frame out; null for nothing
  const bool* empty;   // (heads, T): whether a row has no frame left; null where none is
  int64_t table_step;  // from head to head, or 0

  int64_t clip_pixels, chunks;
  int64_t pixels, heads;               // of a block, at most
  int64_t pixel_blocks, head_blocks;   // of a clip, and of a pixel
  int64_t blocks, pieces;              // each piece is some blocks behind one another
  double* lag_sums;                    // (pieces, heads, 2T - 1), the gradient of the bias in parts; null for none

  // A thread's scratch memory, in floats from its start, which is a multiple of 64 bytes.
  int64_t unit_size, operands;  // floats of a packed unit; how many there are of each
  int64_t factors_at, turned_at, gradient_at, scores_at, slopes_at, lags_at, lags_size, scratch_size;
};

AttentionKernels attention_kernels_portable(lf_dtype dtype) noexcept;
AttentionKernels attention_kernels_avx2(lf_dtype dtype) noexcept;
AttentionKernels attention_kernels_avx512(lf_dtype dtype) noexcept;

}  // namespace lf

#endif  // LF_TEMPORAL_ATTENTION_H
