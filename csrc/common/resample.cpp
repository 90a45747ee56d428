// Fixed taps on a CPU: a clip is taken apart into stretches of rows, and they go to threads.
#include "common/resample.h"

#include <type_traits>

#include "common/parallel.h"
#include "common/per_channel.h"
#include "common/processor.h"
#include "common/resample_kernel.h"

namespace lf {

template <class T> ResampleKernels<T> resample_kernels_portable() noexcept { return resample_kernels<T>(); }

namespace {

constexpr int64_t kPieceElements = 1 << 15;  // what a thread takes at a time
constexpr int64_t kStreamedBytes = 1 << 24;  // from where results are written past the caches

template <class T> ResampleKernels<T> kernels_here() {
#if defined(LF_WITH_AVX2)
  if (has_avx512()) return resample_kernels_avx512<T>();
  if (has_avx2()) return resample_kernels_avx2<T>();
#endif
  return resample_kernels_portable<T>();
}

Range range_of(const Gather& gather, const ResizedAxis& axis, int64_t place) {
  return gather.to_coarse ? gather.fine_of(axis, place) : gather.coarse_of(axis, place);
}

template <class A> A weight_of(const Gather& gather, const ResizedAxis& axis, int64_t place, int64_t tap) {
  const int64_t coarse = gather.to_coarse ? place : tap, fine = gather.to_coarse ? tap : place;
  if constexpr (std::is_same_v<A, double>) return gather.full(axis, coarse, fine);
  else return gather.single(axis, coarse, fine);
}

int64_t count_elements(const Sizes& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

int64_t offset_of(const lf_clip& clip, const Sizes& at) {
  int64_t offset = 0;
  for (int axis = 0; axis < kAxes; ++axis) offset += at[axis] * clip.strides[axis];
  return offset;
}

// Whether all results are whole lines of memory, and more than a core's caches hold: reading them there before they are
// overwritten would cost as much as writing.
bool can_stream(const Resample& r, int64_t element_size) {
  const auto whole = [&](int64_t elements) { return elements % (kLine / element_size) == 0; };
  bool lines = reinterpret_cast<uintptr_t>(r.to.data) % kLine == 0 && whole(r.to_shape[kChannel]);
  for (int axis = 0; axis < kAxes; ++axis) {
    lines = lines && (axis == kChannel || r.to_shape[axis] == 1 || whole(r.to.strides[axis]));
  }
  return lines && count_elements(r.to_shape) >= kStreamedBytes / element_size;
}

// By tables of taps. What lies behind one another is taken in vectors: channels, or else rows that stay as they are.
template <class T> class Resampling {
 public:
  Resampling(const Resample& resample, const Gather& gather)
      : r_(resample), gather_(gather), kernels_(kernels_here<T>()) {
    arrange();
    streams_ = channels_ > 1 && can_stream(r_, sizeof(T));
    copies_ = copies(0) && copies(1) && copies(2);
  }

  void run(int64_t num_threads) const {
    const ResizedAxis& axis = r_.axes[2];
    const int64_t most = (kMostSteps - axis.factor - 2) / axis.factor;  // a result may be of half its neighbours' samples
    Steps steps;
    for (int64_t begin = 0; begin < axis.coarse; begin += most) {
      find_steps(begin, std::min(begin + most, axis.coarse), steps);
      do_rows(steps, num_threads);
    }
  }

 private:
  using A = Acc<T>;

  struct Steps {
    Step<A> list[kMostSteps];
    int64_t size, low, end;
  };

  // Where on T and H taps are known of.
  struct Place {
    int64_t t_at = -1, h_at = -1;
    Terms<A> t, h;
  };

  bool dense(int axis) const { return r_.from.strides[axis] == 1 && r_.to.strides[axis] == 1; }

  // Has as much as there is of a clip lie on the channels' axis, where elements are behind one another.
  void arrange() {
    Sizes &from = r_.from_shape, &to = r_.to_shape;
    int64_t *from_strides = r_.from.strides, *to_strides = r_.to.strides;
    const bool kept = r_.axes[2].factor == 1;
    if (kept && (to[kChannel] == 1 || !dense(kChannel)) && dense(kWidth)) {
      for (int64_t* x : {from.data(), to.data(), from_strides, to_strides}) std::swap(x[kChannel], x[kWidth]);
    }
    if (kept && dense(kChannel) && from_strides[kWidth] == to[kChannel] && to_strides[kWidth] == to[kChannel]) {
      to[kChannel] *= to[kWidth], from[kChannel] *= to[kWidth], to[kWidth] = from[kWidth] = 1;
    }
    r_.axes[2].coarse = std::min(from[kWidth], to[kWidth]);
    channels_ = dense(kChannel) ? to[kChannel] : 1;
  }

  // Results along an axis for one place of the coarse side.
  int64_t phases(int axis) const { return gather_.to_coarse ? 1 : r_.axes[axis].factor; }

  Range range(int axis, int64_t place) const {
    return range_of(gather_, r_.axes[axis], place);
  }

  // Whether each result is one sample, or none.
  bool copies(int axis) const {
    for (int64_t place = 0; place < phases(axis); ++place) {
      const Range taps = range(axis, place);
      if (taps.end - taps.first > 1) return false;
      if (taps.first < taps.end && weight(axis, place, taps.first) != 1) return false;
    }
    return true;
  }

  A weight(int axis, int64_t place, int64_t tap) const { return weight_of<A>(gather_, r_.axes[axis], place, tap); }

  void find_terms(int axis, int64_t place, int64_t& known, Terms<A>& terms) const {
    if (place == known) return;
    known = place;
    const Range taps = range(axis, place);
    terms.first = taps.first, terms.count = taps.end - taps.first;
    for (int64_t i = 0; i < terms.count; ++i) terms.weights[i] = weight(axis, place, taps.first + i);
  }

  // For the coarse places [begin, end) along W.
  void find_steps(int64_t begin, int64_t end, Steps& steps) const {
    const ResizedAxis& axis = r_.axes[2];
    int64_t fine = axis.factor * begin, fine_end = axis.factor * end;
    if (gather_.to_coarse) fine = gather_.fine_of(axis, begin).first, fine_end = gather_.fine_of(axis, end - 1).end;
    steps.size = 0, steps.low = INT64_MAX, steps.end = INT64_MIN;
    for (; fine < fine_end; ++fine) {
      Range coarse = gather_.coarse_of(axis, fine);
      if (gather_.to_coarse) coarse = {std::max(coarse.first, begin), std::min(coarse.end, end)};
      const int64_t count = std::max<int64_t>(coarse.end - coarse.first, 0);
      if (gather_.to_coarse && count == 0) continue;
      Step<A>& step = steps.list[steps.size++] = {fine, coarse.first, count, {}};
      for (int64_t k = 0; k < count; ++k) {
        step.weights[k] = gather_.to_coarse ? weight(2, coarse.first + k, fine) : weight(2, fine, coarse.first + k);
      }
      if (count == 0) continue;
      steps.low = std::min(steps.low, gather_.to_coarse ? fine : coarse.first);
      steps.end = std::max(steps.end, gather_.to_coarse ? fine + 1 : coarse.end);
    }
  }

  void do_rows(const Steps& steps, int64_t num_threads) const {
    const int64_t groups = r_.to_shape[kBatch] * (r_.to_shape[kChannel] / channels_) * r_.axes[0].coarse * r_.axes[1].coarse;
    const int64_t elements = std::max(count_elements(r_.from_shape), count_elements(r_.to_shape));
    const int64_t groups_at_once = std::max<int64_t>(1, kPieceElements / (elements / groups));
    const int64_t threads = std::clamp<int64_t>(elements / elements_worth_a_thread(), 1, num_threads);
    for_each_piece((groups + groups_at_once - 1) / groups_at_once, threads, [&](int64_t, int64_t piece) {
      Place place;
      const int64_t begin = piece * groups_at_once, end = std::min(begin + groups_at_once, groups);
      for (int64_t group = begin; group < end; ++group) do_group(group, steps, place);
      if (streams_) kernels_.end_streams();
    });
  }

  // All rows of results for one row of the coarse side.
  void do_group(int64_t group, const Steps& steps, Place& place) const {
    Sizes at{};
    const auto next = [&](int64_t size) {
      const int64_t index = group % size;
      group /= size;
      return index;
    };
    const int64_t h = next(r_.axes[1].coarse), t = next(r_.axes[0].coarse);
    at[kChannel] = next(r_.to_shape[kChannel] / channels_), at[kBatch] = group;
    Row<T> row;
    row.from = static_cast<const T*>(r_.from.data) + offset_of(r_.from, at);
    row.frame = r_.from.strides[kTime], row.row = r_.from.strides[kHeight], row.pixel = r_.from.strides[kWidth];
    row.to_pixel = r_.to.strides[kWidth], row.channels = channels_, row.streams = streams_;
    row.t = &place.t, row.h = &place.h;
    row.steps = steps.list, row.num_steps = steps.size, row.low = steps.low, row.end = steps.end;
    for (int64_t i = 0; i < phases(0); ++i) {
      at[kTime] = t * phases(0) + i;
      find_terms(0, at[kTime], place.t_at, place.t);
      for (int64_t j = 0; j < phases(1); ++j) {
        at[kHeight] = h * phases(1) + j;
        find_terms(1, at[kHeight], place.h_at, place.h);
        row.to = static_cast<T*>(r_.to.data) + offset_of(r_.to, at);
        do_row(row);
      }
    }
  }

  void do_row(const Row<T>& row) const {
    const bool none = row.t->count == 0 || row.h->count == 0;
    if (gather_.to_coarse) (copies_ ? kernels_.copy_to_coarse : kernels_.to_coarse)(row);
    else (copies_ || none ? kernels_.copy_to_fine : kernels_.to_fine)(row);
  }

  Resample r_;
  const Gather& gather_;
  const ResampleKernels<T> kernels_;
  int64_t channels_;
  bool streams_, copies_;
};

// Of factors too large for tables: each element by itself.
template <class T> void resample_plain(const Resample& r, const Gather& gather, int64_t num_threads) {
  using A = Acc<T>;
  const auto value = [&](const Sizes& at, int axis, int64_t offset, const auto& inner_value) -> A {
    if (axis < kTime) return widen(static_cast<const T*>(r.from.data)[offset]);
    const ResizedAxis& resized = r.axes[axis - kTime];
    const Range range = range_of(gather, resized, at[axis]);
    A sum = 0;
    for (int64_t i = range.first; i < range.end; ++i) {
      const A inner = inner_value(at, axis - 1, offset + i * r.from.strides[axis], inner_value);
      const A term = weight_of<A>(gather, resized, at[axis], i) * inner;
      sum = i == range.first ? term : sum + term;
    }
    return sum;
  };
  for_each_piece(count_elements(r.to_shape), num_threads, [&](int64_t, int64_t element) {
    Sizes at;
    for (const int axis : {kChannel, kWidth, kHeight, kTime, kBatch}) {
      at[axis] = element % r.to_shape[axis];
      element /= r.to_shape[axis];
    }
    const int64_t start = at[kBatch] * r.from.strides[kBatch] + at[kChannel] * r.from.strides[kChannel];
    static_cast<T*>(r.to.data)[offset_of(r.to, at)] = narrow<T>(value(at, kWidth, start, value));
  });
}

}  // namespace

void resample_cpu(const Resample& r, const Gather& gather, int64_t num_threads) {
  const bool tables = std::all_of(r.axes, r.axes + 3, [](const ResizedAxis& a) { return a.factor <= kMostFactor; });
  with_type(r.dtype, [&](auto element) {
    using T = decltype(element);
    if (tables) Resampling<T>(r, gather).run(num_threads);
    else resample_plain<T>(r, gather, num_threads);
  });
}

}  // namespace lf
