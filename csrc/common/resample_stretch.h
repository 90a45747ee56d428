// What the two halves of fixed taps on a CPU share. The plan (resample.cpp) is made for any processor: taps, strides,
// threads. The kernels (resample_kernel.h) are compiled once for each width of vectors, and do a stretch of a row at a
// time. All here is plain data: kernels, which are compiled for newer processors, must not lend a function to the rest.
#ifndef LF_COMMON_RESAMPLE_STRETCH_H
#define LF_COMMON_RESAMPLE_STRETCH_H

#include "common/scalar.h"
#include "lumiere_fast.h"

namespace lf {

constexpr int64_t kMostFactor = 64;            // that tables are made for
constexpr int64_t kMostTaps = 2 * kMostFactor;  // of a place: an upsampling's adjoint has the most
constexpr int64_t kScratchBytes = 24 << 10;    // of a stretch: they stay in the first-level cache

// What a place along T or H is made of: weights[k] times place first + k.
template <class A> struct Terms {
  int64_t first, count;
  bool alone;  // it is one sample itself
  A weights[kMostTaps];
};

// Along W results come in groups, one for each coarse place: `phases` of them from about `step` samples, where one of
// the two numbers is the factor and the other 1. All groups are alike but those at the ends.
template <class A> struct Group {
  int64_t low, end;  // the samples of all its results, counted from the group's own first
  int64_t first[kMostFactor], count[kMostFactor];  // of each result, counted so too
  const A* weights[kMostFactor];
  A storage[kMostTaps];
};

template <class A> struct Across {
  int64_t groups, phases, step;
  int64_t low, end;  // of all groups'
  bool same;         // each result is the one sample in its place
  bool gaps;         // there are samples that no result needs
  Group<A> first, inner, last;
};

// Some groups of a row of results, of some channels.
template <class T> struct Stretch {
  const T* from;  // sample (0, 0, 0)
  int64_t frame, row, pixel;
  T* to;  // the row's first result
  int64_t to_pixel;
  int64_t channels;  // behind one another
  int64_t begin, end;  // groups
  const Terms<Acc<T>>*t, *h;
  const Across<Acc<T>>* w;
};

// Compiled for one width of vectors. `streaming` past the caches: whole lines of 64 bytes, which others see after
// `end_streams`.
template <class T> struct ResampleKernels {
  void (*storing)(const Stretch<T>&) noexcept;
  void (*streaming)(const Stretch<T>&) noexcept;
  void (*end_streams)() noexcept;
};

template <class T> ResampleKernels<T> resample_kernels_portable() noexcept;
template <class T> ResampleKernels<T> resample_kernels_avx2() noexcept;
template <class T> ResampleKernels<T> resample_kernels_avx512() noexcept;

}  // namespace lf

#endif  // LF_COMMON_RESAMPLE_STRETCH_H
