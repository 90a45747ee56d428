// What differs from channel to channel: the small operands of a norm and of a convolution.
//
// Everything here has internal linkage; see common/scalar.h.
#ifndef LF_COMMON_PER_CHANNEL_H
#define LF_COMMON_PER_CHANNEL_H

#include <algorithm>
#include <vector>

#include "common/scalar.h"
#include "lumiere_fast.h"

namespace lf {
namespace {

// Calls work(T{}) for the dtype's element type T.
template <class Work> void with_type(lf_dtype dtype, const Work& work) {
  switch (dtype) {
    case LF_FLOAT32: return work(float{});
    case LF_FLOAT64: return work(double{});
    case LF_FLOAT16: return work(Half{});
    case LF_BFLOAT16: return work(BFloat16{});
  }
}

// Of one frame of a clip.
template <class A>
void read_channels(const lf_per_channel& from, int64_t clip, int64_t frame, int64_t channels, A* to) {
  with_type(from.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(from.data);
    data += clip * from.strides[0] + frame * from.strides[1];
    for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<A>(widen(data[c * from.strides[2]]));
  });
}

// What follows a norm: (n * weight + bias) * (1 + scale) + shift. Null for 1, 0, 0 and 0.
struct Modulators {
  const lf_per_channel *weight, *bias, *scale, *shift;

  // The same as n * gain + offset, in one frame of a clip.
  template <class A> void fold(int64_t clip, int64_t frame, int64_t channels, A* gain, A* offset) const {
    const auto read = [&](const lf_per_channel* from, A otherwise, A* to) {
      if (from) read_channels(*from, clip, frame, channels, to);
      else std::fill_n(to, channels, otherwise);
    };
    std::vector<A> film(channels);
    read(weight, 1, gain);
    read(bias, 0, offset);
    read(scale, 0, film.data());
    for (int64_t c = 0; c < channels; ++c) gain[c] *= 1 + film[c], offset[c] *= 1 + film[c];
    read(shift, 0, film.data());
    for (int64_t c = 0; c < channels; ++c) offset[c] += film[c];
  }
};

}  // namespace
}  // namespace lf

#endif  // LF_COMMON_PER_CHANNEL_H
