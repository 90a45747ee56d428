// One axis of a resize by fixed taps, between a coarse side and one `factor` times finer.
//
// Everything here has internal linkage; see common/scalar.h.
#ifndef LF_COMMON_RESIZED_AXIS_H
#define LF_COMMON_RESIZED_AXIS_H

#include "common/scalar.h"
#include "lumiere_fast.h"

namespace lf {

struct ResizedAxis {
  int64_t coarse;  // places of the coarse side; the fine one has `factor` times as many
  int64_t factor;
  lf_resize_mode mode;
};

// Places [first, end) of one side: those that a place of the other side is made of, or goes into.
struct Range {
  int64_t first, end;
};

LF_HD static inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
LF_HD static inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace lf

#endif  // LF_COMMON_RESIZED_AXIS_H
