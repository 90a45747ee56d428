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
// Of samples; each part sums the columns at its ends again, of which results going up have a larger share.
constexpr int64_t kPartBytesDown = 32 << 10, kPartBytesUp = 64 << 10;
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

template <class A> A weight_of(const Gather& gather, const ResizedAxis& axis, int64_t coarse, int64_t fine) {
  if constexpr (std::is_same_v<A, double>) return gather.full(axis, coarse, fine);
  else return gather.single(axis, coarse, fine);
}

// Of the side that is read, for a place of the one that is written.
template <class A> A tap_weight(const Gather& gather, const ResizedAxis& axis, int64_t place, int64_t tap) {
  return gather.to_coarse ? weight_of<A>(gather, axis, place, tap) : weight_of<A>(gather, axis, tap, place);
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
    find_alike();
    streams_ = channels_ > 1 && can_stream(r_, sizeof(T));
    frames_first_ = range(0, phases(0)).first < range(0, phases(0) - 1).end;
    copies_ = copies(0) && copies(1) && copies(2);
  }

  void run(int64_t num_threads) const {
    Steps steps;
    for (int64_t begin = 0; begin < r_.axes[2].coarse;) {
      begin = find_steps(begin, steps);
      do_rows(steps, num_threads);
    }
  }

 private:
  using A = Acc<T>;

  // Along W, in parts.
  struct Steps {
    Step<A> list[kMostSteps];
    Part<A> parts[kMostSteps];
    int64_t num_parts;
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

  A weight(int axis, int64_t place, int64_t tap) const { return tap_weight<A>(gather_, r_.axes[axis], place, tap); }

  void find_terms(int axis, int64_t place, int64_t& known, Terms<A>& terms) const {
    if (place == known) return;
    known = place;
    const Range taps = range(axis, place);
    terms.first = taps.first, terms.count = taps.end - taps.first;
    for (int64_t i = 0; i < terms.count; ++i) terms.weights[i] = weight(axis, place, taps.first + i);
  }

  // Only the first and the last of the coarse places have results that are unlike the others'.
  void find_alike() {
    const int64_t coarse = r_.axes[2].coarse, bounds[]{0, 1, std::max<int64_t>(coarse - 1, 1), coarse};
    A* weights = across_.weights;
    across_.factor = r_.axes[2].factor, across_.size = 0;
    for (int i = 0; i < 3; ++i) {
      const int64_t begin = bounds[i], end = bounds[i + 1], step = r_.axes[2].factor / phases(2);
      for (int64_t phase = 0; phase < phases(2) && begin < end; ++phase) {
        const int64_t place = begin * phases(2) + phase;
        const Range taps = range(2, place);
        across_.list[across_.size++] = {begin, end, phase, taps.first - begin * step, taps.end - taps.first, weights};
        for (int64_t tap = taps.first; tap < taps.end; ++tap) *weights++ = weight(2, place, tap);
      }
    }
  }

  // Where channels are taken in several goes, of each part so many coarse places that what is read of them stays in the
  // nearest caches.
  int64_t part_size() const {
    const int64_t factor = r_.axes[2].factor;
    const int64_t most = (kMostSteps - 2) / factor - 1;  // results may be of samples beside their own
    if (channels_ <= kernels_.channels_at_once) return most;
    const int64_t samples = gather_.to_coarse ? r_.axes[0].factor * r_.axes[1].factor * factor : 4;
    const int64_t bytes = gather_.to_coarse ? kPartBytesDown : kPartBytesUp;
    return std::clamp<int64_t>(bytes / static_cast<int64_t>(sizeof(T)) / (samples * channels_), 1, most);
  }

  // For the coarse places from `begin` on, as many as there is room for. Returns where it ends.
  int64_t find_steps(int64_t begin, Steps& steps) const {
    const ResizedAxis& axis = r_.axes[2];
    const int64_t size = part_size();
    Step<A>* step = steps.list;
    steps.num_parts = 0;
    while (begin < axis.coarse && steps.list + kMostSteps - step >= (size + 1) * axis.factor + 2) {
      const int64_t end = std::min(begin + size, axis.coarse);
      Part<A>& part = steps.parts[steps.num_parts++] = {step, 0, begin, end, INT64_MAX, INT64_MIN};
      step = gather_.to_coarse ? add_columns(begin, end, part, step) : add_results(begin, end, part, step);
      part.size = step - part.steps;
      begin = end;
    }
    return begin;
  }

  // The columns of samples that the coarse places [begin, end) are made of.
  Step<A>* add_columns(int64_t begin, int64_t end, Part<A>& part, Step<A>* step) const {
    const ResizedAxis& axis = r_.axes[2];
    part.low = gather_.fine_of(axis, begin).first, part.high = gather_.fine_of(axis, end - 1).end;
    for (int64_t fine = part.low; fine < part.high; ++fine) {
      const Range all = gather_.coarse_of(axis, fine), own{std::max(all.first, begin), std::min(all.end, end)};
      if (own.first < own.end) *step++ = step_at(fine, own);
    }
    return step;
  }

  // The results that lie at the coarse places [begin, end).
  Step<A>* add_results(int64_t begin, int64_t end, Part<A>& part, Step<A>* step) const {
    const ResizedAxis& axis = r_.axes[2];
    for (int64_t fine = axis.factor * begin; fine < axis.factor * end; ++fine) {
      const Range coarse = gather_.coarse_of(axis, fine);
      *step++ = step_at(fine, coarse);
      if (coarse.first >= coarse.end) continue;
      part.low = std::min(part.low, coarse.first), part.high = std::max(part.high, coarse.end);
    }
    return step;
  }

  Step<A> step_at(int64_t fine, const Range& coarse) const {
    Step<A> step{fine, coarse.first, coarse.end - coarse.first, {}};
    for (int64_t k = 0; k < step.count; ++k) {
      step.weights[k] = weight_of<A>(gather_, r_.axes[2], coarse.first + k, fine);
    }
    return step;
  }

  void do_rows(const Steps& steps, int64_t num_threads) const {
    const int64_t planes = r_.to_shape[kBatch] * (r_.to_shape[kChannel] / channels_);
    const int64_t groups = planes * r_.axes[0].coarse * r_.axes[1].coarse;
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
    int64_t t = 0, h = 0;
    if (frames_first_) t = next(r_.axes[0].coarse);
    h = next(r_.axes[1].coarse);
    if (!frames_first_) t = next(r_.axes[0].coarse);
    at[kChannel] = next(r_.to_shape[kChannel] / channels_), at[kBatch] = group;
    Row<T> row;
    row.from = static_cast<const T*>(r_.from.data) + offset_of(r_.from, at);
    row.frame = r_.from.strides[kTime], row.row = r_.from.strides[kHeight], row.pixel = r_.from.strides[kWidth];
    row.to_pixel = r_.to.strides[kWidth], row.channels = channels_, row.streams = streams_;
    row.t = &place.t, row.h = &place.h, row.across = &across_;
    for (int64_t i = 0; i < phases(0); ++i) {
      at[kTime] = t * phases(0) + i;
      find_terms(0, at[kTime], place.t_at, place.t);
      for (int64_t j = 0; j < phases(1); ++j) {
        at[kHeight] = h * phases(1) + j;
        find_terms(1, at[kHeight], place.h_at, place.h);
        row.to = static_cast<T*>(r_.to.data) + offset_of(r_.to, at);
        do_row(row, steps);
      }
    }
  }

  void do_row(Row<T>& row, const Steps& steps) const {
    const bool none = row.t->count == 0 || row.h->count == 0;
    const auto kernel = gather_.to_coarse ? (copies_ ? kernels_.copy_to_coarse : kernels_.to_coarse)
                                          : (copies_ || none ? kernels_.copy_to_fine : kernels_.to_fine);
    for (int64_t i = 0; i < steps.num_parts; ++i) {
      row.part = steps.parts[i];
      kernel(row);
    }
  }

  Resample r_;
  const Gather& gather_;
  const ResampleKernels<T> kernels_;
  Across<A> across_;
  int64_t channels_;
  bool streams_, copies_;
  bool frames_first_;  // those next to each other share samples: their rows are to be done one after the other
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
      const A term = tap_weight<A>(gather, resized, at[axis], i) * inner;
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
