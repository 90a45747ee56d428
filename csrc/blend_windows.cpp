// blend_windows on a CPU: cells are nests of loops around runs, and their pieces go to threads.
#include <algorithm>
#include <vector>

#include "blend_windows_run.h"
#include "common/cover.h"
#include "common/parallel.h"
#include "common/processor.h"

namespace lf {

template <class T> void blend_run_portable(const Run<T>& run) noexcept { blend_run(run); }

namespace {

constexpr int64_t kPieceElements = 1 << 16;  // what a thread takes at a time
constexpr int64_t kRunElements = 1 << 14;     // longer runs are cut, so that they can be shared out
constexpr int64_t kStridedElements = 1 << 9;  // and shorter where elements lie apart: those between them, which the
                                              // next runs use, are then still in the cache
constexpr int64_t kShortRun = 32;             // runs shorter than this are worth a walk across the output's memory

template <class T> using RunFunction = void (*)(const Run<T>&) noexcept;

template <class T> RunFunction<T> run_function() {
#if defined(LF_WITH_AVX2)
  if (has_avx2()) return blend_run_avx2<T>;
#endif
  return blend_run_portable<T>;
}

int64_t count_elements(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

// A cell as loops, the outermost first; axes that lie behind one another in every operand are one loop. `steps` has a
// row of kAxes entries for each operand, the output first. The innermost loop is cut into runs of at most `cut`.
struct Nest {
  int depth = 0;
  Shape sizes;
  int64_t* steps;
  int64_t cut = kRunElements;

  int64_t step(int64_t operand, int loop) const { return steps[operand * kAxes + loop]; }
  int64_t length() const { return sizes[depth - 1]; }
};

// One worker's memory, enough for the cell that most windows cover.
template <class T> struct Scratch {
  std::vector<const T*> bases, parts;
  std::vector<int64_t> steps, run_strides;
  std::vector<Acc<T>> shares;
  std::vector<double> weights;

  Scratch(int64_t windows, int64_t varying)
      : bases(windows),
        parts(windows),
        steps((windows + 1) * kAxes),
        run_strides(windows),
        shares(windows * std::max<int64_t>(varying, 1)),
        weights(varying ? (windows + 1) * varying : 0) {}
};

Nest nest_in(const std::array<int, kAxes>& order, const Cover& cover, const Cell& cell, int64_t* steps) {
  const Shape shape = cover.cell_shape(cell);
  const auto strides = [&](int64_t operand) -> const Shape& {
    return operand == 0 ? cover.out_strides : cover.window(cell, operand - 1).strides;
  };
  Nest nest;
  nest.steps = steps;
  for (const int axis : order) {
    if (shape[axis] == 1) continue;
    bool joins = nest.depth > 0;
    for (int64_t i = 0; joins && i <= cell.count; ++i) {
      joins = nest.step(i, nest.depth - 1) == strides(i)[axis] * shape[axis];
    }
    if (!joins) nest.sizes[nest.depth++] = 1;
    nest.sizes[nest.depth - 1] *= shape[axis];
    for (int64_t i = 0; i <= cell.count; ++i) steps[i * kAxes + nest.depth - 1] = strides(i)[axis];
  }
  if (nest.depth == 0) {  // a single element
    nest.sizes[nest.depth++] = 1;
    for (int64_t i = 0; i <= cell.count; ++i) steps[i * kAxes] = 1;
  }
  for (int64_t i = 0; i <= cell.count; ++i) {
    if (nest.step(i, nest.depth - 1) != 1) nest.cut = kStridedElements;
  }
  return nest;
}

// Loops in the order of the output's memory. Where that gives short runs, as channels at each pixel are that the
// windows have in planes, the shortest loop goes outside if this joins the others into a long one.
Nest nest_of(const Cover& cover, const Cell& cell, int64_t* steps) {
  std::array<int, kAxes> order = by_memory(cover.out_strides);
  const Nest nest = nest_in(order, cover, cell, steps);
  if (nest.depth == 1 || nest.length() >= kShortRun) return nest;
  const Shape shape = cover.cell_shape(cell);
  const auto inner = std::find_if(order.rbegin(), order.rend(), [&](int axis) { return shape[axis] > 1; });
  std::rotate(order.begin(), inner.base() - 1, inner.base());
  const Nest turned = nest_in(order, cover, cell, steps);
  return turned.length() >= 4 * nest.length() ? turned : nest_in(by_memory(cover.out_strides), cover, cell, steps);
}

template <class T> class Blend {
 public:
  Blend(const Cover& cover, int64_t num_threads)
      : cover_(cover), blend_run_(run_function<T>()), joined_(joined_channels()) {
    int64_t elements = 0, widest = 0;
    for (const Cell& cell : cover.cells) {
      const int64_t size = count_elements(cover.cell_shape(cell));
      elements += size;
      widest = std::max(widest, cell.count);
      pieces_.push_back(pieces_.back() + std::max<int64_t>(1, size / kPieceElements));
    }
    threads_ = std::clamp<int64_t>(elements / elements_worth_a_thread(), 1, std::max<int64_t>(num_threads, 1));
    const int64_t varying = cover.varying() ? cover.out_shape[kWidth] * joined_ : 0;
    scratch_.assign(threads_, Scratch<T>(widest, varying));
  }

  void run() {
    for_each_piece(pieces_.back(), threads_, [this](int64_t worker, int64_t piece) {
      const int64_t index = std::upper_bound(pieces_.begin(), pieces_.end(), piece) - pieces_.begin() - 1;
      const Cell& cell = cover_.cells[index];
      const int64_t share = piece - pieces_[index], of = pieces_[index + 1] - pieces_[index];
      const auto part = cover_.varying() ? &Blend::varying_part : &Blend::constant_part;
      (this->*part)(cell, share, of, scratch_[worker]);
    });
  }

 private:
  T* out_at(const Cell& cell) const { return reinterpret_cast<T*>(cover_.out_at(cell)); }
  const T* part_at(const Cell& cell, int64_t k) const { return reinterpret_cast<const T*>(cover_.part_at(cell, k)); }

  // The `share`-th of `of` equal parts of a cell whose weights do not vary.
  void constant_part(const Cell& cell, int64_t share, int64_t of, Scratch<T>& scratch) const {
    const Nest nest = nest_of(cover_, cell, scratch.steps.data());
    const int inner = nest.depth - 1;
    for (int64_t k = 0; k < cell.count; ++k) {
      scratch.bases[k] = part_at(cell, k);
      scratch.run_strides[k] = nest.step(k + 1, inner);
      scratch.shares[k] = static_cast<Acc<T>>(cover_.share(cell, k));
    }
    int64_t iterations = 1;
    for (int loop = 0; loop < inner; ++loop) iterations *= nest.sizes[loop];
    const int64_t runs = (nest.length() + nest.cut - 1) / nest.cut * iterations;
    Run<T> run{nullptr, nest.step(0, inner), 0, cell.count, scratch.parts.data(), scratch.run_strides.data(),
               scratch.shares.data(), 0};
    for (int64_t i = runs * share / of; i < runs * (share + 1) / of; ++i) {
      const int64_t begin = i / iterations * nest.cut;
      run.length = std::min(nest.cut, nest.length() - begin);
      point(nest, i % iterations, begin, out_at(cell), cell.count, scratch, run);
      blend_run_(run);
    }
  }

  // Moves a run's pointers to an iteration of the loops around the innermost, and to a position in the innermost.
  static void point(const Nest& nest, int64_t iteration, int64_t begin, T* out, int64_t count, Scratch<T>& scratch,
                    Run<T>& run) {
    const int inner = nest.depth - 1;
    Shape index;
    for (int loop = inner - 1; loop >= 0; --loop) {
      index[loop] = iteration % nest.sizes[loop];
      iteration /= nest.sizes[loop];
    }
    index[inner] = begin;
    const auto offset = [&](int64_t operand) {
      int64_t sum = 0;
      for (int loop = 0; loop <= inner; ++loop) sum += index[loop] * nest.step(operand, loop);
      return sum;
    };
    run.out = out + offset(0);
    for (int64_t k = 0; k < count; ++k) scratch.parts[k] = scratch.bases[k] + offset(k + 1);
  }

  // Channels that lie behind one another at each pixel, next to the next pixel's, in every operand: then a row of
  // pixels is one run. Otherwise 1.
  int64_t joined_channels() const {
    const int64_t channels = cover_.out_shape[kChannel];
    const auto joined = [&](const Shape& s) { return (channels == 1 || s[kChannel] == 1) && s[kWidth] == channels; };
    const bool all = std::all_of(cover_.windows.begin(), cover_.windows.end(),
                                 [&](const Window& window) { return joined(window.strides); });
    return all && joined(cover_.out_strides) ? channels : 1;
  }

  // As constant_part, where each position has shares of its own: they are worked out once for each row of pixels.
  void varying_part(const Cell& cell, int64_t share, int64_t of, Scratch<T>& scratch) const {
    const int64_t rows = cell.size[0] * cell.size[1];
    for (int64_t k = 0; k < cell.count; ++k) {
      scratch.run_strides[k] = joined_ > 1 ? 1 : cover_.window(cell, k).strides[kWidth];
    }
    Run<T> run{nullptr, joined_ > 1 ? 1 : cover_.out_strides[kWidth], cell.size[2] * joined_, cell.count,
               scratch.parts.data(), scratch.run_strides.data(), scratch.shares.data(), cell.size[2] * joined_};
    for (int64_t row = rows * share / of; row < rows * (share + 1) / of; ++row) {
      const Shape pixel{0, 0, row / cell.size[1], row % cell.size[1], 0};
      shares_of_row(cell, pixel, scratch);
      for (int64_t b = 0; b < cover_.out_shape[kBatch]; ++b) {
        for (int64_t c = 0; c < cover_.out_shape[kChannel]; c += joined_) {
          const auto offset = [&](const Shape& s) {
            return b * s[kBatch] + c * s[kChannel] + pixel[kTime] * s[kTime] + pixel[kHeight] * s[kHeight];
          };
          run.out = out_at(cell) + offset(cover_.out_strides);
          for (int64_t k = 0; k < cell.count; ++k) {
            scratch.parts[k] = part_at(cell, k) + offset(cover_.window(cell, k).strides);
          }
          blend_run_(run);
        }
      }
    }
  }

  void shares_of_row(const Cell& cell, const Shape& pixel, Scratch<T>& scratch) const {
    const int64_t width = cell.size[2];
    double* total = scratch.weights.data();
    std::fill(total, total + width, 0.0);
    for (int64_t k = 0; k < cell.count; ++k) {
      const std::array<int64_t, kBlended>& start = cover_.window(cell, k).start;
      const double time = cover_.weights[0][cell.low[0] + pixel[kTime] - start[0]];
      const double height = cover_.weights[1][cell.low[1] + pixel[kHeight] - start[1]];
      const double* along = cover_.weights[2].data() + cell.low[2] - start[2];
      double* weights = total + (k + 1) * width;
      for (int64_t x = 0; x < width; ++x) total[x] += weights[x] = blend_weight(time, height, along[x]);
    }
    Acc<T>* share = scratch.shares.data();
    for (int64_t k = 0; k < cell.count; ++k) {
      for (int64_t x = 0; x < width; ++x) {
        const double value = total[(k + 1) * width + x] / total[x];
        for (int64_t i = 0; i < joined_; ++i) *share++ = static_cast<Acc<T>>(value);
      }
    }
  }

  const Cover& cover_;
  const RunFunction<T> blend_run_;
  const int64_t joined_;
  std::vector<int64_t> pieces_{0};  // of the cells before each cell
  std::vector<Scratch<T>> scratch_;
  int64_t threads_;
};

template <class T> void blend(const Cover& cover, int64_t num_threads) { Blend<T>(cover, num_threads).run(); }

void blend(const Cover& cover, int64_t num_threads) {
  switch (cover.dtype) {
    case LF_FLOAT32: return blend<float>(cover, num_threads);
    case LF_FLOAT64: return blend<double>(cover, num_threads);
    case LF_FLOAT16: return blend<Half>(cover, num_threads);
    case LF_BFLOAT16: return blend<BFloat16>(cover, num_threads);
  }
}

}  // namespace
}  // namespace lf

lf_status lf_blend_windows_cpu(lf_dtype dtype, int64_t num_windows, const void* const* windows, const int64_t* shapes,
                               const int64_t* strides, int32_t axes, const int64_t* starts, const double* weights,
                               void* out, const int64_t* out_shape, const int64_t* out_strides,
                               int32_t num_threads) noexcept {
  return lf::guarded([&]() -> lf_status {
    lf::Cover cover;
    const lf_status status = lf::plan_cover(
        {dtype, num_windows, windows, shapes, strides, axes, starts, weights, out, out_shape, out_strides}, cover);
    if (status != LF_OK) return status;
    if (num_threads < 1) return LF_INVALID_ARGUMENT;
    if (!cover.empty()) lf::blend(cover, num_threads);
    return LF_OK;
  });
}
