// Fixed taps on a CPU. FIRST VERSION: a plain loop.
#ifndef LF_COMMON_RESAMPLE_H
#define LF_COMMON_RESAMPLE_H

#include "common/per_channel.h"
#include "common/space_time.h"

namespace lf {
namespace {

// sum_w weight (sum_h weight (sum_t weight x)), each sum from its first term on.
template <class T, class RangeOf, class Weight>
void resample_plain(const Resample& r, const RangeOf& range_of, const Weight& weight) {
  const auto* from = static_cast<const T*>(r.from.data);
  auto* to = static_cast<T*>(r.to.data);
  using A = Acc<T>;
  Sizes at;
  const auto gather = [&](int axis, int64_t offset, const auto& self) -> A {
    if (axis < 0) return widen(from[offset]);
    const Range range = range_of(r.axes[axis], at[kTime + axis]);
    A sum = 0;
    for (int64_t i = range.first; i < range.end; ++i) {
      const A term = weight(A(0), r.axes[axis], at[kTime + axis], i) *
                     self(axis - 1, offset + i * r.from.strides[kTime + axis], self);
      sum = i == range.first ? term : sum + term;
    }
    return sum;
  };
  for (at[0] = 0; at[0] < r.to_shape[0]; ++at[0])
    for (at[1] = 0; at[1] < r.to_shape[1]; ++at[1])
      for (at[2] = 0; at[2] < r.to_shape[2]; ++at[2])
        for (at[3] = 0; at[3] < r.to_shape[3]; ++at[3])
          for (at[4] = 0; at[4] < r.to_shape[4]; ++at[4]) {
            int64_t place = 0;
            for (int i = 0; i < kAxes; ++i) place += at[i] * r.to.strides[i];
            to[place] = narrow<T>(gather(2, at[0] * r.from.strides[0] + at[1] * r.from.strides[1], gather));
          }
}

}  // namespace

template <class Taps> lf_status gather_fine_cpu(const Resample& r, int64_t) {
  with_type(r.dtype, [&](auto element) {
    resample_plain<decltype(element)>(
        r, [](const ResizedAxis& axis, int64_t i) { return Taps::fine_of(axis, i); },
        [](auto a, const ResizedAxis& axis, int64_t i, int64_t j) { return Taps::template weight<decltype(a)>(axis, i, j); });
  });
  return LF_OK;
}

template <class Taps> lf_status gather_coarse_cpu(const Resample& r, int64_t) {
  with_type(r.dtype, [&](auto element) {
    resample_plain<decltype(element)>(
        r, [](const ResizedAxis& axis, int64_t j) { return Taps::coarse_of(axis, j); },
        [](auto a, const ResizedAxis& axis, int64_t j, int64_t i) { return Taps::template weight<decltype(a)>(axis, i, j); });
  });
  return LF_OK;
}

}  // namespace lf

#endif  // LF_COMMON_RESAMPLE_H
