// The taps of space_time_upsample along one axis: fine[j] = sum_i weight(i, j) coarse[i]. The op gathers over
// coarse_of(j), its adjoint over fine_of(i), with the same weights.
#ifndef LF_SPACE_TIME_UPSAMPLE_H
#define LF_SPACE_TIME_UPSAMPLE_H

#include "common/resized_axis.h"

namespace lf {

// Sample j of the fine side lies at (2 j + 1 - f) / (2 f) on the coarse one: on a sample of it, between two of them, or
// beyond the ends, where the end sample is repeated.
struct Upsampling {
  // Of place f i + p. Never empty.
  template <class I> LF_HD static RangeOf<I> coarse_at(const AxisOf<I>& axis, IndexOf<I> i, IndexOf<I> p) {
    if (axis.mode != LF_LINEAR) return {i, i + 1};
    const I off = 2 * p + 1 - axis.factor;  // from sample i, in parts of 2 f
    return {larger_of<I>(i - (off < 0), 0), smaller_of<I>(i + 1 + (off > 0), axis.coarse)};
  }
  template <class I> LF_HD static RangeOf<I> coarse_of(const AxisOf<I>& axis, IndexOf<I> j) {
    return coarse_at(axis, j / axis.factor, j % axis.factor);
  }

  // Never empty.
  template <class I> LF_HD static RangeOf<I> fine_of(const AxisOf<I>& axis, IndexOf<I> i) {
    const I f = axis.factor;
    if (axis.mode != LF_LINEAR) return {f * i, f * (i + 1)};
    return {larger_of<I>(f * (i - 1) + (f + 1) / 2, 0), smaller_of<I>(f * (i + 1) + f / 2, f * axis.coarse)};
  }

  // A weight is part / parts, rounded once.
  template <class I> LF_HD static I parts(const AxisOf<I>& axis) {
    return axis.mode == LF_LINEAR ? 2 * axis.factor : 1;
  }
  template <class I> LF_HD static I part(const AxisOf<I>& axis, IndexOf<I> i, IndexOf<I> j) {
    if (axis.mode != LF_LINEAR) return 1;
    const I whole = 2 * axis.factor, last = whole * (axis.coarse - 1);
    const I place = smaller_of<I>(larger_of<I>(2 * j + 1 - axis.factor, 0), last), apart = place - whole * i;
    return whole - (apart < 0 ? -apart : apart);
  }
  template <class A, class I> LF_HD static A weight(const AxisOf<I>& axis, IndexOf<I> i, IndexOf<I> j) {
    return static_cast<A>(part(axis, i, j)) / static_cast<A>(parts(axis));
  }
};

}  // namespace lf

#endif  // LF_SPACE_TIME_UPSAMPLE_H
