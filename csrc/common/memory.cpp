#include "common/memory.h"

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

std::optional<Span> span_of(const void* data, const int64_t* shape, const int64_t* strides, int axes,
                            int64_t element_size) {
  const uint64_t size = element_size, most = INT64_MAX / size - 1;
  uint64_t below = 0, above = 0;  // how far elements reach
  for (int axis = 0; axis < axes; ++axis) {
    const uint64_t step = magnitude(strides[axis]), steps = shape[axis] - 1;
    if (step != 0 && steps > (most - below - above) / step) return std::nullopt;
    (strides[axis] < 0 ? below : above) += steps * step;
  }
  const uint64_t at = reinterpret_cast<uintptr_t>(data);
  if (below * size > at || (above + 1) * size > UINTPTR_MAX - at) return std::nullopt;
  return Span{at - below * size, at + (above + 1) * size};
}

lf_status check_apart(const std::optional<Span>& a, const std::optional<Span>& b) {
  if (!a || !b) return LF_INVALID_STRIDES;
  return a->first < b->end && b->first < a->end ? LF_SHARED_MEMORY : LF_OK;
}

}  // namespace lf
