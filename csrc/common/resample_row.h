// What the two halves of fixed taps on a CPU share. The plan (resample.cpp) is made for any processor: taps, strides,
// threads. The kernels (resample_kernel.h) are compiled once for each width of vectors, and do a part of a row at a
// time. All here is plain data: kernels, which are compiled for newer processors, must not lend a function to the rest.
#ifndef LF_COMMON_RESAMPLE_ROW_H
#define LF_COMMON_RESAMPLE_ROW_H

#include "common/scalar.h"
#include "lumiere_fast.h"

namespace lf {

constexpr int64_t kMostFactor = 64;             // that tables are made for
constexpr int64_t kMostTaps = 2 * kMostFactor;  // of a place: an upsampling's adjoint has the most
constexpr int64_t kMostSteps = 512;

// What a place along T or H is made of: weights[k] times place first + k.
template <class A> struct Terms {
  int64_t first, count;
  A weights[kMostTaps];
};

// Along W, a place of the fine side and those that it meets of the coarse one, next to each other and two at most:
// results places first + k are made of sample `fine`, or result `fine` of them, with weights[k].
template <class A> struct Step {
  int64_t fine, first, count;
  A weights[2];
};

// Some of them, all that belong to the coarse places [begin, end), and the samples [low, high) that they need.
template <class A> struct Part {
  const Step<A>* steps;
  int64_t size, begin, end, low, high;
};

// Results along W that are alike, one for each of the coarse places [begin, end): result `first` of place 0
// would be made of samples sample + k with weights[k], and those of place i lie i, or i times the factor, further on.
template <class A> struct Alike {
  int64_t begin, end, first, sample, count;
  const A* weights;
};

// A whole row by results that are alike: those of the first coarse place, of the last and of all between.
template <class A> struct Across {
  int64_t factor, size;
  Alike<A> list[3 * kMostFactor];
  A weights[3 * kMostTaps];
};

// A part of a row of results.
template <class T> struct Row {
  const T* from;  // sample (0, 0, 0)
  int64_t frame, row, pixel;
  T* to;  // the row's first result
  int64_t to_pixel;
  int64_t channels;  // behind one another
  bool streams;      // past the caches, in vectors of whole lines; others see it after `end_streams`
  const Terms<Acc<T>>*t, *h;
  Part<Acc<T>> part;
  const Across<Acc<T>>* across;
};

// Compiled for one width of vectors.
template <class T> struct ResampleKernels {
  void (*to_coarse)(const Row<T>&) noexcept;
  void (*to_fine)(const Row<T>&) noexcept;
  void (*copy_to_coarse)(const Row<T>&) noexcept;
  void (*copy_to_fine)(const Row<T>&) noexcept;
  void (*end_streams)() noexcept;
  int64_t channels_at_once;
};

template <class T> ResampleKernels<T> resample_kernels_portable() noexcept;
template <class T> ResampleKernels<T> resample_kernels_avx2() noexcept;
template <class T> ResampleKernels<T> resample_kernels_avx512() noexcept;

}  // namespace lf

#endif  // LF_COMMON_RESAMPLE_ROW_H
