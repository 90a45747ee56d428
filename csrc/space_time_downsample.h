// The taps of space_time_downsample along one axis: coarse[i] = sum_j weight(i, j) fine[j]. The op gathers over
// fine_of(i), its adjoint over coarse_of(j), with the same weights.
#ifndef LF_SPACE_TIME_DOWNSAMPLE_H
#define LF_SPACE_TIME_DOWNSAMPLE_H

#include "common/resized_axis.h"

namespace lf {

struct Downsampling {
  // Never empty.
  template <class I> LF_HD static RangeOf<I> fine_of(const AxisOf<I>& axis, IndexOf<I> i) {
    const I f = axis.factor, first = f * i;
    if (f == 1) return {first, first + 1};
    switch (axis.mode) {
      case LF_LINEAR: return {first + (f - 1) / 2, first + f / 2 + 1};
      case LF_AREA: return {first, first + f};
      case LF_BLUR: return {larger_of<I>(first - 1, 0), first + 2};
      default: return {first, first + 1};
    }
  }

  // Of those in the first and past the last place: there may be none.
  template <class I> LF_HD static RangeOf<I> coarse_of(const AxisOf<I>& axis, IndexOf<I> j) {
    const I f = axis.factor, i = j / f, p = j % f;
    if (f == 1) return {i, i + 1};
    switch (axis.mode) {
      case LF_LINEAR: return {i, i + (p >= (f - 1) / 2 && p <= f / 2)};
      case LF_AREA: return {i, i + 1};
      case LF_BLUR: return {i + (p > 1), smaller_of<I>(i + 1 + (p == f - 1), axis.coarse)};
      default: return {i, i + (p == 0)};
    }
  }

  template <class A, class I> LF_HD static A weight(const AxisOf<I>& axis, IndexOf<I> i, IndexOf<I> j) {
    const I f = axis.factor;
    if (f == 1) return A(1);
    switch (axis.mode) {
      case LF_LINEAR: return f % 2 ? A(1) : A(0.5);
      case LF_AREA: return A(1) / static_cast<A>(f);
      case LF_BLUR: return j != f * i ? A(0.25) : i == 0 ? A(0.75) : A(0.5);  // the first place counts twice
      default: return A(1);
    }
  }
};

}  // namespace lf

#endif  // LF_SPACE_TIME_DOWNSAMPLE_H
