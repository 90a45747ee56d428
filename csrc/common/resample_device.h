// Fixed taps on a CUDA device, gathering: each element of `to` is read from where it comes from, so that results are
// deterministic, and rounded once. The order of the sums is that of the CPU, bit for bit; compiled without fused
// multiply-adds.
//
// A thread owns one pack of channels at a run of places on W, and walks it. It works out the taps on T and H once, and
// keeps what it has summed over T and H of the last two places on W: going up linearly by 2, each such column serves 4
// outputs. On H and T neighbours share through L1: a block's warps lie on neighbouring rows, 8 of which read 5 when
// going up by 2 instead of 16.
#ifndef LF_COMMON_RESAMPLE_DEVICE_H
#define LF_COMMON_RESAMPLE_DEVICE_H

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/device.h"
#include "common/ptx.h"
#include "common/space_time.h"

namespace lf {
namespace {

constexpr int kThreads = 256, kLog2Warp = 5;
// That a multiprocessor holds at least, so that nothing need spill.
constexpr int kBlocks = 3, kBlocksOfFew = 4, kBlocksOfAny = 2;
constexpr int kPackBytes = 16;
constexpr int64_t kLongestRun = 32, kCommonRun = 8, kMostRowChannels = 4;
#ifndef LF_ENOUGH_THREADS  // a test's are fewer, so that it has long runs too
#define LF_ENOUGH_THREADS (1 << 17)
#endif
constexpr int64_t kEnoughThreads = LF_ENOUGH_THREADS;  // about as many as a device of 132 multiprocessors holds at once

template <class T> constexpr int kPackWidth = kPackBytes / static_cast<int>(sizeof(T));

// Of 32 bits wherever all that it numbers fits; addresses always have 64.
struct Gather {
  const void* from;
  void* to;
  int64_t from_strides[kAxes], to_strides[kAxes];
  ResizedAxis axes[3];
  double inverse[3];    // of the parts that weights are counted in
  float inverse_single[3];
  int64_t channels, width;
  int64_t apart, from_apart, to_apart;  // from one channel of a thread to its next, where they are not together
  int64_t size[kAxes];  // of what is shared out: packs for channels, runs for W; the axes in the order of the memory
                        // of `to`, the innermost last
  int64_t tiles;        // blocks along the two innermost of these axes
  int32_t place[kAxes]; // which of these is which axis of a clip
  int32_t run;
  int32_t log2_lanes;   // of a block's threads so many lie along the two innermost axes, the others on rows
};

// n / d of whole numbers up to kMostParts, rounded once, by an inverse 1 / d that errs by little more than half a unit:
// the remainder of the first guess is exact, and its own quotient errs by less than what parts any n / d from a tie.
template <class A> LF_HD inline A quotient(A n, A d, A inverse) {
  using std::fma;
  const A guess = n * inverse;
  return fma(fma(-guess, d, n), inverse, guess);
}
constexpr int64_t kMostParts = int64_t{1} << 22;

// An axis as a thread of the device needs it.
template <class Taps, class A, class I> struct DeviceAxis : AxisOf<I> {
  A parts, inverse;

  __device__ DeviceAxis(const Gather& g, int axis)
      : AxisOf<I>{static_cast<I>(g.axes[axis].coarse), static_cast<I>(g.axes[axis].factor), g.axes[axis].mode},
        parts(static_cast<A>(Taps::parts(static_cast<const AxisOf<I>&>(*this)))),
        inverse(std::is_same_v<A, double> ? g.inverse[axis] : g.inverse_single[axis]) {}

  __device__ A weight(I coarse, I fine) const {
    const AxisOf<I>& axis = *this;
    if constexpr (sizeof(I) == 8) return Taps::template weight<A>(axis, coarse, fine);
    else return quotient(static_cast<A>(Taps::part(axis, coarse, fine)), parts, inverse);
  }
};

// The two ways through an op's taps, each from a place of `to`, which knows the next.
template <class Op> struct ToCoarse {
  using Taps = Op;
  static constexpr bool always_few = false;
  template <class I> struct Place {
    I at;
    LF_HD Place(const AxisOf<I>&, I place) : at(place) {}
    LF_HD void move_on(const AxisOf<I>&) { ++at; }
  };
  template <class I> LF_HD static RangeOf<I> range(const AxisOf<I>& axis, const Place<I>& place) {
    return Taps::fine_of(axis, place.at);
  }
  template <class A, class I>
  __device__ static A weight(const DeviceAxis<Taps, A, I>& axis, const Place<I>& place, std::common_type_t<I> j) {
    return axis.weight(place.at, j);
  }
};
template <class Op> struct ToFine {
  using Taps = Op;
  static constexpr bool always_few = true;
  template <class I> struct Place {
    I at, coarse, phase;  // f coarse + phase
    LF_HD Place(const AxisOf<I>& axis, I place) : at(place), coarse(place / axis.factor) {
      phase = place - coarse * axis.factor;
    }
    LF_HD void move_on(const AxisOf<I>& axis) {
      ++at, ++phase;
      if (phase == axis.factor) ++coarse, phase = 0;
    }
  };
  template <class I> LF_HD static RangeOf<I> range(const AxisOf<I>& axis, const Place<I>& place) {
    return Taps::coarse_at(axis, place.coarse, place.phase);
  }
  template <class A, class I>
  __device__ static A weight(const DeviceAxis<Taps, A, I>& axis, const Place<I>& place, std::common_type_t<I> i) {
    return axis.weight(i, place.at);
  }
};

// The taps of one place of `to` on an axis: a few, weighed once ...
template <class Way, class A, class I, int kMost> struct FewTaps {
  using Axis = DeviceAxis<typename Way::Taps, A, I>;
  using Place = typename Way::template Place<I>;
  static constexpr int most = kMost;
  I first;
  int count;
  A weights[kMost];

  __device__ FewTaps(const Axis& axis, const Place& place) {
    const RangeOf<I> range = Way::template range<I>(axis, place);
    first = range.first;
    count = static_cast<int>(range.end - range.first);
#pragma unroll
    for (int k = 0; k < kMost; ++k) weights[k] = Way::template weight<A, I>(axis, place, first + k);
  }
};

// ... or any number.
template <class Way, class A, class I> struct AnyTaps {
  using Axis = DeviceAxis<typename Way::Taps, A, I>;
  using Place = typename Way::template Place<I>;
  static constexpr int most = 0;
  Axis axis;
  Place place;
  I first, count;

  __device__ AnyTaps(const Axis& along, const Place& at) : axis(along), place(at) {
    const RangeOf<I> range = Way::template range<I>(axis, place);
    first = range.first;
    count = range.end - range.first;
  }
  __device__ A weight(I k) const { return Way::template weight<A, I>(axis, place, first + k); }
};

// One more term of a sum, or the first.
template <class A, int N> __device__ inline void add(const A (&values)[N], A weight, bool first, A (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A term = weight * values[i];
    sums[i] = first ? term : sums[i] + term;
  }
}

template <class T> union Pack {
  uint4 bytes;
  T values[kPackWidth<T>];
  __device__ Pack() : bytes{0, 0, 0, 0} {}
};

template <class T> __device__ inline void widen_into(Acc<T> (&values)[kPackWidth<T>], const Pack<T>& pack) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t pairs[] = {pack.bytes.x, pack.bytes.y, pack.bytes.z, pack.bytes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = float_of(pairs[i] << 16);
      values[2 * i + 1] = float_of(pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPackWidth<T>; ++i) values[i] = widen(pack.values[i]);
  }
}

template <class T> __device__ inline void narrow_into(Pack<T>& pack, const Acc<T> (&sums)[kPackWidth<T>]) {
  if constexpr (sizeof(T) == 2) {
    const auto pair = [&](int i) { return narrow_pair<T>(sums[2 * i], sums[2 * i + 1]); };
    pack.bytes = {pair(0), pair(1), pair(2), pair(3)};
  } else {
#pragma unroll
    for (int i = 0; i < kPackWidth<T>; ++i) pack.values[i] = sums[i];
  }
}

// A thread's channels: those of 16 bytes ...
template <class T> struct Together {
  using Loaded = Pack<T>;
  static constexpr int count = kPackWidth<T>, blocks = sizeof(T) == 8 ? kBlocks : kBlocksOfFew;
  int64_t channel;

  __device__ Together(const Gather&, int64_t pack) : channel(pack * kPackWidth<T>) {}
  __device__ void load(const T* at, Pack<T>& pack) const { pack.bytes = __ldg(reinterpret_cast<const uint4*>(at)); }
  __device__ void store(T* at, const Pack<T>& pack) const {
    store_16(at, pack.bytes.x, pack.bytes.y, pack.bytes.z, pack.bytes.w);
  }
};

template <class T> __device__ inline void load_one(const T* at, T& value) {
  using Bits = std::conditional_t<sizeof(T) == 2, unsigned short,
                                  std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>>;
  const Bits bits = __ldg(reinterpret_cast<const Bits*>(at));
  memcpy(&value, &bits, sizeof bits);
}

// ... or as many, so far apart that lanes next to one another hold channels, or pixels, next to one another ...
template <class T> struct Apart {
  using Loaded = Pack<T>;
  static constexpr int count = kPackWidth<T>, blocks = kBlocks;
  const Gather& g;
  int64_t channel;
  int there = 0;

  __device__ Apart(const Gather& gather, int64_t first) : g(gather), channel(first) {
#pragma unroll
    for (int k = 0; k < count; ++k) there += first + k * g.apart < g.channels;
  }
  __device__ void load(const T* at, Pack<T>& pack) const {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (k < there) load_one(at + k * g.from_apart, pack.values[k]);
    }
  }
  __device__ void store(T* at, const Pack<T>& pack) const {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (k < there) at[k * g.to_apart] = pack.values[k];
    }
  }
};

template <class T, int kChannels> struct LoadedPixel {
  T values[kChannels] = {};
};

// ... or a pixel's few, of which those of pixels next to one another make packs.
template <class T, int kChannels> struct Pixel {
  using Loaded = LoadedPixel<T, kChannels>;
  static constexpr int count = kChannels;
  int64_t channel, apart;

  __device__ Pixel(const Gather& g, int64_t first) : channel(first), apart(g.from_strides[kChannel]) {}
  __device__ void load(const T* at, Loaded& pixel) const {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) load_one(at + k * apart, pixel.values[k]);
  }
};

template <class T, int kChannels>
__device__ inline void widen_into(Acc<T> (&values)[kChannels], const LoadedPixel<T, kChannels>& pixel) {
#pragma unroll
  for (int k = 0; k < kChannels; ++k) values[k] = widen(pixel.values[k]);
}

// What a thread works on, as indices by axis. False where there is nothing for it.
template <class I> __device__ inline bool find_item(const Gather& g, I (&at)[kAxes]) {
  using U = std::make_unsigned_t<I>;  // divides faster
  const U tiles = static_cast<U>(g.tiles), block = blockIdx.x;
  const int lanes = 1 << g.log2_lanes;
  U lane = block % tiles * lanes + (threadIdx.x & (lanes - 1));
  U row = block / tiles * (kThreads >> g.log2_lanes) + (threadIdx.x >> g.log2_lanes);
  const auto split = [&](U& from, int place) {
    const U size = static_cast<U>(g.size[place]), whole = from / size, rest = from - whole * size;
    from = whole;
    return rest;
  };
  const U fourth = split(lane, 4), second = split(row, 2), first = split(row, 1);
#pragma unroll
  for (int axis = 0; axis < kAxes; ++axis) {
    const int place = g.place[axis];
    at[axis] = static_cast<I>(place == 4 ? fourth : place == 3 ? lane : place == 2 ? second : place == 1 ? first : row);
  }
  return lane < static_cast<U>(g.size[3]) && row < static_cast<U>(g.size[0]);
}

// Of an item, without what lies along W, and T and H where their taps begin.
template <class I>
__device__ inline int64_t from_offset(const Gather& g, const I (&at)[kAxes], int64_t channel, I frame, I row) {
  return at[kBatch] * g.from_strides[kBatch] + channel * g.from_strides[kChannel] + frame * g.from_strides[kTime] +
         row * g.from_strides[kHeight];
}
template <class I> __device__ inline int64_t to_offset(const Gather& g, const I (&at)[kAxes], int64_t channel) {
  return at[kBatch] * g.to_strides[kBatch] + channel * g.to_strides[kChannel] + at[kTime] * g.to_strides[kTime] +
         at[kHeight] * g.to_strides[kHeight];
}

// Sums over T and H at one place on W: sum_h weight (sum_t weight x), from the first taps of both on, of which there
// are some. Loads come before what is made of them, so that several are under way at once.
template <class T, class Access, class Taps> struct Column {
  using A = Acc<T>;
  using Loaded = typename Access::Loaded;
  static constexpr int kPack = Access::count;
  const Access& access;
  const Taps &t, &h;
  int64_t frame, row;  // strides

  __device__ void sum(const T* at, A (&sums)[kPack]) const {
    if constexpr (Taps::most > 0) {
      sum_few(at, sums);
    } else {
      for (auto k = h.count; k > 0; k -= 2) add_two_rows(at + (h.count - k) * row, h.count - k, sums);
    }
  }

 private:
  static __device__ bool has(const Taps& taps, int k) { return k == 0 || k < taps.count; }

  // Of two rows at once where both have at most two taps.
  __device__ void sum_few(const T* at, A (&sums)[kPack]) const {
    constexpr int kMost = Taps::most, kRows = kMost == 2 ? 2 : 1;
#pragma unroll
    for (int k = 0; k < kMost; k += kRows) {
      Loaded packs[kRows][kMost];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int l = 0; l < kMost; ++l) {
          if (has(h, k + i) && has(t, l)) access.load(at + (k + i) * row + l * frame, packs[i][l]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (!has(h, k + i)) continue;
        A sum[kPack] = {};
        add_weighed(packs[i][0], t.weights[0], true, sum);
#pragma unroll
        for (int l = 1; l < kMost; ++l) {
          if (l < t.count) add_weighed(packs[i][l], t.weights[l], false, sum);
        }
        add(sum, h.weights[k + i], k + i == 0, sums);
      }
    }
  }

  template <class I> __device__ void add_two_rows(const T* at, I k, A (&sums)[kPack]) const {
    const bool both = k + 1 < h.count;
    A upper[kPack] = {}, lower[kPack] = {};
    for (I l = 0; l < t.count; ++l, at += frame) {
      Loaded packs[2];
      access.load(at, packs[0]);
      if (both) access.load(at + row, packs[1]);
      const A weight = t.weight(l);
      add_weighed(packs[0], weight, l == 0, upper);
      if (both) add_weighed(packs[1], weight, l == 0, lower);
    }
    add(upper, h.weight(k), k == 0, sums);
    if (both) add(lower, h.weight(k + 1), false, sums);
  }

  __device__ static void add_weighed(const Loaded& pack, A weight, bool first, A (&sums)[kPack]) {
    A values[kPack];
    widen_into(values, pack);
    add(values, weight, first, sums);
  }
};

// A thread's places on W, one after the other, where no axis has more than two taps.
template <class Way, class T, class Access> class Walk {
 public:
  using A = Acc<T>;
  using I = int32_t;
  static constexpr int count = Access::count;

  __device__ Walk(const Gather& g, const I (&at)[kAxes], const Access& access)
      : width_(g, 2), place_(width_, at[kWidth] * g.run), access_(access),
        t_(taps(g, 0, at[kTime])), h_(taps(g, 1, at[kHeight])), frame_(g.from_strides[kTime]),
        row_(g.from_strides[kHeight]),
        from_(static_cast<const T*>(g.from) + from_offset(g, at, access.channel, t_.first, h_.first)),
        step_(g.from_strides[kWidth]), empty_(t_.count == 0 || h_.count == 0) {}

  __device__ I place() const { return place_.at; }

  // Of the place it has come to; zeros where there are no taps.
  __device__ void sum(A (&sums)[count]) {
    const Taps taps(width_, place_);
    const Column<T, Access, Taps> column{access_, t_, h_, frame_, row_};  // kept, it would keep all of this in memory
    if (!empty_ && taps.count > 0) {
      held_ = larger_of(held_, taps.first);
      for (; held_ < taps.first + taps.count; ++held_) {
#pragma unroll
        for (int i = 0; i < count; ++i) before_[i] = last_[i];
        column.sum(from_ + held_ * step_, last_);
      }
      if (taps.count > 1) {
        add(before_, taps.weights[0], true, sums);
        add(last_, taps.weights[1], false, sums);
      } else {
        add(last_, taps.weights[0], true, sums);
      }
    }
    place_.move_on(width_);
  }

 private:
  using Taps = FewTaps<Way, A, I, 2>;
  using Axis = typename Taps::Axis;
  using Place = typename Taps::Place;

  __device__ static Taps taps(const Gather& g, int axis, I place) {
    const Axis along(g, axis);
    return Taps(along, Place(along, place));
  }

  const Axis width_;
  Place place_;
  const Access& access_;
  const Taps t_, h_;
  const int64_t frame_, row_;
  const T* const from_;
  const int64_t step_;
  const bool empty_;
  // The columns summed last, which end at `held_`. Where two taps follow one another, no later place has the first
  // alone: a sole tap is the last column.
  A before_[count] = {}, last_[count] = {};
  I held_ = 0;
};

// At most two taps on each axis.
template <class Way, class T, class Access>
__global__ void __launch_bounds__(kThreads, Access::blocks) gather_few_kernel(const __grid_constant__ Gather g) {
  int32_t at[kAxes];
  if (!find_item(g, at)) return;
  const Access access(g, at[kChannel]);
  Walk<Way, T, Access> walk(g, at, access);
  const int32_t end = smaller_of(walk.place() + g.run, static_cast<int32_t>(g.width));
  T* to = static_cast<T*>(g.to) + to_offset(g, at, access.channel) + walk.place() * g.to_strides[kWidth];
  for (; walk.place() < end; to += g.to_strides[kWidth]) {
    Acc<T> sums[kPackWidth<T>] = {};
    walk.sum(sums);
    Pack<T> result;
    narrow_into(result, sums);
    access.store(to, result);
  }
}

// At most two taps on each axis, and pixels of kChannels that lie next to one another in a row: those of as many packs.
template <class Way, class T, int kChannels>
__global__ void __launch_bounds__(kThreads, kBlocks) gather_row_kernel(const __grid_constant__ Gather g) {
  constexpr int kPack = kPackWidth<T>;
  int32_t at[kAxes];
  if (!find_item(g, at)) return;
  const Pixel<T, kChannels> pixel(g, at[kChannel]);
  Walk<Way, T, Pixel<T, kChannels>> walk(g, at, pixel);
  T* const to = static_cast<T*>(g.to) + to_offset(g, at, pixel.channel) + int64_t{walk.place()} * kChannels;
  Acc<T> row[kChannels][kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    Acc<T> sums[kChannels] = {};
    walk.sum(sums);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) row[(i * kChannels + k) / kPack][(i * kChannels + k) % kPack] = sums[k];
  }
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    Pack<T> pack;
    narrow_into(pack, row[k]);
    store_16(to + k * kPack, pack.bytes.x, pack.bytes.y, pack.bytes.z, pack.bytes.w);
  }
}

// Any number of taps on W, and on T and H as many as `Taps` hold.
template <class Way, class T, class Access, class I, class Taps>
__global__ void __launch_bounds__(kThreads, kBlocksOfAny) gather_any_kernel(const __grid_constant__ Gather g) {
  using A = Acc<T>;
  using Along = AnyTaps<Way, A, I>;
  using Axis = typename Taps::Axis;
  using Place = typename Taps::Place;
  constexpr int kPack = kPackWidth<T>;
  I at[kAxes];
  if (!find_item(g, at)) return;
  const Access access(g, at[kChannel]);
  const Axis time(g, 0), height(g, 1), width(g, 2);
  const Taps t(time, Place(time, at[kTime])), h(height, Place(height, at[kHeight]));
  const T* from = static_cast<const T*>(g.from) + from_offset(g, at, access.channel, t.first, h.first);
  T* to = static_cast<T*>(g.to) + to_offset(g, at, access.channel);
  const Column<T, Access, Taps> column{access, t, h, g.from_strides[kTime], g.from_strides[kHeight]};
  const bool empty = t.count == 0 || h.count == 0;
  const I begin = at[kWidth] * g.run, end = smaller_of<I>(begin + g.run, static_cast<I>(g.width));
  for (I w = begin; w < end; ++w) {
    const Along taps(width, Place(width, w));
    Pack<T> result;
    A sums[kPack] = {};
    for (I k = 0; k < taps.count && !empty; ++k) {
      A sum[kPack] = {};
      column.sum(from + (taps.first + k) * g.from_strides[kWidth], sum);
      add(sum, taps.weight(k), k == 0, sums);
    }
    if (taps.count > 0 && !empty) narrow_into(result, sums);
    access.store(to + w * g.to_strides[kWidth], result);
  }
}

// A sole tap of weight 1, or none, on every axis, in packs: whatever they hold.
template <class Way>
__global__ void __launch_bounds__(kThreads, kBlocks) gather_copy_kernel(const __grid_constant__ Gather g) {
  using I = int32_t;
  using Axis = DeviceAxis<typename Way::Taps, float, I>;
  using Place = typename Way::template Place<I>;
  I at[kAxes];
  if (!find_item(g, at)) return;
  const Axis time(g, 0), height(g, 1), width(g, 2);
  const RangeOf<I> t = Way::template range<I>(time, Place(time, at[kTime]));
  const RangeOf<I> h = Way::template range<I>(height, Place(height, at[kHeight]));
  const uint4* from = static_cast<const uint4*>(g.from) + from_offset(g, at, at[kChannel], t.first, h.first);
  uint4* to = static_cast<uint4*>(g.to) + to_offset(g, at, at[kChannel]);
  const bool empty = t.first == t.end || h.first == h.end;
  const I begin = at[kWidth] * g.run, end = smaller_of<I>(begin + g.run, static_cast<I>(g.width));
  uint4 pack{0, 0, 0, 0};
  I held = -1;
  Place place(width, begin);
  for (I w = begin; w < end; ++w, place.move_on(width)) {
    const RangeOf<I> range = Way::template range<I>(width, place);
    const bool none = empty || range.first == range.end;
    if (!none && range.first != held) {
      pack = __ldg(from + range.first * g.from_strides[kWidth]);
      held = range.first;
    }
    to[w * g.to_strides[kWidth]] = none ? uint4{0, 0, 0, 0} : pack;
  }
}

using GatherKernel = void (*)(Gather);

// A launch: which kernel, and what it is told.
template <class Way> class GatherLaunch {
 public:
  explicit GatherLaunch(const Resample& r) : r_(r) {
    lf_dtype_size(r.dtype, &element_size_);
    width_ = kPackBytes / element_size_;
    together_ = fits_packs(r.from, r.from_shape) && fits_packs(r.to, r.to_shape);
    g_.from = r.from.data, g_.to = r.to.data;
    std::copy_n(r.from.strides, kAxes, g_.from_strides);
    std::copy_n(r.to.strides, kAxes, g_.to_strides);
    std::copy_n(r.axes, 3, g_.axes);
    for (int i = 0; i < 3; ++i) {
      g_.inverse[i] = 1.0 / static_cast<double>(Way::Taps::parts(r.axes[i]));
      g_.inverse_single[i] = static_cast<float>(g_.inverse[i]);
    }
    g_.channels = r.to_shape[kChannel], g_.width = r.to_shape[kWidth];
    g_.apart = (g_.channels + width_ - 1) / width_;
    g_.from_apart = g_.apart * g_.from_strides[kChannel], g_.to_apart = g_.apart * g_.to_strides[kChannel];
    row_channels_ = row_channels();
    share_out();
    if (row_channels_ > 0 && !is_short()) row_channels_ = 0, share_out();
  }

  lf_status run(cudaStream_t stream) {
    const int64_t rows_each = kThreads >> g_.log2_lanes;
    const int64_t groups = (rows() + rows_each - 1) / rows_each;
    if (groups > INT32_MAX / g_.tiles) return LF_TOO_MANY;
    const GatherKernel kernel = choose();
    void* parameters[] = {&g_};
    return status_of(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(groups * g_.tiles)), dim3(kThreads),
                                      parameters, 0, stream));
  }

 private:
  int64_t rows() const { return g_.size[0] * g_.size[1] * g_.size[2]; }
  int64_t lanes() const { return g_.size[3] * g_.size[4]; }

  bool fits_packs(const lf_clip& clip, const Sizes& shape) const {
    bool fits = reinterpret_cast<uintptr_t>(clip.data) % kPackBytes == 0 && shape[kChannel] % width_ == 0;
    for (int axis = 0; axis < kAxes; ++axis) {
      fits = fits && (axis == kChannel ? clip.strides[axis] == 1
                                       : clip.strides[axis] % width_ == 0 || shape[axis] == 1);
    }
    return fits;
  }

  // How many channels next to one another the pixels of a row are of, where threads write packs of pixels; 0 if not.
  int row_channels() const {
    const Sizes& shape = r_.to_shape;
    if (!Way::always_few || together_ || shape[kChannel] > kMostRowChannels || shape[kWidth] % width_ != 0) return 0;
    const bool pixels = r_.to.strides[kWidth] == 3 && r_.to.strides[kChannel] == 1 && shape[kChannel] == 3;
    bool fits = reinterpret_cast<uintptr_t>(r_.to.data) % kPackBytes == 0 && (pixels || r_.to.strides[kWidth] == 1);
    for (int axis = 0; axis < kWidth; ++axis) {
      if (axis == kChannel && pixels) continue;
      fits = fits && (shape[axis] == 1 || r_.to.strides[axis] % width_ == 0);
    }
    return fits ? pixels ? 3 : 1 : 0;
  }

  // Lays the outputs out over blocks.
  void share_out() {
    Sizes size = r_.to_shape;
    size[kChannel] = row_channels_ > 0 ? size[kChannel] / row_channels_ : g_.apart;
    std::array<int, kAxes> order{kBatch, kChannel, kTime, kHeight, kWidth};
    const auto reach = [&](int axis) { return size[axis] == 1 ? UINT64_MAX : magnitude(g_.to_strides[axis]); };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return reach(a) > reach(b); });
    // Along the innermost axis lanes lie next to one another.
    g_.run = 1;
    if (row_channels_ > 0) g_.run = static_cast<int32_t>(width_);
    else if (order[kAxes - 1] != kWidth) g_.run = static_cast<int32_t>(longest_run(size));
    size[kWidth] = (size[kWidth] + g_.run - 1) / g_.run;
    // Frames that share sources are to meet in a block, where rows do not.
    const auto rows_end = order.begin() + 3, frames = std::find(order.begin(), rows_end, int{kTime});
    const bool frames_share = g_.axes[0].factor > 1 && g_.axes[1].factor == 1;
    if (frames_share && frames != rows_end) std::rotate(frames, frames + 1, rows_end);
    for (int place = 0; place < kAxes; ++place) {
      g_.size[place] = size[order[place]];
      g_.place[order[place]] = place;
    }
    g_.log2_lanes = kLog2Warp;
    while (g_.log2_lanes > 0 && int64_t{1} << (g_.log2_lanes - 1) >= lanes()) --g_.log2_lanes;
    while (kThreads >> g_.log2_lanes > rows()) ++g_.log2_lanes;
    g_.tiles = (lanes() + (int64_t{1} << g_.log2_lanes) - 1) >> g_.log2_lanes;
  }

  // As long as there are threads enough, and no longer than the row. Beyond kCommonRun what a longer run saves at its
  // beginning is less than what a last, unfilled round of threads may cost: there are to be many rounds.
  static int64_t longest_run(const Sizes& size) {
    double packs = 1;
    for (const int64_t n : size) packs *= static_cast<double>(n);
    int64_t run = kLongestRun;
    const auto fits = [&] {
      const int64_t enough = run > kCommonRun ? 8 * kEnoughThreads : kEnoughThreads;
      return run / 2 < size[kWidth] && packs >= static_cast<double>(enough * run);
    };
    while (run > 1 && !fits()) run /= 2;
    return run;
  }

  bool is_short() const {
    bool fits = lanes() < INT32_MAX - kThreads && rows() < INT32_MAX - kThreads && g_.channels <= kShortAxis;
    for (const ResizedAxis& axis : g_.axes) {
      fits = fits && axis.coarse <= kShortAxis / axis.factor && Way::Taps::parts(axis) <= kMostParts;
    }
    return fits;
  }

  // The most taps of a place on any axis: at the ends no more than in the middle, unless they are all there is.
  int64_t most_taps() const {
    int64_t most = 0;
    for (int i = 0; i < 3; ++i) {
      const Range range = range_at(g_.axes[i], r_.to_shape[kTime + i] / 2);
      most = std::max(most, range.end - range.first);
    }
    return most;
  }

  static Range range_at(const ResizedAxis& axis, int64_t place) {
    return Way::template range<int64_t>(axis, typename Way::template Place<int64_t>(axis, place));
  }

  bool copies() const {
    return std::all_of(g_.axes, g_.axes + 3, [](const ResizedAxis& axis) {
      if (axis.factor == 1) return true;
      const Range range = range_at(axis, 0);
      return axis.mode == LF_NEAREST && range.end - range.first <= 1;
    });
  }

  template <class T> GatherKernel kernel_of() const {
    constexpr auto any = gather_any_kernel<Way, T, Apart<T>, int64_t, AnyTaps<Way, Acc<T>, int64_t>>;
    if (!is_short()) return any;
    if constexpr (Way::always_few) {
      if (row_channels_ == 3) return gather_row_kernel<Way, T, 3>;
      if (row_channels_ == 1) return gather_row_kernel<Way, T, 1>;
      return together_ ? gather_few_kernel<Way, T, Together<T>> : gather_few_kernel<Way, T, Apart<T>>;
    } else {
      using I = int32_t;
      const int64_t most = most_taps();
      if (most <= 2) return together_ ? gather_few_kernel<Way, T, Together<T>> : gather_few_kernel<Way, T, Apart<T>>;
      if (!together_) return any;
      if (most <= 4) return gather_any_kernel<Way, T, Together<T>, I, FewTaps<Way, Acc<T>, I, 4>>;
      return gather_any_kernel<Way, T, Together<T>, I, AnyTaps<Way, Acc<T>, I>>;
    }
  }

  GatherKernel choose() {
    if (together_ && is_short() && copies()) {
      for (int axis = 0; axis < kAxes; ++axis) {
        if (axis != kChannel) g_.from_strides[axis] /= width_, g_.to_strides[axis] /= width_;
      }
      return gather_copy_kernel<Way>;
    }
    switch (r_.dtype) {
      case LF_FLOAT32: return kernel_of<float>();
      case LF_FLOAT64: return kernel_of<double>();
      case LF_FLOAT16: return kernel_of<Half>();
      default: return kernel_of<BFloat16>();
    }
  }

  const Resample& r_;
  int64_t element_size_ = 0, width_ = 1;
  int row_channels_ = 0;
  bool together_ = false;
  Gather g_{};
};

}  // namespace
template <class Taps> lf_status gather_fine_cuda(const Resample& resample, cudaStream_t stream) {
  return GatherLaunch<ToCoarse<Taps>>(resample).run(stream);
}
template <class Taps> lf_status gather_coarse_cuda(const Resample& resample, cudaStream_t stream) {
  return GatherLaunch<ToFine<Taps>>(resample).run(stream);
}

}  // namespace lf

#endif  // LF_COMMON_RESAMPLE_DEVICE_H
