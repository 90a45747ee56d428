// How windows cover a video: the arguments the ops on windows share, their checks, and the cut into cells.
#ifndef LF_COMMON_COVER_H
#define LF_COMMON_COVER_H

#include <array>
#include <cstdint>
#include <vector>

#include "common/memory.h"
#include "lumiere_fast.h"

namespace lf {

constexpr int kBlended = 3;  // T, H, W can be blended

using Shape = std::array<int64_t, kAxes>;

struct Window {
  const char* data;
  Shape shape;
  Shape strides;                          // in elements
  std::array<int64_t, kBlended> start;    // of (t, h, w) in the video; 0 where not blended
};

// The arguments of the C functions, as they came.
struct WindowArguments {
  lf_dtype dtype;
  int64_t num_windows;
  const void* const* windows;
  const int64_t* shapes;
  const int64_t* strides;
  int32_t axes;
  const int64_t* starts;
  const double* weights;
  void* out;
  const int64_t* out_shape;
  const int64_t* out_strides;
  int64_t halves = 1;  // the windows' batch holds the video's so many times, one after the other
};

// A box of the video that one set of windows covers: covering[first .. first + count), in the windows' order.
struct Cell {
  std::array<int64_t, kBlended> low;
  std::array<int64_t, kBlended> size;
  int64_t first;
  int64_t count;
};

struct Cover {
  lf_dtype dtype;
  int64_t element_size;
  int axes;
  int64_t halves;
  std::vector<Window> windows;
  std::array<std::vector<double>, kBlended> weights;  // of each blended axis; all empty where windows weigh the same
  char* out;
  Shape out_shape;
  Shape out_strides;
  std::vector<Cell> cells;
  std::vector<int64_t> covering;

  bool weighted() const { return !weights[0].empty(); }
  // Weights vary within a cell: only where space is blended, since a cell is one frame where time alone is weighted.
  bool varying() const { return weighted() && axes == kBlended; }
  bool empty() const { return out_shape[kBatch] == 0; }
  Shape cell_shape(const Cell& cell) const {
    return {out_shape[kBatch], out_shape[kChannel], cell.size[0], cell.size[1], cell.size[2]};
  }
  const Window& window(const Cell& cell, int64_t k) const { return windows[covering[cell.first + k]]; }
  // The cell's first element in the output, and in its k-th window.
  char* out_at(const Cell& cell) const;
  const char* part_at(const Cell& cell, int64_t k) const;
  // What the k-th window contributes to a cell where the weights do not vary; a cell's shares are together 1.
  double share(const Cell& cell, int64_t k) const;
};

// The axes from the outermost to the innermost in memory of these strides.
std::array<int, kAxes> by_memory(const Shape& strides);

// Checks the arguments, but not whose memory is whose, and cuts the video into cells. Throws std::bad_alloc, which the C
// functions catch.
lf_status plan_cover(const WindowArguments& arguments, Cover& cover);

// Whether a tensor of the video's shape, which is to be written, lies apart from all windows. Told by where they start
// and end: tensors that interleave count as meeting.
lf_status check_apart_from_windows(const Cover& cover, const void* data, const Shape& strides, int64_t element_size);

}  // namespace lf

#endif  // LF_COMMON_COVER_H
