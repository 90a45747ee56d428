// The arithmetic of blended windows, for one element. The launches differ, this does not; it must not be contracted into
// fused multiply-adds, so that every launch and the reference round alike.
#ifndef LF_COMMON_BLEND_H
#define LF_COMMON_BLEND_H

#include "common/scalar.h"

namespace lf {

// The mean goes from the first window towards each further one by that one's share. Where all windows agree the steps
// are 0, so that what they agree on comes out exactly.
template <class A> LF_HD static inline A blend_step(A mean, A share, A part, A first) {
  return mean + share * (part - first);
}

// The weight of a position in a window, from the weights of its place on each axis.
LF_HD static inline double blend_weight(double time, double height, double width) { return time * (height * width); }

}  // namespace lf

#endif  // LF_COMMON_BLEND_H
