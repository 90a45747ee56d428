// One axis of a resize by fixed taps, between a coarse side and one `factor` times finer.
//
// Everything here has internal linkage; see common/scalar.h.
#ifndef LF_COMMON_RESIZED_AXIS_H
#define LF_COMMON_RESIZED_AXIS_H

#include "common/scalar.h"
#include "lumiere_fast.h"

namespace lf {

// Of indices of type I: on a device 32 bits are cheaper, and enough where the fine side has at most kShortAxis places.
template <class I> struct AxisOf {
  using Index = I;
  I coarse;  // places of the coarse side; the fine one has `factor` times as many
  I factor;
  lf_resize_mode mode;
};
using ResizedAxis = AxisOf<int64_t>;

constexpr int64_t kShortAxis = int64_t{1} << 29;  // taps are worked out in at most 3 times as much

// Places [first, end) of one side: those that a place of the other side is made of, or goes into.
template <class I> struct RangeOf {
  I first, end;
};
using Range = RangeOf<int64_t>;

template <class I> using IndexOf = typename AxisOf<I>::Index;  // an argument that I is not deduced from

template <class I> LF_HD static inline I larger_of(I a, I b) { return a > b ? a : b; }
template <class I> LF_HD static inline I smaller_of(I a, I b) { return a < b ? a : b; }

}  // namespace lf

#endif  // LF_COMMON_RESIZED_AXIS_H
