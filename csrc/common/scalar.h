// Element types and their arithmetic, on the host and on a device.
//
// Everything here has internal linkage: a translation unit built for a newer processor must not lend its copy of a
// function to the rest of the program.
#ifndef LF_COMMON_SCALAR_H
#define LF_COMMON_SCALAR_H

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LF_HD __host__ __device__
#else
#define LF_HD
#endif

namespace lf {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The type of the arithmetic: at least fp32.
template <class T> struct Accumulator {
  using type = float;
};
template <> struct Accumulator<double> {
  using type = double;
};
template <class T> using Acc = typename Accumulator<T>::type;

LF_HD static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

LF_HD static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LF_HD static inline float widen(float x) { return x; }
LF_HD static inline double widen(double x) { return x; }
LF_HD static inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

LF_HD static inline float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__half(__half_raw{x.bits}));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Subnormal: a whole number of 2^-24, which fp32 holds exactly.
  if (magnitude < 0x0400u) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  if (magnitude > 0x7c00u) return float_of(sign | 0x7fc00000u | magnitude << 13);  // NaN, made quiet
  const uint32_t rebias = magnitude == 0x7c00u ? 0x70000000u : 0x38000000u;        // infinity stays infinity
  return float_of(sign | ((magnitude << 13) + rebias));
#endif
}

// Rounds to nearest, ties to even; a NaN stays one.
template <class T> LF_HD static inline T narrow(Acc<T> x);
template <> LF_HD inline float narrow<float>(float x) { return x; }
template <> LF_HD inline double narrow<double>(double x) { return x; }

template <> LF_HD inline BFloat16 narrow<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return BFloat16{static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x};
#else
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40u;
  return BFloat16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
#endif
}

template <> LF_HD inline Half narrow<Half>(float x) {
#if defined(__CUDA_ARCH__)
  return Half{static_cast<__half_raw>(__float2half_rn(x)).x};
#else
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x01ffu);  // NaN
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 2^16 and above
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;  // may round up to infinity
  } else {
    // Subnormal: adding 1/2 lets the adder round to whole numbers of 2^-24.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  }
  return Half{static_cast<uint16_t>(sign | half)};
#endif
}

}  // namespace lf

#endif  // LF_COMMON_SCALAR_H
