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

  // Of place f i + p; of those in the first and past the last place: there may be none.
  template <class I> LF_HD static RangeOf<I> coarse_at(const AxisOf<I>& axis, IndexOf<I> i, IndexOf<I> p) {
    const I f = axis.factor;
    if (f == 1) return {i, i + 1};
    switch (axis.mode) {
      case LF_LINEAR: return {i, i + (p >= (f - 1) / 2 && p <= f / 2)};
      case LF_AREA: return {i, i + 1};
      case LF_BLUR: return {i + (p > 1), smaller_of<I>(i + 1 + (p == f - 1), axis.coarse)};
      default: return {i, i + (p == 0)};
    }
  }
  template <class I> LF_HD static RangeOf<I> coarse_of(const AxisOf<I>& axis, IndexOf<I> j) {
    return coarse_at(axis, j / axis.factor, j % axis.factor);
  }

  // A weight is part / parts, rounded once.
  template <class I> LF_HD static I parts(const AxisOf<I>& axis) {
    const I f = axis.factor;
    if (f == 1) return 1;
    switch (axis.mode) {
      case LF_LINEAR: return f % 2 ? 1 : 2;
      case LF_AREA: return f;
      case LF_BLUR: return 4;
      default: return 1;
    }
  }
  template <class I> LF_HD static I part(const AxisOf<I>& axis, IndexOf<I> i, IndexOf<I> j) {
    if (axis.factor == 1 || axis.mode != LF_BLUR) return 1;
    return j != axis.factor * i ? 1 : i == 0 ? 3 : 2;  // the first place counts twice
  }
  template <class A, class I> LF_HD static A weight(const AxisOf<I>& axis, IndexOf<I> i, IndexOf<I> j) {
    return static_cast<A>(part(axis, i, j)) / static_cast<A>(parts(axis));
  }
};

}  // namespace lf

#endif  // LF_SPACE_TIME_DOWNSAMPLE_H
