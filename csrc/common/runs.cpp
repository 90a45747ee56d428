#include "common/runs.h"

#include "common/blend.h"

namespace lf {
namespace {

constexpr int64_t kPieceElements = 1 << 16;   // what a thread takes at a time
constexpr int64_t kRunElements = 1 << 14;     // longer runs are cut, so that they can be shared out
constexpr int64_t kStridedElements = 1 << 9;  // and shorter where elements lie apart: those between them, which the
                                              // next runs use, are then still in the cache
constexpr int64_t kShortRun = 32;             // runs shorter than this are worth a walk across the output's memory

}  // namespace

int64_t Box::elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

int64_t Box::pieces() const { return std::max<int64_t>(1, elements() / kPieceElements); }

Box whole(const Cover& cover, const Cell& cell) {
  return {&cell, {0, 0, cell.low[0], cell.low[1], cell.low[2]}, cover.cell_shape(cell)};
}

template <class A> void Walk<A>::point_at(const Box& box) {
  bases_.clear();
  const auto add = [&](char* data, int64_t element_size, const Shape& strides, const Shape& position) {
    int64_t offset = 0;
    for (int axis = 0; axis < kAxes; ++axis) offset += position[axis] * strides[axis];
    bases_.push_back({data + offset * element_size, element_size, strides});
  };
  for (const Clip& clip : clips_) add(clip.data, clip.element_size, clip.strides, box.low);
  for (int64_t half = 0; half < cover_.halves; ++half) {
    for (int64_t k = 0; k < box.cell->count; ++k) {
      const Window& window = cover_.window(*box.cell, k);
      Shape position = box.low;
      position[kBatch] += half * cover_.out_shape[kBatch];
      for (int axis = 0; axis < kBlended; ++axis) position[kTime + axis] -= window.start[axis];
      add(const_cast<char*>(window.data), cover_.element_size, window.strides, position);
    }
  }
}

template <class A> Nest Walk<A>::nest_in(const std::array<int, kAxes>& order, const Shape& shape) {
  Nest nest;
  nest.steps = steps_.data();
  for (const int axis : order) {
    if (shape[axis] == 1) continue;
    bool joins = nest.depth > 0;
    for (size_t i = 0; joins && i < bases_.size(); ++i) {
      joins = nest.step(i, nest.depth - 1) == bases_[i].strides[axis] * shape[axis];
    }
    if (!joins) nest.sizes[nest.depth++] = 1;
    nest.sizes[nest.depth - 1] *= shape[axis];
    for (size_t i = 0; i < bases_.size(); ++i) steps_[i * kAxes + nest.depth - 1] = bases_[i].strides[axis];
  }
  if (nest.depth == 0) {  // a single element
    nest.sizes[nest.depth++] = 1;
    for (size_t i = 0; i < bases_.size(); ++i) steps_[i * kAxes] = 1;
  }
  nest.cut = kRunElements;
  for (size_t i = 0; i < bases_.size(); ++i) {
    if (nest.step(i, nest.depth - 1) != 1) nest.cut = kStridedElements;
  }
  return nest;
}

// Where the first clip's order gives short runs, as channels at each pixel are that the windows have in planes, the
// shortest loop goes outside if this joins the others into a long one.
template <class A> Nest Walk<A>::nest_of(const Shape& shape) {
  const std::array<int, kAxes> by_clip = by_memory(bases_[0].strides);
  const Nest nest = nest_in(by_clip, shape);
  if (nest.depth == 1 || nest.length() >= kShortRun) return nest;
  std::array<int, kAxes> order = by_clip;
  const auto inner = std::find_if(order.rbegin(), order.rend(), [&](int axis) { return shape[axis] > 1; });
  std::rotate(order.begin(), inner.base() - 1, inner.base());
  const Nest turned = nest_in(order, shape);
  return turned.length() >= 4 * nest.length() ? turned : nest_in(by_clip, shape);
}

template <class A> void Walk<A>::move_to(const Shape& position, int loops, const int64_t* steps) {
  for (size_t i = 0; i < bases_.size(); ++i) {
    int64_t offset = 0;
    for (int loop = 0; loop < loops; ++loop) offset += position[loop] * steps[i * kAxes + loop];
    at_[i] = bases_[i].data + offset * bases_[i].element_size;
  }
}

// Channels that lie behind one another at each pixel, next to the next pixel's, in every operand: then a row of pixels
// is one run. Otherwise 1.
template <class A> int64_t Walk<A>::joined_channels() const {
  const int64_t channels = cover_.out_shape[kChannel];
  const bool all = std::all_of(bases_.begin(), bases_.end(), [&](const Clip& operand) {
    return (channels == 1 || operand.strides[kChannel] == 1) && operand.strides[kWidth] == channels;
  });
  return all ? channels : 1;
}

template <class A> void Walk<A>::shares_of_row(const Box& box, int64_t frame, int64_t row, int64_t joined) {
  const int64_t width = box.shape[kWidth];
  double* total = weights_.data();
  std::fill(total, total + width, 0.0);
  for (int64_t k = 0; k < box.cell->count; ++k) {
    const std::array<int64_t, kBlended>& start = cover_.window(*box.cell, k).start;
    const double time = cover_.weights[0][box.low[kTime] + frame - start[0]];
    const double height = cover_.weights[1][box.low[kHeight] + row - start[1]];
    const double* along = cover_.weights[2].data() + box.low[kWidth] - start[2];
    double* weights = total + (k + 1) * width;
    for (int64_t x = 0; x < width; ++x) total[x] += weights[x] = blend_weight(time, height, along[x]);
  }
  A* share = shares_.data();
  for (int64_t k = 0; k < box.cell->count; ++k) {
    for (int64_t x = 0; x < width; ++x) {
      const double value = total[(k + 1) * width + x] / total[x];
      for (int64_t i = 0; i < joined; ++i) *share++ = static_cast<A>(value);
    }
  }
}

template class Walk<float>;
template class Walk<double>;

}  // namespace lf
