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
constexpr int64_t kStreamedBytes = 1 << 21;  // from where results are written past the caches

template <class T> ResampleKernels<T> kernels_here() {
#if defined(LF_WITH_AVX2)
  if (has_avx512()) return resample_kernels_avx512<T>();
  if (has_avx2()) return resample_kernels_avx2<T>();
#endif
  return resample_kernels_portable<T>();
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

// By tables of taps, in vectors over channels where they lie behind one another and in single planes where not.
template <class T> class Resampling {
 public:
  Resampling(const Resample& r, const Gather& gather) : r_(r), gather_(gather), kernels_(kernels_here<T>()) {
    const bool vectors = r.from.strides[kChannel] == 1 && r.to.strides[kChannel] == 1 && r.to_shape[kChannel] > 1;
    channels_ = vectors ? r.to_shape[kChannel] : 1;
    streams_ = vectors && can_stream(r, sizeof(T));
    make_across();
    choose_blocks();
  }

  void run(int64_t num_threads) const {
    const int64_t planes = r_.to_shape[kBatch] * (r_.to_shape[kChannel] / channels_);
    const int64_t groups = planes * r_.axes[0].coarse * r_.axes[1].coarse;
    const int64_t elements = std::max(count_elements(r_.from_shape), count_elements(r_.to_shape));
    const int64_t groups_at_once = std::max<int64_t>(1, kPieceElements / (elements / groups));
    const int64_t threads = std::clamp<int64_t>(elements / elements_worth_a_thread(), 1, num_threads);
    for_each_piece((groups + groups_at_once - 1) / groups_at_once, threads, [&](int64_t, int64_t piece) {
      Place place;
      const int64_t begin = piece * groups_at_once, end = std::min(begin + groups_at_once, groups);
      for (int64_t group = begin; group < end; ++group) do_group(group, place);
      if (streams_) kernels_.end_streams();
    });
  }

 private:
  using A = Acc<T>;
  static constexpr int64_t kScratch = kScratchBytes / sizeof(A);

  // Where on T and H taps are known of.
  struct Place {
    int64_t t_at = -1, h_at = -1;
    Terms<A> t, h;
  };

  // Results along an axis for one place of the coarse side, and samples.
  int64_t phases(int axis) const { return gather_.to_coarse ? 1 : r_.axes[axis].factor; }
  int64_t step(int axis) const { return gather_.to_coarse ? r_.axes[axis].factor : 1; }

  void make_across() {
    w_.groups = r_.axes[2].coarse, w_.phases = phases(2), w_.step = step(2), w_.same = r_.axes[2].factor == 1;
    w_.low = INT64_MAX, w_.end = INT64_MIN;
    const auto make = [&](Group<A>& group, int64_t at) {
      make_group(group, at);
      w_.low = std::min(w_.low, group.low), w_.end = std::max(w_.end, group.end);
    };
    make(w_.first, 0);
    if (w_.groups > 1) make(w_.last, w_.groups - 1);
    if (w_.groups > 2) make(w_.inner, 1);
    w_.gaps = w_.end - w_.low < w_.step;
  }

  void make_group(Group<A>& group, int64_t at) const {
    A* weights = group.storage;
    group.low = INT64_MAX, group.end = INT64_MIN;
    for (int64_t p = 0; p < w_.phases; ++p) {
      const int64_t place = at * w_.phases + p, own = at * w_.step;
      const Range range = gather_.range(r_.axes[2], place);
      group.first[p] = range.first - own, group.count[p] = range.end - range.first, group.weights[p] = weights;
      for (int64_t i = range.first; i < range.end; ++i) *weights++ = weight_of<A>(gather_, r_.axes[2], place, i);
      if (group.count[p] == 0) continue;
      group.low = std::min(group.low, range.first - own), group.end = std::max(group.end, range.end - own);
    }
  }

  // As much of a row at a time as scratch memory has room for.
  void choose_blocks() {
    const int64_t span = w_.end - w_.low, most = kScratch / span;
    channels_at_once_ = channels_ <= most ? channels_ : most / kWhole * kWhole;
    streams_ = streams_ && channels_at_once_ * sizeof(T) % kLine == 0;
    const int64_t pixels = kScratch / channels_at_once_;
    const int64_t fitting = w_.gaps ? pixels / span : (pixels - span) / w_.step + 1;
    const int64_t blocks = (w_.groups + fitting - 1) / fitting;
    groups_at_once_ = (w_.groups + blocks - 1) / blocks;
  }

  // All rows of results for one row of the coarse side.
  void do_group(int64_t group, Place& place) const {
    Sizes at{};
    const auto next = [&](int64_t size) {
      const int64_t index = group % size;
      group /= size;
      return index;
    };
    const int64_t h = next(r_.axes[1].coarse), t = next(r_.axes[0].coarse);
    at[kChannel] = next(r_.to_shape[kChannel] / channels_), at[kBatch] = group;
    Stretch<T> s;
    s.from = static_cast<const T*>(r_.from.data) + offset_of(r_.from, at);
    s.frame = r_.from.strides[kTime], s.row = r_.from.strides[kHeight], s.pixel = r_.from.strides[kWidth];
    s.to_pixel = r_.to.strides[kWidth];
    s.t = &place.t, s.h = &place.h, s.w = &w_;
    for (int64_t i = 0; i < phases(0); ++i) {
      at[kTime] = t * phases(0) + i;
      find_terms(0, at[kTime], place.t_at, place.t);
      for (int64_t j = 0; j < phases(1); ++j) {
        at[kHeight] = h * phases(1) + j;
        find_terms(1, at[kHeight], place.h_at, place.h);
        s.to = static_cast<T*>(r_.to.data) + offset_of(r_.to, at);
        do_row(s);
      }
    }
  }

  void find_terms(int axis, int64_t place, int64_t& known, Terms<A>& terms) const {
    if (place == known) return;
    known = place;
    const Range range = gather_.range(r_.axes[axis], place);
    terms.first = range.first, terms.count = range.end - range.first;
    for (int64_t i = 0; i < terms.count; ++i) {
      terms.weights[i] = weight_of<A>(gather_, r_.axes[axis], place, range.first + i);
    }
    terms.alone = terms.count == 1 && terms.weights[0] == 1;
  }

  void do_row(Stretch<T> s) const {
    const auto kernel = streams_ ? kernels_.streaming : kernels_.storing;
    for (int64_t c = 0; c < channels_; c += channels_at_once_) {
      s.channels = std::min(channels_at_once_, channels_ - c);
      for (s.begin = 0; s.begin < w_.groups; s.begin = s.end) {
        s.end = std::min(s.begin + groups_at_once_, w_.groups);
        kernel(s);
      }
      s.from += s.channels, s.to += s.channels;
    }
  }

  static constexpr int64_t kWhole = 16;  // channels are cut at multiples of it

  const Resample& r_;
  const Gather& gather_;
  const ResampleKernels<T> kernels_;
  int64_t channels_, channels_at_once_, groups_at_once_;
  bool streams_;
  Across<A> w_;
};

// Of factors too large for tables: each element by itself.
template <class T> void resample_plain(const Resample& r, const Gather& gather, int64_t num_threads) {
  using A = Acc<T>;
  const auto value = [&](const Sizes& at, int axis, int64_t offset, const auto& inner_value) -> A {
    if (axis < kTime) return widen(static_cast<const T*>(r.from.data)[offset]);
    const ResizedAxis& resized = r.axes[axis - kTime];
    const Range range = gather.range(resized, at[axis]);
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
