// denoise_step on a CPU: in one walk over the video, and for a dynamic threshold a few more that find its quantile. Where
// what has one threshold is small they are over its x0 alone, which the first one leaves in the cache.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <limits>
#include <vector>

#include "common/cover.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/processor.h"
#include "common/runs.h"
#include "denoise_step_run.h"

namespace lf {
namespace {

template <class A> const StepKernels<A>& kernels() {
#if defined(LF_WITH_AVX2)
  if (has_avx2()) return step_kernels_avx2<A>();
#endif
  return kStepKernels<A>;
}

// What one threshold is for: a clip, a frame, or all there is.
struct Unit {
  int64_t first_box, end_box, elements = 0;
};

// The linearly interpolated quantile lies between two neighbours in ascending order.
template <class A> struct Place {
  int64_t from_top;  // the lower one's place in descending order, from 1
  A fraction;        // of the way to the upper one

  Place(double percentile, int64_t elements) {
    const double position = percentile * static_cast<double>(elements - 1), below = std::floor(position);
    from_top = elements - static_cast<int64_t>(below);
    fraction = static_cast<A>(position - below);
  }

  A between(A lower, A upper) const {  // as torch.lerp has it, infinities too
    return fraction < static_cast<A>(0.5) ? lower + fraction * (upper - lower)
                                          : upper - (upper - lower) * (1 - fraction);
  }
};

template <class A> A value_of(Key<A> key) {
  A value;
  memcpy(&value, &key, sizeof value);
  return value;
}

// The keys that a walk keeps: all are counted, and those there is room for stay.
template <class K> class Kept {
 public:
  explicit Kept(int64_t room) : room_(room), keys_(room) {}

  void clear() { size_ = 0, least_ = std::numeric_limits<K>::max(), most_ = -1; }
  int64_t size() const { return size_; }
  K least() const { return least_; }
  K most() const { return most_; }
  bool complete() const { return size_ <= room_; }
  K* begin() const { return keys_.get(); }
  K* end() const { return begin() + std::min<int64_t>(size_, room_); }

  static void add(void* kept, const K* keys, int64_t n) {
    Kept& to = *static_cast<Kept*>(kept);
    const int64_t at = to.size_.fetch_add(n);
    if (at < to.room_) std::copy_n(keys, std::min(n, to.room_ - at), to.begin() + at);
    K least = keys[0], most = keys[0];
    for (int64_t i = 1; i < n; ++i) least = std::min(least, keys[i]), most = std::max(most, keys[i]);
    for (K known = to.least_; least < known && !to.least_.compare_exchange_weak(known, least);) {
    }
    for (K known = to.most_; most > known && !to.most_.compare_exchange_weak(known, most);) {
    }
  }

 private:
  const int64_t room_;
  Buffer<K> keys_;
  std::atomic<int64_t> size_{0};
  std::atomic<K> least_{std::numeric_limits<K>::max()}, most_{-1};
};

constexpr int64_t kLeastRoom = 1 << 15, kMostRoom = 1 << 20;  // keys that are kept, 1 / kRoomShare of a unit's between
constexpr int64_t kRoomShare = 32;
constexpr int64_t kSmallUnit = 1 << 12;  // of so few elements no sample is taken
constexpr int64_t kMostHeld = 1 << 18;   // and of at most so many x0 is held
constexpr int64_t kHeldPiece = 1 << 15;

template <class A> class DenoiseStep {
 public:
  using K = Key<A>;

  DenoiseStep(const lf_denoise_step& call, const Cover& cover, const StepSettings<A>& settings, int64_t num_threads)
      : call_(call), cover_(cover), settings_(settings), kernels_(kernels<A>()) {
    cut();
    const int64_t elements = cover.out_shape[kBatch] * cover.out_shape[kChannel] * cover.out_shape[kTime] *
                             cover.out_shape[kHeight] * cover.out_shape[kWidth];
    threads_ = std::clamp<int64_t>(elements / elements_worth_a_thread(), 1, num_threads);
    std::vector<Clip> clips;
    const lf_clip* const given[kStepClips] = {&call.next, &call.x0, &call.latent, &call.history, &call.noise};
    const bool read[kStepClips] = {true, true, true, settings.reads_history, settings.reads_noise};
    for (int i = 0; i < kStepClips; ++i) {
      const lf_clip& clip = read[i] ? *given[i] : call.latent;
      clips.push_back({static_cast<char*>(clip.data), settings.size, {}});
      std::copy_n(clip.strides, kAxes, clips.back().strides.begin());
    }
    for (int64_t i = 0; i < threads_; ++i) walks_.emplace_back(cover, clips);
  }

  void run() {
    if (!dynamic()) return apply({&units_[0], 0, threads_}, call_.bound == LF_BOUND_STATIC ? 1 : 0, nullptr);
    const int64_t units = units_.size();
    // Where there are units enough for the threads each takes whole ones, which are then still in its cache when they
    // are walked over again; else the threads share a unit.
    const bool apart = units % threads_ == 0 || units >= 4 * threads_;
    const int64_t room = std::clamp(units_[0].elements / kRoomShare, kLeastRoom, kMostRoom);
    std::deque<Scratch> scratch;  // of as many units as are searched at a time
    for (int64_t i = 0; i < (apart ? threads_ : 1); ++i) scratch.emplace_back(room, units_[0].elements);
    for_each_piece(units, apart ? threads_ : 1, [&](int64_t worker, int64_t unit) {
      Search search{{&units_[unit], worker, apart ? 1 : threads_}, scratch[worker].kept, scratch[worker].x0.get()};
      if (search.x0) predict(search);
      apply(search.part, limit(search), search.x0);
    });
  }

 private:
  // A unit, and who walks over it: so many threads, or a single one, with the scratch memory of `worker`.
  struct Part {
    const Unit* unit;
    int64_t worker, threads;
  };

  struct Scratch {
    Scratch(int64_t room, int64_t elements) : kept(room) {
      if (elements <= kMostHeld) x0 = Buffer<A>(elements);
    }
    Kept<K> kept;
    Buffer<A> x0;  // of the whole unit, where that is small
  };

  // For the threshold of one unit.
  struct Search {
    Part part;
    Kept<K>& kept;
    A* x0;  // null where it is not held
  };

  bool dynamic() const { return call_.bound == LF_BOUND_CLIP || call_.bound == LF_BOUND_FRAME; }

  void cut() {
    if (!dynamic()) {
      units_.push_back({0, 0});
      for (const Cell& cell : cover_.cells) add_box(whole(cover_, cell));
      return;
    }
    const int64_t frames = cover_.out_shape[kTime], length = call_.bound == LF_BOUND_FRAME ? 1 : frames;
    for (int64_t clip = 0; clip < cover_.out_shape[kBatch]; ++clip) {
      for (int64_t frame = 0; frame < frames; frame += length) {
        units_.push_back({static_cast<int64_t>(boxes_.size()), 0});
        for (const Cell& cell : cover_.cells) {
          Box box = whole(cover_, cell);
          const int64_t end = std::min(frame + length, box.low[kTime] + box.shape[kTime]);
          box.low[kBatch] = clip;
          box.low[kTime] = std::max(frame, box.low[kTime]);
          box.shape[kBatch] = 1;
          box.shape[kTime] = end - box.low[kTime];
          if (box.shape[kTime] > 0) add_box(box);
        }
      }
    }
  }

  void add_box(const Box& box) {
    boxes_.push_back(box);
    places_.push_back(units_.back().elements);
    pieces_.push_back(pieces_.back() + box.pieces());
    units_.back().end_box = boxes_.size();
    units_.back().elements += box.elements();
  }

  // Calls work(runs) for all pieces of a part, with runs(each) to call each(run, its place in the unit).
  template <class Work> void over(const Part& part, const Work& work) {
    const int64_t first = pieces_[part.unit->first_box];
    for_each_piece(pieces_[part.unit->end_box] - first, part.threads, [&](int64_t member, int64_t index) {
      const int64_t piece = first + index;
      const int64_t box = std::upper_bound(pieces_.begin(), pieces_.end(), piece) - pieces_.begin() - 1;
      work([&](const auto& each) {
        walks_[part.threads > 1 ? member : part.worker].each_run(
            boxes_[box], piece - pieces_[box], pieces_[box + 1] - pieces_[box],
            [&](const Run<A>& run) { each(run, places_[box] + run.place); });
      });
    });
  }

  // `limit`: 0 for none. `x0`: the unit's, not bounded, which is written over; null where it is not held.
  void apply(const Part& part, A limit, A* x0) {
    over(part, [&](const auto& runs) {
      runs([&](const Run<A>& run, int64_t place) {
        kernels_.step(run, settings_, limit == 0 ? nullptr : &limit, x0 ? x0 + place : nullptr);
      });
    });
  }

  void predict(const Search& in) {
    over(in.part, [&](const auto& runs) {
      runs([&](const Run<A>& run, int64_t place) { kernels_.predict(run, settings_, in.x0 + place); });
    });
  }

  // The number of keys above `high`; those in (low, high] are kept.
  int64_t count(const Search& in, K low, K high, int64_t every = 1) {
    std::atomic<int64_t> above{0};
    in.kept.clear();
    const auto counted = [&](const auto& work) {
      Count<A> found{low, high, every, 0, 0, &Kept<K>::add, &in.kept};
      work(found);
      above += found.above;
    };
    if (in.x0) {
      const int64_t elements = in.part.unit->elements;
      for_each_piece((elements + kHeldPiece - 1) / kHeldPiece, in.part.threads, [&](int64_t, int64_t piece) {
        const int64_t begin = piece * kHeldPiece, n = std::min(kHeldPiece, elements - begin);
        counted([&](Count<A>& found) { kernels_.count_predicted(in.x0 + begin, n, found); });
      });
    } else {
      over(in.part, [&](const auto& runs) {
        counted([&](Count<A>& found) {
          runs([&](const Run<A>& run, int64_t) { kernels_.count(run, settings_, found); });
        });
      });
    }
    return above;
  }

  // max(quantile, 1) of a unit, exactly. The key of the lower neighbour is looked for in a bracket, which a sample
  // suggests: what lies above is counted, and what lies within is kept and selected from. A bracket that missed, or
  // held too much, is followed by others that bisect what is left; most often the first one does.
  A limit(const Search& in) {
    const Place<A> place(call_.percentile, in.part.unit->elements);
    K below = kOne - 1, least_above = kMost;  // the key is in (below, least_above]; all at most 1 count as equal
    Bracket trial = suggested(in, place.from_top);
    for (;;) {
      const int64_t above = count(in, trial.low, trial.high), over_low = above + in.kept.size();
      bool missed = true;
      if (place.from_top <= above) {
        below = trial.high;
      } else if (place.from_top <= over_low) {
        if (in.kept.complete()) return at_least_one(selected(in, place, above));
        below = trial.low, least_above = trial.high;
        missed = false;
      } else if (trial.low > kOne) {
        least_above = trial.low;
      } else {
        return at_least_one(from_below_one(in, place, over_low));
      }
      if (least_above - below == 1) return at_least_one(with_upper(in, place, least_above));
      trial = {std::max(missed ? below : below + (least_above - below) / 2, kOne), least_above};
    }
  }

  struct Bracket {
    K low, high;  // (low, high], with low >= kOne
  };

  // Around the key's place in a sample, three standard deviations to each side.
  Bracket suggested(const Search& in, int64_t from_top) {
    const int64_t elements = in.part.unit->elements;
    if (elements <= kSmallUnit) return {kOne, kMost};
    const int64_t size = std::min(elements / kRoomShare, std::max<int64_t>(kLeastRoom, elements / 512));
    count(in, -1, kMost, elements / size);
    const double taken = static_cast<double>(in.kept.end() - in.kept.begin());
    const double share = static_cast<double>(from_top) / static_cast<double>(elements);
    const double expected = share * taken, reach = 3 * std::sqrt(expected * (1 - share)) + 4;
    const auto low_place = static_cast<int64_t>(std::ceil(expected + reach));
    const auto high_place = static_cast<int64_t>(expected - reach);
    if (low_place > taken) return {kOne, kMost};
    const K low = std::max<K>(select(in.kept, low_place) - 1, kOne);
    if (high_place < 1) return {low, kMost};
    return {low, std::max<K>(select(in.kept, high_place), low + 1)};
  }

  // The quantile, whose lower neighbour is among those kept; `above` are over them.
  A selected(const Search& in, const Place<A>& place, int64_t above) {
    const int64_t from_top = place.from_top - above;
    const K lower = select(in.kept, from_top);
    if (from_top == 1 && above > 0) return with_upper(in, place, lower);
    const K upper = from_top == 1 ? lower : select(in.kept, from_top - 1);
    return place.between(value_of<A>(lower), value_of<A>(upper));
  }

  K select(const Kept<K>& kept, int64_t from_top) const {
    return kernels_.select(kept.begin(), kept.end() - kept.begin(), from_top);
  }

  // The quantile, or 1 where it is not over 1, from a lower neighbour that is not; `over_one` are.
  A from_below_one(const Search& in, const Place<A>& place, int64_t over_one) {
    if (place.from_top == 1 || place.from_top - 1 > over_one) return 1;  // nor is the upper one
    count(in, -1, kOne);
    return with_upper(in, place, in.kept.most());
  }

  // The quantile from its lower neighbour alone.
  A with_upper(const Search& in, const Place<A>& place, K lower) {
    if (place.from_top == 1) return value_of<A>(lower);
    count(in, lower, kMost);
    const K upper = in.kept.size() == place.from_top - 1 ? in.kept.least() : lower;
    return place.between(value_of<A>(lower), value_of<A>(upper));
  }

  static A at_least_one(A quantile) { return quantile <= 1 ? 1 : quantile; }  // a NaN stays one

  static constexpr K kMost = std::numeric_limits<K>::max();
  static constexpr K kOne = sizeof(A) == 4 ? K{0x3f800000} : static_cast<K>(0x3ff0000000000000);

  const lf_denoise_step& call_;
  const Cover& cover_;
  const StepSettings<A> settings_;
  const StepKernels<A>& kernels_;
  std::vector<Unit> units_;
  std::vector<Box> boxes_;
  std::vector<int64_t> places_;     // of each box's first element in its unit
  std::vector<int64_t> pieces_{0};  // of the boxes before each box
  std::vector<Walk<A>> walks_;
  int64_t threads_;
};

// A clip that is read or written.
struct Given {
  const lf_clip* clip;
  const lf_clip* place;  // of what is written: the clip that it may take the place of; null for one that is read
};

bool coincide(const lf_clip& a, const lf_clip& b, const int64_t* shape) {
  for (int axis = 0; axis < kAxes; ++axis) {
    if (shape[axis] > 1 && a.strides[axis] != b.strides[axis]) return false;
  }
  return a.data == b.data;
}

// What is written may lie on top of neither itself nor anything that is read, but in the very place of its own.
lf_status check_memory(const lf_denoise_step& call, const Cover& cover, const std::vector<Given>& clips, int64_t size) {
  const auto span = [&](const lf_clip& clip) { return span_of(clip.data, call.shape, clip.strides, kAxes, size); };
  for (const Given& out : clips) {
    if (!out.place) continue;
    if (!elements_apart(call.shape, out.clip->strides, kAxes)) return LF_INVALID_STRIDES;
    Shape strides;
    std::copy_n(out.clip->strides, kAxes, strides.begin());
    lf_status status = check_apart_from_windows(cover, out.clip->data, strides, size);
    for (const Given& other : clips) {
      if (status != LF_OK) return status;
      if (other.clip == out.clip) continue;
      status = check_apart(span(*out.clip), span(*other.clip));
      const bool in_place = other.clip == out.place && coincide(*out.clip, *other.clip, call.shape);
      if (status == LF_SHARED_MEMORY && in_place) status = LF_OK;
    }
    if (status != LF_OK) return status;
  }
  return LF_OK;
}

bool is_missing(double coefficient, const lf_clip& clip) { return coefficient != 0 && !clip.data; }

lf_status check_numbers(const lf_denoise_step& call, int32_t num_threads) {
  if (num_threads < 1 || call.bound < LF_BOUND_NONE || call.bound > LF_BOUND_FRAME) return LF_INVALID_ARGUMENT;
  const bool dynamic = call.bound == LF_BOUND_CLIP || call.bound == LF_BOUND_FRAME;
  return dynamic && !(call.percentile > 0 && call.percentile <= 1) ? LF_INVALID_ARGUMENT : LF_OK;
}

lf_status check_clips(const lf_denoise_step& call, const Cover& cover, int64_t size) {
  if (cover.empty()) return LF_OK;
  std::vector<Given> clips{{&call.next, &call.latent}, {&call.x0, &call.history}, {&call.latent, nullptr}};
  if (is_missing(call.history_coefficient, call.history) || is_missing(call.noise_coefficient, call.noise)) {
    return LF_INVALID_ARGUMENT;
  }
  if (call.history_coefficient != 0) clips.push_back({&call.history, nullptr});
  if (call.noise_coefficient != 0) clips.push_back({&call.noise, nullptr});
  for (const Given& given : clips) {
    if (!given.clip->data) return LF_INVALID_ARGUMENT;
  }
  return check_memory(call, cover, clips, size);
}

template <class A> void denoise_step(const lf_denoise_step& call, const Cover& cover, int64_t size, int64_t threads) {
  const StepSettings<A> settings{call.window_dtype,
                                 call.dtype,
                                 cover.element_size,
                                 size,
                                 call.guided != 0,
                                 static_cast<A>(call.guidance_scale),
                                 static_cast<A>(call.x0_latent),
                                 static_cast<A>(call.x0_prediction),
                                 static_cast<A>(call.latent_coefficient),
                                 static_cast<A>(call.x0_coefficient),
                                 call.history_coefficient != 0,
                                 call.noise_coefficient != 0,
                                 static_cast<A>(call.history_coefficient),
                                 static_cast<A>(call.noise_coefficient)};
  DenoiseStep<A>(call, cover, settings, threads).run();
}

}  // namespace
}  // namespace lf

lf_status lf_denoise_step_cpu(const lf_denoise_step* call, int32_t num_threads) noexcept {
  return lf::guarded([&]() -> lf_status {
    if (!call) return LF_INVALID_ARGUMENT;
    int64_t size = 0;
    lf_status status = lf::check_numbers(*call, num_threads);
    if (status == LF_OK) status = lf_dtype_size(call->dtype, &size);
    if (status != LF_OK) return status;
    lf::Cover cover;
    status = lf::plan_cover({call->window_dtype, call->num_windows, call->windows, call->window_shapes,
                             call->window_strides, call->axes, call->starts, call->weights, call->next.data,
                             call->shape, call->next.strides, call->guided ? 2 : 1},
                            cover);
    if (status == LF_OK) status = lf::check_clips(*call, cover, size);
    if (status != LF_OK || cover.empty()) return status;
    const bool wide = call->dtype == LF_FLOAT64 || call->window_dtype == LF_FLOAT64;
    wide ? lf::denoise_step<double>(*call, cover, size, num_threads)
         : lf::denoise_step<float>(*call, cover, size, num_threads);
    return LF_OK;
  });
}
