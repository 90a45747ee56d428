// SiLU and its derivative on packs: silu(z) = z / (1 + exp(-z)) is within 3 ulp for z > -1, and within 2 |z| ulp below;
// of -inf it is NaN as torch has it.
//
// Where each operation counts, and z is a product that a factor can be taken into at no cost, t = kSiluScale * z is
// given in place of z: then 2^t = exp(-z). It is infinite where z is over 2/3 of the largest number, and so is what
// comes of it.
#ifndef LF_COMMON_SILU_H
#define LF_COMMON_SILU_H

#include "common/pack.h"

namespace lf {

constexpr double kSiluScale = -1.4426950408889634074;  // t / z: -log2(e)

namespace {

// 2^f for f from 0 to 1, from f^0 on; the relative error is below half an ulp of 1.
template <class A> struct PowerSeries;
template <> struct PowerSeries<float> {
  static constexpr float terms[] = {0.999999925063759935f,  0.693153073207096229f,   0.240153616982723578f,
                                    0.0558263182316833768f, 0.00898933987659873577f, 0.00187757676565801496f};
};
template <> struct PowerSeries<double> {
  static constexpr double terms[] = {1.0,
                                     0.693147180559946235,
                                     0.240226506959054712,
                                     0.0555041086657111632,
                                     0.00961812909879244896,
                                     0.00133335586615834706,
                                     0.000154035114462742881,
                                     0.0000152531902527511925,
                                     1.320819344985004e-6,
                                     1.02544577142324723e-7,
                                     6.5544557738570504e-9,
                                     6.27243695713783512e-10};
};

template <class A, int N> inline Pack<A, N> exp2(Pack<A, N> t) {
  constexpr int degree = sizeof(PowerSeries<A>::terms) / sizeof(A) - 1;
  const Split<Pack<A, N>> parts = split(t);
  Pack<A, N> power = Pack<A, N>::fill(PowerSeries<A>::terms[degree]);
  for (int i = degree - 1; i >= 0; --i) {
    power = multiply_add(power, parts.fraction, Pack<A, N>::fill(PowerSeries<A>::terms[i]));
  }
  return times_power(power, parts.whole);
}

template <class A, int N> inline Pack<A, N> silu(Pack<A, N> z) {
  return z / (Pack<A, N>::fill(1) + exp2(z * Pack<A, N>::fill(static_cast<A>(kSiluScale))));
}

// z / (1 + 2^t) is t / (scale + scale * 2^t).
template <class A, int N> inline Pack<A, N> silu_of_scaled(Pack<A, N> t) {
  const Pack<A, N> scale = Pack<A, N>::fill(static_cast<A>(kSiluScale));
  return t / multiply_add(scale, exp2(t), scale);
}

template <class A, int N> inline Pack<A, N> silu_derivative_of_scaled(Pack<A, N> t) {
  const Pack<A, N> one = Pack<A, N>::fill(1), sigmoid = one / (one + exp2(t));
  const Pack<A, N> z = t * Pack<A, N>::fill(static_cast<A>(1 / kSiluScale));
  return sigmoid * multiply_add(z, one - sigmoid, one);
}

}  // namespace
}  // namespace lf

#endif  // LF_COMMON_SILU_H
