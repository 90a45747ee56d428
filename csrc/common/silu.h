// SiLU and its derivative on packs. They take u = kSiluScale * z in place of z, whose factor a caller who multiplies z
// from other numbers has in those at no cost. Then 2^u squared is exp(-z).
//
// silu(z) = z / (1 + exp(-z)) is within 3 ulp for z > -1 and within |z| + 3 ulp below, where it is next to nothing: so
// nowhere is it further than 2^-23 off where |z| < 1, and 2 |z| 2^-23 elsewhere.
// silu(-inf) is NaN as torch has it.
#ifndef LF_COMMON_SILU_H
#define LF_COMMON_SILU_H

#include "common/pack.h"

namespace lf {

constexpr double kSiluScale = -0.72134752044448170368;  // u / z: -log2(e) / 2

namespace {

// 2^f times the root of -kSiluScale, for f from 0 to 1 and from f^0 on; the relative error is below an ulp of 1.
template <class A> struct PowerSeries;
template <> struct PowerSeries<float> {
  static constexpr float terms[] = {0.849321736643036692f, 0.588710016011423987f, 0.203967702321446178f, 0.0474145091039851827f, 0.00763484232739371679f, 0.00159466687878762136f};
};
template <> struct PowerSeries<double> {
  static constexpr double terms[] = {0.849321800288019043, 0.588705011257738174, 0.204029609367366675, 0.0471408494953436437, 0.00816888672158898536, 0.00113244820467019835, 0.000130825380723067854, 0.0000129548670056023064, 1.12180066393790571e-6, 8.7093344868292878e-8, 5.56684217776047093e-9, 5.32731744862940993e-10};
};

// The root of -kSiluScale * exp(-z).
template <class A, int N> inline Pack<A, N> root_of_power(Pack<A, N> u) {
  constexpr int degree = sizeof(PowerSeries<A>::terms) / sizeof(A) - 1;
  const Split<Pack<A, N>> parts = split(u);
  Pack<A, N> power = Pack<A, N>::fill(PowerSeries<A>::terms[degree]);
  for (int i = degree - 1; i >= 0; --i) {
    power = multiply_add(power, parts.fraction, Pack<A, N>::fill(PowerSeries<A>::terms[i]));
  }
  return times_power(power, parts.whole);
}

// z / (1 + exp(-z)) is u / (scale + scale * exp(-z)).
template <class A, int N> inline Pack<A, N> silu(Pack<A, N> u) {
  const Pack<A, N> root = root_of_power(u), scale = Pack<A, N>::fill(static_cast<A>(kSiluScale));
  return u / multiply_add(-root, root, scale);
}

template <class A, int N> inline Pack<A, N> silu_derivative(Pack<A, N> u) {
  const Pack<A, N> root = root_of_power(u), one = Pack<A, N>::fill(1);
  const Pack<A, N> scale = Pack<A, N>::fill(static_cast<A>(-kSiluScale)), sigmoid = scale / multiply_add(root, root, scale);
  const Pack<A, N> z = u * Pack<A, N>::fill(static_cast<A>(1 / kSiluScale));
  return sigmoid * multiply_add(z, one - sigmoid, one);
}

}  // namespace
}  // namespace lf

#endif  // LF_COMMON_SILU_H
