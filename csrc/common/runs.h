// The walk over a cover: boxes of the video are nests of loops around runs, and their pieces go to threads.
#ifndef LF_COMMON_RUNS_H
#define LF_COMMON_RUNS_H

#include <algorithm>
#include <vector>

#include "common/blocks.h"
#include "common/cover.h"

namespace lf {

// A clip of the video's shape.
struct Clip {
  char* data;
  int64_t element_size;
  Shape strides;  // in elements
};

// A part of a cell: all of it, or of some clips of the batch or some frames alone.
struct Box {
  const Cell* cell;
  Shape low;  // where in the video it begins
  Shape shape;

  int64_t elements() const;
  int64_t pieces() const;  // how many parts of it are worth a thread's while
};

Box whole(const Cover& cover, const Cell& cell);

// A box as loops, the outermost first; axes that lie behind one another in every operand are one loop. `steps` has a
// row of kAxes entries for each operand. The innermost loop is cut into runs of at most `cut`.
struct Nest {
  int depth = 0;
  Shape sizes;
  const int64_t* steps;
  int64_t cut;

  int64_t step(int64_t operand, int loop) const { return steps[operand * kAxes + loop]; }
  int64_t length() const { return sizes[depth - 1]; }
};

// One worker's memory for the walk, enough for the cell that most windows cover.
template <class A> class Walk {
 public:
  Walk(const Cover& cover, std::vector<Clip> clips) : cover_(cover), clips_(std::move(clips)) {
    int64_t widest = 0;
    for (const Cell& cell : cover.cells) widest = std::max(widest, cell.count);
    const int64_t operands = clips_.size() + cover.halves * widest;
    const int64_t varying = cover.varying() ? cover.out_shape[kWidth] : 0;
    bases_.reserve(operands);
    at_.resize(operands);
    strides_.resize(operands);
    steps_.resize(operands * kAxes);
    shares_.resize(widest * (varying ? varying * cover.out_shape[kChannel] : 1));
    weights_.resize((widest + 1) * varying);
  }

  // Calls work(run) for the runs of the `share`-th of `of` equal parts of a box. Their operands are the clips, and then
  // the windows that cover the box.
  template <class Work> void each_run(const Box& box, int64_t share, int64_t of, const Work& work) {
    point_at(box);
    cover_.varying() ? varying_part(box, share, of, work) : constant_part(box, share, of, work);
  }

 private:
  void point_at(const Box& box);
  // Loops in the order of the first clip's memory, or of what is faster.
  Nest nest_of(const Shape& shape);
  Nest nest_in(const std::array<int, kAxes>& order, const Shape& shape);
  void move_to(const Shape& position, int loops, const int64_t* steps);
  int64_t joined_channels() const;
  void shares_of_row(const Box& box, int64_t frame, int64_t row, int64_t joined);

  template <class Work> void constant_part(const Box& box, int64_t share, int64_t of, const Work& work) {
    const Nest nest = nest_of(box.shape);
    const int inner = nest.depth - 1;
    for (size_t i = 0; i < bases_.size(); ++i) strides_[i] = nest.step(i, inner);
    for (int64_t k = 0; k < box.cell->count; ++k) shares_[k] = static_cast<A>(cover_.share(*box.cell, k));
    int64_t iterations = 1;
    for (int loop = 0; loop < inner; ++loop) iterations *= nest.sizes[loop];
    const int64_t runs = (nest.length() + nest.cut - 1) / nest.cut * iterations;
    Run<A> run{0, at_.data(), strides_.data(), box.cell->count, shares_.data(), 0, 0};
    for (int64_t i = runs * share / of; i < runs * (share + 1) / of; ++i) {
      Shape position{};
      position[inner] = i / iterations * nest.cut;
      for (int64_t loop = inner - 1, rest = i % iterations; loop >= 0; rest /= nest.sizes[loop--]) {
        position[loop] = rest % nest.sizes[loop];
      }
      run.length = std::min(nest.cut, nest.length() - position[inner]);
      run.place = position[inner] * iterations + i % iterations * run.length;
      move_to(position, nest.depth, nest.steps);
      work(run);
    }
  }

  // Where each position has shares of its own: they are worked out once for each row of pixels.
  template <class Work> void varying_part(const Box& box, int64_t share, int64_t of, const Work& work) {
    const int64_t rows = box.shape[kTime] * box.shape[kHeight], joined = joined_channels();
    const int64_t length = box.shape[kWidth] * joined;
    for (size_t i = 0; i < bases_.size(); ++i) {
      strides_[i] = joined > 1 ? 1 : bases_[i].strides[kWidth];
      std::copy(bases_[i].strides.begin(), bases_[i].strides.end(), steps_.begin() + i * kAxes);
    }
    const int64_t runs = box.shape[kBatch] * box.shape[kChannel] / joined;  // of a row
    Run<A> run{length, at_.data(), strides_.data(), box.cell->count, shares_.data(), length, 0};
    for (int64_t row = rows * share / of; row < rows * (share + 1) / of; ++row) {
      const int64_t frame = row / box.shape[kHeight], line = row % box.shape[kHeight];
      shares_of_row(box, frame, line, joined);
      run.place = row * runs * length;
      for (int64_t b = 0; b < box.shape[kBatch]; ++b) {
        for (int64_t c = 0; c < box.shape[kChannel]; c += joined) {
          move_to({b, c, frame, line, 0}, kAxes, steps_.data());
          work(run);
          run.place += length;
        }
      }
    }
  }

  const Cover& cover_;
  std::vector<Clip> clips_;
  std::vector<Clip> bases_;  // the operands, from the box's first element on
  std::vector<char*> at_;
  std::vector<int64_t> strides_, steps_;
  std::vector<A> shares_;
  std::vector<double> weights_;
};

extern template class Walk<float>;
extern template class Walk<double>;

}  // namespace lf

#endif  // LF_COMMON_RUNS_H
