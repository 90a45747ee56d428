// group_norm on a CPU. A frame is cut into slabs: itself, where channels lie behind one another, or its planes, one a
// channel. Slabs are cut into pieces for threads, and these into tiles for the cache. How, the shape alone decides, and
// the parts of a sum are added in their order: so neither threads nor strides change a result.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "common/per_channel.h"
#include "common/processor.h"
#include "group_norm_kernels.h"
#include "lumiere_fast.h"

namespace lf {
namespace {

constexpr int64_t kTileElements = 1 << 13;  // with what is made of them, within the first-level cache
constexpr int64_t kTilesAPiece = 8;         // see `statistics`
constexpr int64_t kLeastLanes = 64;        // so many keep the widest registers busy

template <class T> const NormKernels<T>& kernels() {
#if defined(LF_WITH_AVX2)
  if (has_avx512()) return norm_kernels_avx512<T>();
  if (has_avx2()) return norm_kernels_avx2<T>();
#endif
  return kNormKernels<T>;
}

// How a call's tensors are cut.
struct Plan {
  int64_t clips, channels, frames, height, width, groups;
  bool planes;
  int64_t pixels;          // of a frame
  int64_t slabs;           // of a frame
  int64_t slab_channels, slab_groups;
  int64_t repeat, lanes;   // a row of a tile is the channels of so many pixels
  int64_t tile_pixels, pieces;  // of a slab
  int64_t unit_frames, units;   // that share statistics

  Plan(const int64_t* shape, const int64_t* strides, int64_t groups_, bool per_frame)
      : clips(shape[kBatch]), channels(shape[kChannel]), frames(shape[kTime]), height(shape[kHeight]),
        width(shape[kWidth]), groups(groups_), planes(lies_in_planes(shape, strides)), pixels(height * width) {
    slabs = planes ? channels : 1;
    slab_channels = channels / slabs;
    slab_groups = planes ? 1 : groups;
    repeat = std::min(pixels, (kLeastLanes + slab_channels - 1) / slab_channels);
    lanes = repeat * slab_channels;
    tile_pixels = std::max<int64_t>(kTileElements / lanes, 1) * repeat;
    const int64_t piece_pixels = kTilesAPiece * tile_pixels;
    pieces = (pixels + piece_pixels - 1) / piece_pixels;
    unit_frames = per_frame ? 1 : frames;
    units = clips * (per_frame ? frames : 1);
  }

  int64_t group_channels() const { return channels / groups; }
  int64_t unit_pieces() const { return unit_frames * slabs * pieces; }
  int64_t elements() const { return clips * channels * frames * pixels; }
  // The first of a frame's groups that a slab's channels are in.
  int64_t first_group(int64_t slab) const { return planes ? slab / group_channels() : 0; }

 private:
  static bool lies_in_planes(const int64_t* shape, const int64_t* strides) {
    uint64_t between_pixels = UINT64_MAX;
    for (const int axis : {kHeight, kWidth}) {
      if (shape[axis] > 1) between_pixels = std::min(between_pixels, magnitude(strides[axis]));
    }
    return shape[kChannel] > 1 && magnitude(strides[kChannel]) > between_pixels;
  }
};

// Where a piece is: `index` counts the pieces of a slab, the slabs of a frame and the frames.
struct Piece {
  int64_t frame, slab, first_pixel, end_pixel;

  Piece(const Plan& plan, int64_t index) {
    first_pixel = index % plan.pieces * kTilesAPiece * plan.tile_pixels;
    end_pixel = std::min(first_pixel + kTilesAPiece * plan.tile_pixels, plan.pixels);
    slab = index / plan.pieces % plan.slabs;
    frame = index / plan.pieces / plan.slabs;
  }

  // Calls work(first pixel, number of pixels) for each tile.
  template <class Work> void each_tile(const Plan& plan, const Work& work) const {
    for (int64_t pixel = first_pixel; pixel < end_pixel; pixel += plan.tile_pixels) {
      work(pixel, std::min(plan.tile_pixels, end_pixel - pixel));
    }
  }
};

// Calls work(offset, rows, lanes) for the whole rows of a tile of so many pixels, and for the rest.
template <class Work> void each_block(const Plan& plan, int64_t pixels, const Work& work) {
  const int64_t rows = pixels / plan.repeat, left = pixels % plan.repeat;
  if (rows > 0) work(0, rows, plan.lanes);
  if (left > 0) work(rows * plan.lanes, 1, left * plan.slab_channels);
}

// One thread's memory.
template <class T> class Scratch {
 public:
  explicit Scratch(const Plan& plan)
      : tile_(plan.tile_pixels * plan.slab_channels),
        stride_((plan.lanes + kLine - 1) / kLine * kLine),
        vectors_(kVectors * stride_),
        channels_(plan.slab_channels) {}

  Acc<T>* vector(int i) const { return vectors_.get() + i * stride_; }  // along the lanes
  double* channels() { return channels_.data(); }
  T* copy(int i) {  // of a tile; made when first asked for
    if (!copies_[i].get()) copies_[i] = Buffer<T>(tile_);
    return copies_[i].get();
  }

 private:
  static constexpr int kVectors = 6, kCopies = 3;
  int64_t tile_, stride_;
  Buffer<Acc<T>> vectors_;
  Buffer<T> copies_[kCopies];
  std::vector<double> channels_;
};

// A tensor's pixels, slab by slab. T is const where it is read.
template <class T> class Pixels {
 public:
  using Element = std::remove_const_t<T>;

  Pixels(T* data, const int64_t* strides, const Plan& plan)
      : data_(data), plan_(plan), channels_(plan.slab_channels), row_(plan.pixels), step_(strides[kWidth]) {
    std::copy(strides, strides + kAxes, strides_);
    if (plan.pixels == 1) step_ = channels_;
    else if (plan.width == 1) step_ = strides[kHeight];
    else if (plan.height > 1 && strides[kHeight] != plan.width * step_) row_ = plan.width;
    joined_ = (channels_ == 1 || strides[kChannel] == 1) && step_ == channels_;
    dense_ = joined_ && row_ == plan.pixels;
  }

  // The tile's first element where its rows lie behind one another, else that of a copy.
  const Element* read(const Piece& piece, int64_t pixel, int64_t pixels, Scratch<Element>& scratch, int i) const {
    if (dense_) return at(piece, pixel);
    each_run(piece, pixel, pixels, scratch.copy(i), [&](T* run, int64_t n, Element* copy) {
      if (joined_) std::copy(run, run + n * channels_, copy);
      else each_number(n, [&](int64_t offset, int64_t k) { copy[k] = run[offset]; });
    });
    return scratch.copy(i);
  }

  // The distance from a number to the one in the next frame's place; 0 where there is none, or where copies are read.
  int64_t to_next_frame(const Piece& piece) const {
    return dense_ && (piece.frame + 1) % plan_.frames != 0 ? strides_[kTime] : 0;
  }

  // Where to write a tile that `write` then takes to its place.
  T* target(const Piece& piece, int64_t pixel, Scratch<Element>& scratch, int i) const {
    return dense_ ? at(piece, pixel) : scratch.copy(i);
  }

  void write(const Piece& piece, int64_t pixel, int64_t pixels, Element* tile) const {
    if (dense_) return;
    each_run(piece, pixel, pixels, tile, [&](T* run, int64_t n, const Element* copy) {
      if (joined_) std::copy(copy, copy + n * channels_, run);
      else each_number(n, [&](int64_t offset, int64_t k) { run[offset] = copy[k]; });
    });
  }

 private:
  T* at(const Piece& piece, int64_t pixel) const {
    return data_ + piece.frame / plan_.frames * strides_[kBatch] + piece.frame % plan_.frames * strides_[kTime] +
           (plan_.planes ? piece.slab * strides_[kChannel] : 0) + pixel / row_ * strides_[kHeight] +
           pixel % row_ * step_;
  }

  // Calls work(first element, number of pixels, their part of the copy) for each row of a tile, or part of one.
  template <class Work>
  void each_run(const Piece& piece, int64_t pixel, int64_t pixels, Element* copy, const Work& work) const {
    for (const int64_t end = pixel + pixels; pixel < end;) {
      const int64_t n = std::min(row_ - pixel % row_, end - pixel);
      work(at(piece, pixel), n, copy);
      pixel += n;
      copy += n * channels_;
    }
  }

  // Calls work(offset in a row, index in the copy) for each number of so many pixels.
  template <class Work> void each_number(int64_t pixels, const Work& work) const {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      for (int64_t c = 0; c < channels_; ++c) work(pixel * step_ + c * strides_[kChannel], pixel * channels_ + c);
    }
  }

  T* data_;
  const Plan& plan_;
  const int64_t channels_;
  int64_t row_, step_;  // so many pixels follow one another at this step
  int64_t strides_[kAxes];
  bool joined_, dense_;  // a row's numbers lie behind one another; all of a slab's do
};

// Affine and FiLM as one pair a channel, n * gain + offset: a row for each frame or clip, or one where all have the
// same.
template <class A> class Modulation {
 public:
  Modulation(const Plan& plan, const Modulators& given) : channels_(plan.channels) {
    const auto varies = [&](int axis) {
      const lf_per_channel* all[] = {given.weight, given.bias, given.scale, given.shift};
      return std::any_of(all, all + 4, [&](const lf_per_channel* each) { return each && each->strides[axis] != 0; });
    };
    const int64_t frames = plan.clips * plan.frames;
    row_frames_ = varies(1) ? 1 : varies(0) ? plan.frames : frames;
    gain_.resize(frames / row_frames_ * channels_);
    offset_.resize(gain_.size());
    for (int64_t frame = 0; frame < frames; frame += row_frames_) {
      const int64_t row = frame / row_frames_ * channels_;
      given.fold(frame / plan.frames, frame % plan.frames, channels_, gain_.data() + row, offset_.data() + row);
    }
  }

  const A* gain(int64_t frame) const { return gain_.data() + frame / row_frames_ * channels_; }
  const A* offset(int64_t frame) const { return offset_.data() + frame / row_frames_ * channels_; }

 private:
  int64_t channels_, row_frames_;
  std::vector<A> gain_, offset_;
};

// Of some numbers: how many, their mean, and the sum of (x - mean)^2.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // Takes no difference of large numbers.
  void join(const Moments& other) {
    const double apart = other.mean - mean, share = other.count / (count + other.count);
    mean += apart * share;
    squares += other.squares + apart * apart * count * share;
    count += other.count;
  }
};

// Of a group. `mean` and `rest` together are its mean, more exactly than one number of this type tells it.
template <class A> struct Statistics {
  A mean, rest, rstd;
};

// What a group adds to the gradient of its x: (x - mean) * slope + constant.
template <class A> struct ThroughStatistics {
  A slope, constant;
};

// What there is for each channel of a slab, for each lane.
template <class A> void repeat_channels(const Plan& plan, A* lanes) {
  for (int64_t i = plan.slab_channels; i < plan.lanes; ++i) lanes[i] = lanes[i - plan.slab_channels];
}

// The sum of each channel's lanes.
template <class A> void add_lanes(const Plan& plan, const A* lanes, double* channels) {
  std::fill(channels, channels + plan.slab_channels, 0.0);
  for (int64_t i = 0; i < plan.lanes; i += plan.slab_channels) {
    for (int64_t c = 0; c < plan.slab_channels; ++c) channels[c] += lanes[i + c];
  }
}

// What is done with each piece of a unit, and then with the unit.
template <class OfPiece, class OfUnit> struct Phase {
  OfPiece piece;
  OfUnit unit;
};
template <class OfPiece, class OfUnit> Phase(OfPiece, OfUnit) -> Phase<OfPiece, OfUnit>;

template <class T> class GroupNorm {
 public:
  using A = Acc<T>;

  GroupNorm(const Plan& plan, const Pixels<const T>& x, double eps, int64_t num_threads)
      : plan_(plan),
        x_(x),
        eps_(eps),
        kernels_(kernels<T>()),
        threads_(std::clamp<int64_t>(plan.elements() / elements_worth_a_thread(), 1, num_threads)),
        moments_(plan.units * plan.unit_pieces() * plan.slab_groups),
        joined_(plan.units * plan.groups),
        statistics_(plan.units * plan.groups) {
    for (int64_t i = 0; i < threads_; ++i) scratch_.emplace_back(plan);
  }

  void measure(A* mean, const int64_t* mean_strides, A* rstd, const int64_t* rstd_strides) {
    run(statistics());
    const int64_t frames = plan_.frames / plan_.unit_frames;
    for (int64_t i = 0; i < plan_.units * plan_.groups; ++i) {
      const int64_t unit = i / plan_.groups, clip = unit / frames, frame = unit % frames, group = i % plan_.groups;
      const auto offset = [&](const int64_t* s) { return clip * s[0] + frame * s[1] + group * s[2]; };
      mean[offset(mean_strides)] = statistics_[i].mean;
      rstd[offset(rstd_strides)] = statistics_[i].rstd;
    }
  }

  void forward(const Modulation<A>& modulation, bool silu, const Pixels<T>& y) {
    const auto apply = [&](int64_t index, Scratch<T>& scratch) {
      const Piece piece(plan_, index);
      const Lanes<A> lanes = lanes_of(piece, modulation, silu, scratch);
      const int64_t ahead = x_.to_next_frame(piece);
      piece.each_tile(plan_, [&](int64_t pixel, int64_t pixels) {
        const T* from = x_.read(piece, pixel, pixels, scratch, 0);
        T* to = y.target(piece, pixel, scratch, 1);
        each_block(plan_, pixels, [&](int64_t at, int64_t rows, int64_t width) {
          kernels_.apply(from + at, rows, width, lanes, silu, ahead, to + at);
        });
        y.write(piece, pixel, pixels, to);
      });
    };
    run(statistics(), Phase{apply, nothing});
  }

  // `sums` and `n_sums` are as the C function has them; `gx` is null where it is not wanted.
  void backward(const Modulation<A>& modulation, bool silu, const Pixels<const T>& gy, const Pixels<T>* gx, A* sums,
                A* n_sums) {
    PieceSums pieces(plan_);
    std::vector<ThroughStatistics<A>> through(statistics_.size());
    const auto add_one = [&](int64_t index, Scratch<T>& scratch) {
      add_piece(index, modulation, silu, gy, scratch, pieces);
    };
    const auto join = [&](int64_t unit) {
      add_pieces(unit, pieces, sums, n_sums);
      find_through_statistics(unit, modulation, sums, n_sums, through);
    };
    const Phase add{add_one, join};
    const auto differentiate = [&](int64_t index, Scratch<T>& scratch) {
      differentiate_piece(index, modulation, silu, gy, through, scratch, *gx);
    };
    if (gx) run(statistics(), add, Phase{differentiate, nothing});
    else run(statistics(), add);
  }

 private:
  // For each piece, and each channel of its slab: the sums of gz and of gz * (x - mean).
  struct PieceSums {
    std::vector<double> sums, moments;

    explicit PieceSums(const Plan& plan)
        : sums(plan.units * plan.unit_pieces() * plan.slab_channels), moments(sums.size()) {}
  };

  static void nothing(int64_t) {}

  // Phase after phase. Where there are units enough for the threads each takes whole ones, whose x is then still in its
  // cache in the next phase; else the threads share a unit's pieces.
  template <class... Phases> void run(const Phases&... phases) {
    if (plan_.units % threads_ == 0 || plan_.units >= 4 * threads_) {
      for_each_piece(plan_.units, threads_, [&](int64_t worker, int64_t unit) {
        (run_unit(phases, unit, scratch_[worker]), ...);
      });
    } else {
      (run_shared(phases), ...);
    }
  }

  template <class P> void run_unit(const P& phase, int64_t unit, Scratch<T>& scratch) {
    const int64_t pieces = plan_.unit_pieces();
    for (int64_t i = unit * pieces; i < (unit + 1) * pieces; ++i) phase.piece(i, scratch);
    phase.unit(unit);
  }

  template <class P> void run_shared(const P& phase) {
    for_each_piece(plan_.units * plan_.unit_pieces(), threads_,
                   [&](int64_t worker, int64_t piece) { phase.piece(piece, scratch_[worker]); });
    for (int64_t unit = 0; unit < plan_.units; ++unit) phase.unit(unit);
  }

  auto statistics() {
    return Phase{[this](int64_t index, Scratch<T>& scratch) { measure_piece(index, scratch); },
                 [this](int64_t unit) { join_moments(unit); }};
  }

  // Sums of differences from a pivot, the mean of the group's part of the first tile. That is at least 1 / kTilesAPiece
  // of all: so whatever the numbers, the pivot's distance from their mean adds at most kTilesAPiece times their own
  // squares to the sum of squares, and taking that away again costs about three bits.
  void measure_piece(int64_t index, Scratch<T>& scratch) {
    const Piece piece(plan_, index);
    const int64_t width = plan_.slab_channels / plan_.slab_groups;
    A *pivot = scratch.vector(0), *sum = scratch.vector(1), *squares = scratch.vector(2);
    const int64_t first_pixels = std::min(plan_.tile_pixels, piece.end_pixel - piece.first_pixel);
    std::fill(pivot, pivot + plan_.lanes, A{0});
    clear(sum, squares);
    add_tile(piece, piece.first_pixel, first_pixels, scratch);
    each_group_sum(sum, scratch, [&](int64_t g, double total) {
      std::fill_n(pivot + g * width, width, static_cast<A>(total / static_cast<double>(first_pixels * width)));
    });
    repeat_channels(plan_, pivot);
    clear(sum, squares);
    piece.each_tile(plan_, [&](int64_t pixel, int64_t pixels) { add_tile(piece, pixel, pixels, scratch); });
    Moments* moments = moments_.data() + index * plan_.slab_groups;
    const double count = static_cast<double>((piece.end_pixel - piece.first_pixel) * width);
    each_group_sum(sum, scratch, [&](int64_t g, double total) { moments[g].mean = total / count; });
    each_group_sum(squares, scratch, [&](int64_t g, double total) {
      const double apart = moments[g].mean;
      moments[g] = {count, pivot[g * width] + apart, total - apart * apart * count};
    });
  }

  void clear(A* sum, A* squares) const {
    std::fill(sum, sum + plan_.lanes, A{0});
    std::fill(squares, squares + plan_.lanes, A{0});
  }

  void add_tile(const Piece& piece, int64_t pixel, int64_t pixels, Scratch<T>& scratch) const {
    const T* from = x_.read(piece, pixel, pixels, scratch, 0);
    each_block(plan_, pixels, [&](int64_t at, int64_t rows, int64_t width) {
      kernels_.moments(from + at, rows, width, scratch.vector(0), scratch.vector(1), scratch.vector(2));
    });
  }

  // Calls work(g, sum of the lanes of its channels) for each group of a slab.
  template <class Work> void each_group_sum(const A* lanes, Scratch<T>& scratch, const Work& work) const {
    const int64_t width = plan_.slab_channels / plan_.slab_groups;
    const double* channels = scratch.channels();
    add_lanes(plan_, lanes, scratch.channels());
    for (int64_t g = 0; g < plan_.slab_groups; ++g, channels += width) {
      double total = 0;
      for (int64_t c = 0; c < width; ++c) total += channels[c];
      work(g, total);
    }
  }

  void join_moments(int64_t unit) {
    const int64_t pieces = plan_.unit_pieces();
    Moments* joined = joined_.data() + unit * plan_.groups;
    for (int64_t i = unit * pieces; i < (unit + 1) * pieces; ++i) {
      const int64_t first = plan_.first_group(Piece(plan_, i).slab);
      for (int64_t g = 0; g < plan_.slab_groups; ++g) joined[first + g].join(moments_[i * plan_.slab_groups + g]);
    }
    for (int64_t g = 0; g < plan_.groups; ++g) {
      const Moments& all = joined[g];
      const double variance = all.squares < 0 ? 0 : all.squares / all.count;
      const A mean = static_cast<A>(all.mean), rest = static_cast<A>(all.mean - mean);
      statistics_[unit * plan_.groups + g] = {mean, rest, static_cast<A>(1 / std::sqrt(variance + eps_))};
    }
  }

  // Calls work(c, group) for the channels c of a piece's slab; groups are counted from the first unit's.
  template <class Work> void each_channel(const Piece& piece, const Work& work) const {
    const int64_t width = plan_.slab_channels / plan_.slab_groups;
    const int64_t first = piece.frame / plan_.unit_frames * plan_.groups + plan_.first_group(piece.slab);
    for (int64_t g = 0; g < plan_.slab_groups; ++g) {
      for (int64_t c = g * width; c < (g + 1) * width; ++c) work(c, first + g);
    }
  }

  // With the factor that silu_of_scaled() wants.
  Lanes<A> lanes_of(const Piece& piece, const Modulation<A>& modulation, bool silu, Scratch<T>& scratch) const {
    const A scale = silu ? static_cast<A>(kSiluScale) : A{1};
    A *mean = scratch.vector(0), *multiplier = scratch.vector(1), *offset = scratch.vector(2);
    const A *gain = modulation.gain(piece.frame) + piece.slab, *added = modulation.offset(piece.frame) + piece.slab;
    each_channel(piece, [&](int64_t c, int64_t group) {
      const Statistics<A>& of = statistics_[group];
      mean[c] = of.mean;
      multiplier[c] = of.rstd * gain[c] * scale;
      offset[c] = added[c] * scale - of.rest * multiplier[c];
    });
    for (A* lanes : {mean, multiplier, offset}) repeat_channels(plan_, lanes);
    return {mean, multiplier, offset};
  }

  void add_piece(int64_t index, const Modulation<A>& modulation, bool silu, const Pixels<const T>& gy,
                 Scratch<T>& scratch, PieceSums& pieces) const {
    const Piece piece(plan_, index);
    const Lanes<A> lanes = lanes_of(piece, modulation, silu, scratch);
    A *sum = scratch.vector(3), *moment = scratch.vector(4);
    clear(sum, moment);
    piece.each_tile(plan_, [&](int64_t pixel, int64_t pixels) {
      const T* from = x_.read(piece, pixel, pixels, scratch, 0);
      const T* above = gy.read(piece, pixel, pixels, scratch, 1);
      each_block(plan_, pixels, [&](int64_t at, int64_t rows, int64_t width) {
        kernels_.gradient_sums(from + at, above + at, rows, width, lanes, silu, sum, moment);
      });
    });
    add_lanes(plan_, sum, pieces.sums.data() + index * plan_.slab_channels);
    add_lanes(plan_, moment, pieces.moments.data() + index * plan_.slab_channels);
  }

  // Over a frame's pieces in their order; n is (x - mean - rest) * rstd.
  void add_pieces(int64_t unit, const PieceSums& pieces, A* sums, A* n_sums) const {
    const int64_t frame_pieces = plan_.slabs * plan_.pieces, first = unit * plan_.unit_frames;
    for (int64_t i = first * frame_pieces; i < (first + plan_.unit_frames) * frame_pieces; i += plan_.pieces) {
      const Piece piece(plan_, i);
      each_channel(piece, [&](int64_t c, int64_t group) {
        double sum = 0, moment = 0;
        for (int64_t j = i; j < i + plan_.pieces; ++j) {
          sum += pieces.sums[j * plan_.slab_channels + c];
          moment += pieces.moments[j * plan_.slab_channels + c];
        }
        const Statistics<A>& of = statistics_[group];
        const int64_t at = piece.frame * plan_.channels + piece.slab + c;
        sums[at] = static_cast<A>(sum);
        n_sums[at] = static_cast<A>((moment - of.rest * sum) * of.rstd);
      });
    }
  }

  // x moves its group's mean and rstd: gx = rstd * (gz * gain - mean(gz * gain) - n * mean(gz * gain * n)).
  void find_through_statistics(int64_t unit, const Modulation<A>& modulation, const A* sums, const A* n_sums,
                               std::vector<ThroughStatistics<A>>& through) const {
    const int64_t width = plan_.group_channels();
    for (int64_t g = 0; g < plan_.groups; ++g) {
      double sum = 0, n_sum = 0;
      for (int64_t frame = unit * plan_.unit_frames; frame < (unit + 1) * plan_.unit_frames; ++frame) {
        const A* gain = modulation.gain(frame);
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          sum += double{gain[c]} * sums[frame * plan_.channels + c];
          n_sum += double{gain[c]} * n_sums[frame * plan_.channels + c];
        }
      }
      const int64_t at = unit * plan_.groups + g;
      const Statistics<A>& of = statistics_[at];
      const double slope = -n_sum / joined_[at].count * of.rstd * of.rstd;
      through[at] = {static_cast<A>(slope), static_cast<A>(-sum / joined_[at].count * of.rstd - slope * of.rest)};
    }
  }

  void differentiate_piece(int64_t index, const Modulation<A>& modulation, bool silu, const Pixels<const T>& gy,
                           const std::vector<ThroughStatistics<A>>& through, Scratch<T>& scratch,
                           const Pixels<T>& gx) const {
    const Piece piece(plan_, index);
    const Lanes<A> lanes = lanes_of(piece, modulation, silu, scratch);
    A *factor = scratch.vector(3), *slope = scratch.vector(4), *constant = scratch.vector(5);
    const A* gain = modulation.gain(piece.frame) + piece.slab;
    each_channel(piece, [&](int64_t c, int64_t group) {
      factor[c] = statistics_[group].rstd * gain[c];
      slope[c] = through[group].slope;
      constant[c] = through[group].constant;
    });
    for (A* each : {factor, slope, constant}) repeat_channels(plan_, each);
    piece.each_tile(plan_, [&](int64_t pixel, int64_t pixels) {
      const T* from = x_.read(piece, pixel, pixels, scratch, 0);
      const T* above = gy.read(piece, pixel, pixels, scratch, 1);
      T* to = gx.target(piece, pixel, scratch, 2);
      each_block(plan_, pixels, [&](int64_t at, int64_t rows, int64_t width) {
        kernels_.gradient(from + at, above + at, rows, width, lanes, {factor, slope, constant}, silu, to + at);
      });
      gx.write(piece, pixel, pixels, to);
    });
  }

  const Plan& plan_;
  const Pixels<const T>& x_;
  const double eps_;
  const NormKernels<T>& kernels_;
  const int64_t threads_;
  std::vector<Moments> moments_;  // of each piece's groups
  std::vector<Moments> joined_;   // of each unit's
  std::vector<Statistics<A>> statistics_;
  std::vector<Scratch<T>> scratch_;
};

// What the three functions share of their arguments.
struct Input {
  lf_dtype dtype;
  const void* x;
  const int64_t *shape, *strides;
  int64_t groups;
  double eps;
  int32_t per_frame, num_threads;

  bool empty() const { return shape[kBatch] == 0; }
};

lf_status check(const Input& input) {
  int64_t bytes = 0;
  if (!input.shape || !input.strides) return LF_INVALID_ARGUMENT;
  if (const lf_status status = lf_dtype_size(input.dtype, &bytes); status != LF_OK) return status;
  if (input.shape[kBatch] < 0) return LF_INVALID_SHAPE;
  for (int axis = kChannel; axis < kAxes; ++axis) {
    if (input.shape[axis] < 1) return LF_INVALID_SHAPE;
  }
  if (input.groups < 1 || input.shape[kChannel] % input.groups != 0) return LF_INVALID_SHAPE;
  if (!(input.eps > 0) || input.num_threads < 1) return LF_INVALID_ARGUMENT;
  return input.x || input.empty() ? LF_OK : LF_INVALID_ARGUMENT;
}

lf_dtype arithmetic_of(lf_dtype dtype) { return dtype == LF_FLOAT64 ? LF_FLOAT64 : LF_FLOAT32; }

lf_status check(const Input& input, const Modulators& given, lf_activation act) {
  if (const lf_status status = check(input); status != LF_OK) return status;
  if (act != LF_NO_ACTIVATION && act != LF_SILU) return LF_INVALID_ARGUMENT;
  for (const lf_per_channel* each : {given.weight, given.bias, given.scale, given.shift}) {
    if (!each) continue;
    if (each->dtype != input.dtype && each->dtype != arithmetic_of(input.dtype)) return LF_UNSUPPORTED_DTYPE;
    if (!each->data && !input.empty()) return LF_INVALID_ARGUMENT;
  }
  return LF_OK;
}

struct Written {
  lf_dtype dtype;
  const void* data;
  const int64_t *shape, *strides;
  int axes;
};

// Whether what is written lies apart from a tensor of x's shape that is read meanwhile.
lf_status check_apart(const Input& input, const Written& written, const void* data, const int64_t* strides) {
  int64_t bytes = 0, written_bytes = 0;
  lf_dtype_size(input.dtype, &bytes);
  lf_dtype_size(written.dtype, &written_bytes);
  return check_apart(span_of(written.data, written.shape, written.strides, written.axes, written_bytes),
                     span_of(data, input.shape, strides, kAxes, bytes));
}

lf_status check(const Input& input, const Written& written) {
  if (!written.strides || !written.data) return LF_INVALID_ARGUMENT;
  if (!elements_apart(written.shape, written.strides, written.axes)) return LF_INVALID_STRIDES;
  return check_apart(input, written, input.x, input.strides);
}

// A call's parts, which refer to one another.
template <class T> struct Call {
  const Plan plan;
  const Pixels<const T> x;
  GroupNorm<T> norm;

  explicit Call(const Input& in)
      : plan(in.shape, in.strides, in.groups, in.per_frame != 0),
        x(static_cast<const T*>(in.x), in.strides, plan),
        norm(plan, x, in.eps, in.num_threads) {}
};

lf_status forward(const Input& input, const Modulators& given, lf_activation act, void* out,
                  const int64_t* out_strides) {
  lf_status status = check(input, given, act);
  if (status != LF_OK || input.empty()) return status;
  status = check(input, {input.dtype, out, input.shape, out_strides, kAxes});
  if (status != LF_OK) return status;
  with_type(input.dtype, [&](auto element) {
    using T = decltype(element);
    Call<T> call(input);
    const Pixels<T> y(static_cast<T*>(out), out_strides, call.plan);
    call.norm.forward(Modulation<Acc<T>>(call.plan, given), act == LF_SILU, y);
  });
  return LF_OK;
}

lf_status measure(const Input& input, void* mean, const int64_t* mean_strides, void* rstd,
                  const int64_t* rstd_strides) {
  lf_status status = check(input);
  if (status != LF_OK || input.empty()) return status;
  const int64_t shape[] = {input.shape[kBatch], input.per_frame ? input.shape[kTime] : 1, input.groups};
  const lf_dtype dtype = arithmetic_of(input.dtype);
  status = check(input, {dtype, mean, shape, mean_strides, 3});
  if (status == LF_OK) status = check(input, {dtype, rstd, shape, rstd_strides, 3});
  if (status != LF_OK) return status;
  with_type(input.dtype, [&](auto element) {
    using A = Acc<decltype(element)>;
    Call<decltype(element)> call(input);
    call.norm.measure(static_cast<A*>(mean), mean_strides, static_cast<A*>(rstd), rstd_strides);
  });
  return LF_OK;
}

lf_status backward(const Input& input, const void* gy, const int64_t* gy_strides, const Modulators& given,
                   lf_activation act, void* gx, const int64_t* gx_strides, void* sums, void* n_sums) {
  lf_status status = check(input, given, act);
  if (status != LF_OK || input.empty()) return status;
  if (!gy || !gy_strides || !sums || !n_sums) return LF_INVALID_ARGUMENT;
  if (gx) {
    const Written written{input.dtype, gx, input.shape, gx_strides, kAxes};
    status = check(input, written);
    if (status == LF_OK) status = check_apart(input, written, gy, gy_strides);
  }
  if (status != LF_OK) return status;
  with_type(input.dtype, [&](auto element) {
    using T = decltype(element);
    Call<T> call(input);
    const Pixels<const T> above(static_cast<const T*>(gy), gy_strides, call.plan);
    const Pixels<T> to(static_cast<T*>(gx), gx ? gx_strides : gy_strides, call.plan);
    call.norm.backward(Modulation<Acc<T>>(call.plan, given), act == LF_SILU, above, gx ? &to : nullptr,
                       static_cast<Acc<T>*>(sums), static_cast<Acc<T>*>(n_sums));
  });
  return LF_OK;
}

}  // namespace
}  // namespace lf

lf_status lf_group_norm_cpu(lf_dtype dtype, const void* x, const int64_t* shape, const int64_t* x_strides,
                            int64_t num_groups, const lf_per_channel* weight, const lf_per_channel* bias,
                            const lf_per_channel* scale, const lf_per_channel* shift, lf_activation act, double eps,
                            int32_t per_frame, void* out, const int64_t* out_strides, int32_t num_threads) noexcept {
  return lf::guarded([&] {
    return lf::forward({dtype, x, shape, x_strides, num_groups, eps, per_frame, num_threads},
                       {weight, bias, scale, shift}, act, out, out_strides);
  });
}

lf_status lf_group_norm_stats_cpu(lf_dtype dtype, const void* x, const int64_t* shape, const int64_t* x_strides,
                                  int64_t num_groups, double eps, int32_t per_frame, void* mean,
                                  const int64_t* mean_strides, void* rstd, const int64_t* rstd_strides,
                                  int32_t num_threads) noexcept {
  return lf::guarded([&] {
    return lf::measure({dtype, x, shape, x_strides, num_groups, eps, per_frame, num_threads}, mean, mean_strides, rstd,
                       rstd_strides);
  });
}

lf_status lf_group_norm_backward_cpu(lf_dtype dtype, const void* gy, const int64_t* gy_strides, const void* x,
                                     const int64_t* shape, const int64_t* x_strides, int64_t num_groups,
                                     const lf_per_channel* weight, const lf_per_channel* bias,
                                     const lf_per_channel* scale, const lf_per_channel* shift, lf_activation act,
                                     double eps, int32_t per_frame, void* gx, const int64_t* gx_strides, void* sums,
                                     void* n_sums, int32_t num_threads) noexcept {
  return lf::guarded([&] {
    return lf::backward({dtype, x, shape, x_strides, num_groups, eps, per_frame, num_threads}, gy, gy_strides,
                        {weight, bias, scale, shift}, act, gx, gx_strides, sums, n_sums);
  });
}
