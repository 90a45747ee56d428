// Learned resizing in time on a CPU. FIRST VERSION: a plain loop.
#include "common/per_channel.h"
#include "common/space_time.h"

namespace lf {

int64_t temporal_resize_cpu_bytes(const TemporalResize&, int64_t) { return 0; }

lf_status temporal_resize_cpu(const TemporalResize& r, void*, int64_t) {
  with_type(r.dtype, [&](auto element) {
    using T = decltype(element);
    const auto *x = static_cast<const T*>(r.x.data), *w = static_cast<const T*>(r.weight);
    const auto* bias = static_cast<const T*>(r.bias);
    const int64_t *sx = r.x.strides, *sy = r.y.strides, *sw = r.weight_strides;
    for (int64_t b = 0; b < r.batch; ++b)
      for (int64_t j = 0; j < r.out_frames; ++j)
        for (int64_t p = 0; p < r.height * r.width; ++p)
          for (int64_t o = 0; o < r.out; ++o) {
            const int64_t row = p / r.width, pixel = p % r.width;
            Acc<T> sum = bias ? widen(bias[o * r.bias_stride]) : 0;
            for (int64_t k = 0; k < r.taps; ++k) {
              int64_t f = (r.direction == Direction::kDown ? r.factor * j : j) - r.taps / 2 + k;
              if (f < 0 || f >= (r.direction == Direction::kDown ? r.frames : r.out_frames)) continue;
              if (r.direction == Direction::kUp) f /= r.factor;
              for (int64_t c = 0; c < r.in; ++c)
                sum += widen(w[o * sw[0] + c * sw[1] + k * sw[2]]) *
                       widen(x[b * sx[0] + c * sx[1] + f * sx[2] + row * sx[3] + pixel * sx[4]]);
            }
            static_cast<T*>(r.y.data)[b * sy[0] + o * sy[1] + j * sy[2] + row * sy[3] + pixel * sy[4]] = narrow<T>(sum);
          }
  });
  return LF_OK;
}

}  // namespace lf
