// What warpgroup instructions and bulk copies ask of a learned resize in time. No CUDA is needed to know it.
#ifndef LF_COMMON_TEMPORAL_RESIZE_WGMMA_H
#define LF_COMMON_TEMPORAL_RESIZE_WGMMA_H

#include "common/temporal_resize_packs.h"

namespace lf {

// Whether a bulk copy can step along an axis. One of a single place is not stepped along.
inline bool bulk_stride(int64_t size, int64_t stride) {
  constexpr int64_t kLimit = (int64_t{1} << 40) / 2;
  return size == 1 || (stride > 0 && stride < kLimit && stride % kPack == 0);
}

// Whether the weight lies so that bulk copies can take it from where it is.
inline bool bulk_weight(const TemporalResize& r) {
  const int64_t* strides = r.weight_strides;
  return is_aligned(r.weight) && (r.in == 1 || strides[1] == 1) && bulk_stride(r.out, strides[0]) &&
         bulk_stride(r.taps, strides[2]);
}

// Else it is packed: (taps, out, in), rows of `in` rounded up to this.
inline int64_t packed_row(const TemporalResize& r) { return divide_up(r.in, kPack) * kPack; }

inline int64_t temporal_resize_wgmma_bytes(const TemporalResize& r) {
  return bulk_weight(r) ? 0 : whole_units(2 * r.taps * r.out * packed_row(r));
}

}  // namespace lf

#endif  // LF_COMMON_TEMPORAL_RESIZE_WGMMA_H
