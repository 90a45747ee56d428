#include "common/cover.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/memory.h"

namespace lf {
namespace {

int64_t offset(const Shape& strides, const std::array<int64_t, kBlended>& position) {
  return position[0] * strides[kTime] + position[1] * strides[kHeight] + position[2] * strides[kWidth];
}

Shape shape_at(const int64_t* values) {
  Shape shape;
  std::copy(values, values + kAxes, shape.begin());
  return shape;
}

lf_status check_pointers(const WindowArguments& arguments) {
  if (!arguments.windows || !arguments.shapes || !arguments.strides || !arguments.starts || !arguments.out_shape ||
      !arguments.out_strides) {
    return LF_INVALID_ARGUMENT;
  }
  if (arguments.num_windows < 1 || (arguments.axes != 1 && arguments.axes != kBlended)) return LF_INVALID_ARGUMENT;
  if (arguments.out_shape[kBatch] == 0) return LF_OK;  // nothing to read or write, so nowhere to point to
  const auto is_null = [](const void* pointer) { return pointer == nullptr; };
  const bool missing = std::any_of(arguments.windows, arguments.windows + arguments.num_windows, is_null);
  return missing || !arguments.out ? LF_INVALID_ARGUMENT : LF_OK;
}

lf_status check_out(const Shape& shape, const Shape& strides) {
  if (shape[kBatch] < 0) return LF_INVALID_SHAPE;
  for (int axis = kChannel; axis < kAxes; ++axis) {
    if (shape[axis] < 1) return LF_INVALID_SHAPE;
  }
  return elements_apart(shape.data(), strides.data(), kAxes) ? LF_OK : LF_INVALID_STRIDES;
}

lf_status check_window(const Cover& cover, const Window& window) {
  for (int axis = 0; axis < kAxes; ++axis) {
    const int blended = axis - kTime;
    if (axis == kBatch) {  // not halves * batch, which may overflow
      const int64_t batch = window.shape[axis];
      if (batch % cover.halves != 0 || batch / cover.halves != cover.out_shape[axis]) return LF_INVALID_SHAPE;
      continue;
    }
    if (blended < 0 || blended >= cover.axes) {
      if (window.shape[axis] != cover.out_shape[axis]) return LF_INVALID_SHAPE;
      continue;
    }
    if (window.shape[axis] < 1) return LF_INVALID_SHAPE;
    const int64_t start = window.start[blended];
    // Not start + size > extent, which may overflow.
    if (start < 0 || window.shape[axis] > cover.out_shape[axis] || start > cover.out_shape[axis] - window.shape[axis]) {
      return LF_WINDOW_OUT_OF_RANGE;
    }
  }
  return LF_OK;
}

lf_status read_windows(const WindowArguments& arguments, Cover& cover) {
  cover.windows.resize(arguments.num_windows);
  for (int64_t i = 0; i < arguments.num_windows; ++i) {
    Window& window = cover.windows[i];
    window.data = static_cast<const char*>(arguments.windows[i]);
    window.shape = shape_at(arguments.shapes + i * kAxes);
    window.strides = shape_at(arguments.strides + i * kAxes);
    window.start = {0, 0, 0};
    std::copy_n(arguments.starts + i * arguments.axes, arguments.axes, window.start.begin());
    const lf_status status = check_window(cover, window);
    if (status != LF_OK) return status;
  }
  return LF_OK;
}

// Divides the weights of an axis by a power of two near the largest, which changes no share: products of three, and
// their sums, then neither overflow nor vanish.
lf_status scale_weights(std::vector<double>& weights) {
  for (const double weight : weights) {
    if (!(weight > 0) || std::isinf(weight)) return LF_INVALID_WEIGHTS;
  }
  const auto [least, most] = std::minmax_element(weights.begin(), weights.end());
  if (*least < *most * 1e-100) return LF_UNEVEN_WEIGHTS;
  const int exponent = std::ilogb(*most);
  for (double& weight : weights) weight = std::ldexp(weight, -exponent);
  return LF_OK;
}

lf_status read_weights(const double* weights, Cover& cover) {
  if (weights == nullptr) return LF_OK;
  const Shape& shape = cover.windows[0].shape;
  for (const Window& window : cover.windows) {
    if (!std::equal(shape.begin() + kTime, shape.begin() + kTime + cover.axes, window.shape.begin() + kTime)) {
      return LF_INVALID_WEIGHTS;
    }
  }
  for (int axis = 0; axis < cover.axes; ++axis) {
    cover.weights[axis].assign(weights, weights + shape[kTime + axis]);
    weights += shape[kTime + axis];
    const lf_status status = scale_weights(cover.weights[axis]);
    if (status != LF_OK) return status;
  }
  return LF_OK;
}

// Cuts one axis after the other where one of the windows still in question starts or stops.
class Planner {
 public:
  explicit Planner(Cover& cover) : cover_(cover) {}

  // False where a position is in no window.
  bool run() {
    std::vector<int64_t> all(cover_.windows.size());
    std::iota(all.begin(), all.end(), 0);
    Cell cell{};
    for (int axis = cover_.axes; axis < kBlended; ++axis) cell.size[axis] = cover_.out_shape[kTime + axis];
    return cut(0, all, cell);
  }

 private:
  bool cut(int axis, const std::vector<int64_t>& candidates, Cell& cell) {
    if (axis == kBlended || axis == cover_.axes) {
      cell.first = static_cast<int64_t>(cover_.covering.size());
      cell.count = static_cast<int64_t>(candidates.size());
      cover_.covering.insert(cover_.covering.end(), candidates.begin(), candidates.end());
      cover_.cells.push_back(cell);
      return true;
    }
    const std::vector<int64_t> edges = edges_of(axis, candidates);
    std::vector<int64_t> inside;
    for (size_t i = 0; i + 1 < edges.size(); ++i) {
      inside.clear();
      for (const int64_t index : candidates) {
        const Window& window = cover_.windows[index];
        const int64_t start = window.start[axis];
        if (start <= edges[i] && edges[i + 1] <= start + window.shape[kTime + axis]) inside.push_back(index);
      }
      if (inside.empty()) return false;
      cell.low[axis] = edges[i];
      cell.size[axis] = edges[i + 1] - edges[i];
      if (!cut(axis + 1, inside, cell)) return false;
    }
    return true;
  }

  std::vector<int64_t> edges_of(int axis, const std::vector<int64_t>& candidates) const {
    const int64_t extent = cover_.out_shape[kTime + axis];
    if (cover_.weighted() && cover_.axes == 1) {
      std::vector<int64_t> frames(extent + 1);
      std::iota(frames.begin(), frames.end(), 0);
      return frames;
    }
    std::vector<int64_t> edges{0, extent};
    for (const int64_t index : candidates) {
      const Window& window = cover_.windows[index];
      edges.push_back(window.start[axis]);
      edges.push_back(window.start[axis] + window.shape[kTime + axis]);
    }
    std::sort(edges.begin(), edges.end());
    edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
    return edges;
  }

  Cover& cover_;
};

}  // namespace

char* Cover::out_at(const Cell& cell) const { return out + offset(out_strides, cell.low) * element_size; }

const char* Cover::part_at(const Cell& cell, int64_t k) const {
  const Window& w = window(cell, k);
  const std::array<int64_t, kBlended> position{cell.low[0] - w.start[0], cell.low[1] - w.start[1],
                                               cell.low[2] - w.start[2]};
  return w.data + offset(w.strides, position) * element_size;
}

double Cover::share(const Cell& cell, int64_t k) const {
  if (!weighted()) return 1.0 / static_cast<double>(cell.count);
  double total = 0;
  for (int64_t i = 0; i < cell.count; ++i) total += weights[0][cell.low[0] - window(cell, i).start[0]];
  return weights[0][cell.low[0] - window(cell, k).start[0]] / total;
}

std::array<int, kAxes> by_memory(const Shape& strides) {
  std::array<int, kAxes> order{kBatch, kChannel, kTime, kHeight, kWidth};
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return magnitude(strides[a]) > magnitude(strides[b]); });
  return order;
}

lf_status check_apart_from_windows(const Cover& cover, const void* data, const Shape& strides, int64_t element_size) {
  if (cover.empty()) return LF_OK;
  const std::optional<Span> out = span_of(data, cover.out_shape.data(), strides.data(), kAxes, element_size);
  for (const Window& window : cover.windows) {
    const lf_status status = check_apart(
        span_of(window.data, window.shape.data(), window.strides.data(), kAxes, cover.element_size), out);
    if (status != LF_OK) return status;
  }
  return LF_OK;
}

lf_status plan_cover(const WindowArguments& arguments, Cover& cover) {
  lf_status status = check_pointers(arguments);
  if (status == LF_OK) status = lf_dtype_size(arguments.dtype, &cover.element_size);
  if (status != LF_OK) return status;
  cover.dtype = arguments.dtype;
  cover.axes = arguments.axes;
  cover.halves = arguments.halves;
  cover.out = static_cast<char*>(arguments.out);
  cover.out_shape = shape_at(arguments.out_shape);
  cover.out_strides = shape_at(arguments.out_strides);
  status = check_out(cover.out_shape, cover.out_strides);
  if (status == LF_OK) status = read_windows(arguments, cover);
  if (status == LF_OK) status = read_weights(arguments.weights, cover);
  if (status != LF_OK) return status;
  return Planner(cover).run() ? LF_OK : LF_UNCOVERED;
}

}  // namespace lf
