#include "common/memory.h"

#include <functional>

namespace lf {

bool elements_apart(const int64_t* shape, const int64_t* strides, int axes) {
  for (int axis = 0; axis < axes; ++axis) {
    if (shape[axis] <= 1) continue;
    uint64_t reach = 0;  // of the axes of smaller strides
    for (int other = 0; other < axes; ++other) {
      const uint64_t step = magnitude(strides[other]), steps = shape[other] - 1;
      if (other == axis || steps == 0 || step > magnitude(strides[axis])) continue;
      if (step != 0 && steps > (INT64_MAX - reach) / step) return false;
      reach += steps * step;
    }
    const uint64_t step = magnitude(strides[axis]), steps = shape[axis] - 1;
    if (step <= reach || steps > (INT64_MAX - reach) / step) return false;
  }
  return true;
}

Span span_of(const void* data, const int64_t* shape, const int64_t* strides, int axes, int64_t element_size) {
  int64_t below = 0, above = 1;
  for (int axis = 0; axis < axes; ++axis) (strides[axis] < 0 ? below : above) += (shape[axis] - 1) * strides[axis];
  const char* at = static_cast<const char*>(data);
  return {at + below * element_size, at + above * element_size};
}

bool meet(const Span& a, const Span& b) {
  const std::less<const char*> before;
  return before(a.first, b.end) && before(b.first, a.end);
}

}  // namespace lf
