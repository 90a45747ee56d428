// The taps of space_time_upsample along one axis: fine[j] = sum_i weight(i, j) coarse[i]. The op gathers over
// coarse_of(j), its adjoint over fine_of(i), with the same weights.
#ifndef LF_SPACE_TIME_UPSAMPLE_H
#define LF_SPACE_TIME_UPSAMPLE_H

#include "common/resized_axis.h"

namespace lf {

// Sample j of the fine side lies at (2 j + 1 - f) / (2 f) on the coarse one: on one of its samples, between two of them,
// or beyond the ends, where the end sample is repeated.
struct Upsampling {
  // Never empty.
  LF_HD static Range coarse_of(const ResizedAxis& axis, int64_t j) {
    const int64_t f = axis.factor, i = j / f;
    if (axis.mode != LF_LINEAR) return {i, i + 1};
    const int64_t off = 2 * (j % f) + 1 - f;  // from sample i, in parts of 2 f
    return {larger_of(i - (off < 0), 0), smaller_of(i + 1 + (off > 0), axis.coarse)};
  }

  // Never empty.
  LF_HD static Range fine_of(const ResizedAxis& axis, int64_t i) {
    const int64_t f = axis.factor;
    if (axis.mode != LF_LINEAR) return {f * i, f * (i + 1)};
    return {larger_of(f * (i - 1) + (f + 1) / 2, 0), smaller_of(f * (i + 1) + f / 2, f * axis.coarse)};
  }

  template <class A> LF_HD static A weight(const ResizedAxis& axis, int64_t i, int64_t j) {
    if (axis.mode != LF_LINEAR) return A(1);
    const int64_t whole = 2 * axis.factor, last = whole * (axis.coarse - 1);
    const int64_t place = smaller_of(larger_of(2 * j + 1 - axis.factor, 0), last), apart = place - whole * i;
    return static_cast<A>(whole - (apart < 0 ? -apart : apart)) / static_cast<A>(whole);
  }
};

}  // namespace lf

#endif  // LF_SPACE_TIME_UPSAMPLE_H
