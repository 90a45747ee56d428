// blend_windows on a CUDA device, gathering: each output position reads the windows that cover it, in their order, so
// that results are deterministic. Compiled without fused multiply-adds; see common/blend.h.
//
// Cells travel to the device as a kernel's parameters, a batch at a launch: nothing is allocated, and a graph that
// captures the launch keeps them.
#include <algorithm>
#include <iterator>

#include "blend_windows_limits.h"
#include "common/blend.h"
#include "common/cover.h"
#include "common/device.h"

namespace lf {
namespace {

constexpr int kThreads = 256;
constexpr int kPackBytes = 16;
constexpr int kElementsEach = 4;  // of a thread, where memory does not come in packs

template <class T> constexpr int kPackWidth = kPackBytes / static_cast<int>(sizeof(T));
template <class T> constexpr int kPacksEach = sizeof(T) == 2 ? 2 : 4;  // so that all stays in registers

// A box of the output. Its axes are in the order of the output's memory, the innermost last; axes that lie behind one
// another in all operands are one.
struct DeviceCell {
  int64_t out_offset;  // in elements
  int64_t size[kAxes];
  int64_t rows;   // positions on all axes but the innermost
  int64_t tiles;  // blocks along the innermost axis
  int32_t first_block;
  int32_t first_part;
  int32_t num_parts;
  int16_t log2_lanes;  // of a block's threads so many lie along the innermost axis, the others on rows
  int16_t packed;      // whether every row of every operand starts at a multiple of 16 bytes and is dense
};

struct DevicePart {
  const void* data;
  double share;                 // of the window, where weights do not vary within a cell
  int32_t layout;
  int32_t weight_at[kBlended];  // else where the cell's first position is among the weights of each axis
};

struct Layout {
  int64_t strides[kAxes];

  bool operator==(const Layout& other) const { return std::equal(strides, strides + kAxes, other.strides); }
};

template <int kCells, int kParts, int kLayouts, int kWeights> struct Batch {
  static constexpr int max_cells = kCells, max_parts = kParts, max_layouts = kLayouts;
  static constexpr bool varying = kWeights > 1;
  void* out;
  Layout out_layout;
  int32_t num_blocks = 0, num_cells = 0, num_parts = 0, num_layouts = 0;
  int32_t place[kBlended];  // which of a cell's axes T, H and W are, where weights vary
  DeviceCell cells[kCells];
  DevicePart parts[kParts];
  Layout layouts[kLayouts];
  double weights[kWeights];
};

using SmallBatch = Batch<26, 44, 4, 1>;  // enough for most videos, and the less there is to send the sooner it starts
using LargeBatch = Batch<96, kMostWindows, kMostLayouts, 1>;
using VaryingBatch = Batch<24, kMostVaryingWindows, kMostVaryingLayouts, kMostWeights>;
constexpr size_t kParameterBytes = 32764;
static_assert(sizeof(SmallBatch) <= 4096 && sizeof(LargeBatch) <= kParameterBytes, "more than a launch can take");
static_assert(sizeof(VaryingBatch) <= kParameterBytes, "more than a launch can take");

// Where a thread works: a row of a cell, and positions along it.
struct Place {
  int64_t index[kAxes - 1];
  int64_t begin, step, end;  // in packs or elements
};

template <class B> __device__ const DeviceCell& cell_of_block(const B& batch) {
  int low = 0, high = batch.num_cells;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.cells[middle].first_block <= static_cast<int32_t>(blockIdx.x)) low = middle;
    else high = middle;
  }
  return batch.cells[low];
}

// False where the thread has no row.
__device__ inline bool find_place(const DeviceCell& cell, int width, int each, Place& place) {
  const int64_t block = static_cast<int32_t>(blockIdx.x) - cell.first_block;
  const int lanes = 1 << cell.log2_lanes, lane = threadIdx.x & (lanes - 1);
  int64_t row = block / cell.tiles * (kThreads >> cell.log2_lanes) + (threadIdx.x >> cell.log2_lanes);
  if (row >= cell.rows) return false;
#pragma unroll
  for (int axis = kAxes - 2; axis >= 0; --axis) {
    place.index[axis] = row % cell.size[axis];
    row /= cell.size[axis];
  }
  place.begin = (block % cell.tiles * lanes * each + lane) * width;
  place.step = static_cast<int64_t>(lanes) * width;
  place.end = cell.size[kAxes - 1];
  return true;
}

__device__ inline int64_t row_offset(const Layout& layout, const Place& place) {
  int64_t offset = 0;
#pragma unroll
  for (int axis = 0; axis < kAxes - 1; ++axis) offset += place.index[axis] * layout.strides[axis];
  return offset;
}

// The index of an element on T, H or W.
__device__ inline int64_t index_on(int axis, const Place& place, int64_t i) {
  int64_t index = i;
#pragma unroll
  for (int at = 0; at < kAxes - 1; ++at) {
    if (axis == at) index = place.index[at];
  }
  return index;
}

template <class B> __device__ double weight_of(const B& batch, const DevicePart& part, const Place& place, int64_t i) {
  double weight[kBlended];
#pragma unroll
  for (int axis = 0; axis < kBlended; ++axis) {
    weight[axis] = batch.weights[part.weight_at[axis] + index_on(batch.place[axis], place, i)];
  }
  return blend_weight(weight[0], weight[1], weight[2]);
}

// One element: for the ends of rows, memory that packs do not fit, and weights that vary.
template <class T, class B>
__device__ void blend_element(const B& batch, const DeviceCell& cell, const Place& place, int64_t i, T* row) {
  const DevicePart* parts = batch.parts + cell.first_part;
  double total = 0;
  if constexpr (B::varying) {
    for (int k = 0; k < cell.num_parts; ++k) total += weight_of(batch, parts[k], place, i);
  }
  T value{};
  Acc<T> first{}, mean{};
  for (int k = 0; k < cell.num_parts; ++k) {
    const Layout& layout = batch.layouts[parts[k].layout];
    value = static_cast<const T*>(parts[k].data)[row_offset(layout, place) + i * layout.strides[kAxes - 1]];
    if (k == 0) {
      first = mean = widen(value);
      continue;
    }
    double share = parts[k].share;
    if constexpr (B::varying) share = weight_of(batch, parts[k], place, i) / total;
    mean = blend_step(mean, static_cast<Acc<T>>(share), widen(value), first);
  }
  // What one window alone covers is its own, bit for bit.
  row[i * batch.out_layout.strides[kAxes - 1]] = cell.num_parts == 1 ? value : narrow<T>(mean);
}

template <class T, class B>
__device__ void blend_elements(const B& batch, const DeviceCell& cell, const Place& place, T* row) {
  for (int j = 0; j < kElementsEach; ++j) {
    const int64_t i = place.begin + j * place.step;
    if (i < place.end) blend_element(batch, cell, place, i, row);
  }
}

template <class T> union Pack {
  uint4 bytes;
  T values[kPackWidth<T>];
  __device__ Pack() : bytes{0, 0, 0, 0} {}
};

// A thread's packs of one window; they are loaded together, so that their latencies overlap.
template <class T> __device__ void load_packs(Pack<T> (&packs)[kPacksEach<T>], const T* row, const Place& place) {
#pragma unroll
  for (int j = 0; j < kPacksEach<T>; ++j) {
    const int64_t i = place.begin + j * place.step;
    if (i + kPackWidth<T> <= place.end) packs[j].bytes = *reinterpret_cast<const uint4*>(row + i);
  }
}

template <class T, class B>
__device__ void blend_packs(const B& batch, const DeviceCell& cell, const Place& place, T* row) {
  constexpr int kWidth = kPackWidth<T>, kEach = kPacksEach<T>;
  const DevicePart* parts = batch.parts + cell.first_part;
  const auto row_of = [&](const DevicePart& part) {
    return static_cast<const T*>(part.data) + row_offset(batch.layouts[part.layout], place);
  };
  Pack<T> firsts[kEach];
  load_packs(firsts, row_of(parts[0]), place);
  Acc<T> means[kEach][kWidth];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) means[j][i] = widen(firsts[j].values[i]);
  }
  for (int k = 1; k < cell.num_parts; ++k) {
    const Acc<T> share = static_cast<Acc<T>>(parts[k].share);
    Pack<T> packs[kEach];
    load_packs(packs, row_of(parts[k]), place);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        means[j][i] = blend_step(means[j][i], share, widen(packs[j].values[i]), widen(firsts[j].values[i]));
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = place.begin + j * place.step;
    if (i + kWidth <= place.end) {
      if (cell.num_parts > 1) {
#pragma unroll
        for (int n = 0; n < kWidth; ++n) firsts[j].values[n] = narrow<T>(means[j][n]);
      }
      *reinterpret_cast<uint4*>(row + i) = firsts[j].bytes;
    } else {
      for (int64_t n = i; n < place.end; ++n) blend_element(batch, cell, place, n, row);
    }
  }
}

template <class T, class B> __global__ void __launch_bounds__(kThreads) blend_kernel(const __grid_constant__ B batch) {
  const DeviceCell& cell = cell_of_block(batch);
  const bool packed = cell.packed != 0;
  Place place;
  if (!find_place(cell, packed ? kPackWidth<T> : 1, packed ? kPacksEach<T> : kElementsEach, place)) return;
  T* row = static_cast<T*>(batch.out) + cell.out_offset + row_offset(batch.out_layout, place);
  if constexpr (!B::varying) {
    if (packed) return blend_packs(batch, cell, place, row);
  }
  blend_elements(batch, cell, place, row);
}

template <class B> const void* kernel_of(lf_dtype dtype) {
  switch (dtype) {
    case LF_FLOAT32: return reinterpret_cast<const void*>(&blend_kernel<float, B>);
    case LF_FLOAT64: return reinterpret_cast<const void*>(&blend_kernel<double, B>);
    case LF_FLOAT16: return reinterpret_cast<const void*>(&blend_kernel<Half, B>);
    default: return reinterpret_cast<const void*>(&blend_kernel<BFloat16, B>);
  }
}

// The video's axes as the kernel walks them: the same for all cells. Axis a of the kernel is axes[a], together with
// those outside it up to axes[a - 1]; there may be fewer than kAxes, and the outer ones are then of size 1.
class Loops {
 public:
  explicit Loops(const Cover& cover) : cover_(cover) {
    for (const int axis : by_memory(cover.out_strides)) {
      if (!cover.varying() && cover.out_shape[axis] == 1) continue;
      if (depth_ == 0 || !joins(innermost_[depth_ - 1], axis)) ++depth_;
      group_[axis] = depth_ - 1;
      innermost_[depth_ - 1] = axis;
    }
    if (depth_ == 0) innermost_[depth_++] = kWidth;  // a single element
  }

  int place_of(int axis) const { return kAxes - depth_ + group_[axis]; }

  Layout layout(const Shape& strides) const {
    Layout result{};
    for (int i = 0; i < depth_; ++i) result.strides[kAxes - depth_ + i] = strides[innermost_[i]];
    return result;
  }

  void fill_sizes(const Shape& shape, int64_t (&size)[kAxes]) const {
    std::fill(size, size + kAxes, 1);
    for (int axis = 0; axis < kAxes; ++axis) {
      if (group_[axis] >= 0) size[place_of(axis)] *= shape[axis];
    }
  }

 private:
  // Whether `inner` can be walked together with the axis outside it: if it is whole in every cell and they lie behind
  // one another in every operand.
  bool joins(int outer, int inner) const {
    if (cover_.varying()) return false;
    const auto behind = [&](const Shape& strides) {
      return strides[outer] == strides[inner] * cover_.out_shape[inner];
    };
    return behind(cover_.out_strides) &&
           std::all_of(cover_.windows.begin(), cover_.windows.end(), [&](const Window& window) {
             return window.shape[inner] == cover_.out_shape[inner] && behind(window.strides);
           }) && (inner != kTime || !cover_.weighted());
  }

  const Cover& cover_;
  int depth_ = 0;
  int group_[kAxes] = {-1, -1, -1, -1, -1};
  int innermost_[kAxes];
};

template <class B> class Launcher {
 public:
  Launcher(const Cover& cover, const Loops& loops, cudaStream_t stream)
      : cover_(cover), loops_(loops), stream_(stream) {
    batch_.out = cover.out;
    batch_.out_layout = loops.layout(cover.out_strides);
    if constexpr (B::varying) {
      for (int axis = 0; axis < kBlended; ++axis) batch_.place[axis] = loops.place_of(kTime + axis);
      double* weights = batch_.weights;
      for (const std::vector<double>& vector : cover.weights) {
        if (static_cast<std::ptrdiff_t>(vector.size()) > std::end(batch_.weights) - weights) {
          overfull_ = true;
          return;
        }
        weights = std::copy(vector.begin(), vector.end(), weights);
      }
    }
  }

  // Whether each cell fits into a launch; asked before the first one, since a call that fails writes nothing.
  bool fits() {
    for (const Cell& cell : cover_.cells) {
      clear();
      if (overfull_ || !add(cell)) return false;
    }
    clear();
    return true;
  }

  cudaError_t run() {
    for (const Cell& cell : cover_.cells) {
      if (add(cell)) continue;
      const cudaError_t error = launch();
      if (error != cudaSuccess) return error;
      add(cell);
    }
    return launch();
  }

 private:
  void clear() { batch_.num_blocks = batch_.num_cells = batch_.num_parts = batch_.num_layouts = 0; }

  cudaError_t launch() {
    void* parameters[] = {&batch_};
    const cudaError_t error = cudaLaunchKernel(kernel_of<B>(cover_.dtype), dim3(batch_.num_blocks), dim3(kThreads),
                                               parameters, 0, stream_);
    clear();
    return error;
  }

  // False where the batch has no room left; it is then only good to be launched or cleared.
  bool add(const Cell& cell) {
    if (batch_.num_cells == B::max_cells || batch_.num_parts + cell.count > B::max_parts) return false;
    DeviceCell& added = batch_.cells[batch_.num_cells];
    added.out_offset = (cover_.out_at(cell) - cover_.out) / cover_.element_size;
    added.first_part = batch_.num_parts;
    added.num_parts = static_cast<int32_t>(cell.count);
    loops_.fill_sizes(cover_.cell_shape(cell), added.size);
    bool packed = fits_packs(cover_.out_at(cell), batch_.out_layout, added);
    for (int64_t k = 0; k < cell.count; ++k) {
      DevicePart& part = batch_.parts[batch_.num_parts + k];
      part.layout = layout_of(loops_.layout(cover_.window(cell, k).strides));
      if (part.layout < 0) return false;
      part.data = cover_.part_at(cell, k);
      fill_share(cell, k, part);
      packed = packed && fits_packs(part.data, batch_.layouts[part.layout], added);
    }
    added.packed = packed && !B::varying;
    if (!spread(added)) return false;
    batch_.num_parts += added.num_parts;
    ++batch_.num_cells;
    return true;
  }

  int32_t layout_of(const Layout& layout) {
    const int32_t found = std::find(batch_.layouts, batch_.layouts + batch_.num_layouts, layout) - batch_.layouts;
    if (found == B::max_layouts) return -1;
    if (found == batch_.num_layouts) batch_.layouts[batch_.num_layouts++] = layout;
    return found;
  }

  void fill_share(const Cell& cell, int64_t k, DevicePart& part) const {
    if (!cover_.varying()) {
      part.share = cover_.share(cell, k);
      return;
    }
    int64_t before = 0;
    for (int axis = 0; axis < kBlended; ++axis) {
      part.weight_at[axis] = static_cast<int32_t>(before + cell.low[axis] - cover_.window(cell, k).start[axis]);
      before += cover_.weights[axis].size();
    }
  }

  bool fits_packs(const void* data, const Layout& layout, const DeviceCell& cell) const {
    const int64_t width = kPackBytes / cover_.element_size;
    bool fits = reinterpret_cast<uintptr_t>(data) % kPackBytes == 0 && cell.size[kAxes - 1] >= width;
    fits = fits && layout.strides[kAxes - 1] == 1;
    for (int axis = 0; axis < kAxes - 1; ++axis) {
      fits = fits && (cell.size[axis] == 1 || layout.strides[axis] % width == 0);
    }
    return fits;
  }

  // Lays the cell's elements out over blocks. False where a launch cannot number that many.
  bool spread(DeviceCell& cell) {
    const int64_t width = cell.packed ? kPackBytes / cover_.element_size : 1;
    const int64_t each = !cell.packed ? kElementsEach : cover_.element_size == 2 ? kPacksEach<Half> : kPacksEach<float>;
    const int64_t length = (cell.size[kAxes - 1] + width - 1) / width;
    const int most = length <= 32 * each ? 5 : 8;  // short rows share a block, a warp each; a long one has it alone
    cell.log2_lanes = 0;
    while (cell.log2_lanes < most && (int64_t{1} << cell.log2_lanes) < length) ++cell.log2_lanes;
    const int64_t tile = each << cell.log2_lanes, rows_each = kThreads >> cell.log2_lanes;
    cell.tiles = (length + tile - 1) / tile;
    cell.rows = 1;
    for (int axis = 0; axis < kAxes - 1; ++axis) cell.rows *= cell.size[axis];
    const int64_t blocks = cell.tiles * ((cell.rows + rows_each - 1) / rows_each);
    if (blocks > INT32_MAX - batch_.num_blocks) return false;
    cell.first_block = batch_.num_blocks;
    batch_.num_blocks += static_cast<int32_t>(blocks);
    return true;
  }

  const Cover& cover_;
  const Loops& loops_;
  const cudaStream_t stream_;
  bool overfull_ = false;
  B batch_;
};

template <class B> lf_status launch(const Cover& cover, const Loops& loops, cudaStream_t stream) {
  Launcher<B> launcher(cover, loops, stream);
  return launcher.fits() ? status_of(launcher.run()) : LF_TOO_MANY;
}

lf_status launch(const Cover& cover, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const Loops loops(cover);
  if (cover.varying()) return launch<VaryingBatch>(cover, loops, stream);
  if (cover.cells.size() <= 2 * SmallBatch::max_cells) {
    const lf_status status = launch<SmallBatch>(cover, loops, stream);
    if (status != LF_TOO_MANY) return status;
  }
  return launch<LargeBatch>(cover, loops, stream);
}

}  // namespace
}  // namespace lf

lf_status lf_blend_windows_cuda(lf_dtype dtype, int64_t num_windows, const void* const* windows, const int64_t* shapes,
                                const int64_t* strides, int32_t axes, const int64_t* starts, const double* weights,
                                void* out, const int64_t* out_shape, const int64_t* out_strides, int32_t device,
                                void* stream) noexcept {
  return lf::guarded([&]() -> lf_status {
    lf::Cover cover;
    lf_status status = lf::plan_cover(
        {dtype, num_windows, windows, shapes, strides, axes, starts, weights, out, out_shape, out_strides}, cover);
    if (status == LF_OK) status = lf::check_apart_from_windows(cover, out, cover.out_strides, cover.element_size);
    if (status != LF_OK || cover.empty()) return status;
    return lf::launch(cover, device, static_cast<cudaStream_t>(stream));
  });
}
