// Packs of numbers in the widest registers that a translation unit is compiled for, and of one number for what is left
// over.
//
// Everything here has internal linkage; see common/scalar.h.
#ifndef LF_COMMON_PACK_H
#define LF_COMMON_PACK_H

#include "common/scalar.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the intrinsics' own operands that do not matter
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace lf {
namespace {

// N numbers of type A. `load` takes elements of any type whose arithmetic is A's; `store` rounds to nearest even.
template <class A, int N> struct Pack;

template <class A> struct Pack<A, 1> {
  A v;

  static Pack fill(A x) { return {x}; }
  template <class T> static Pack load(const T* at) { return {widen(*at)}; }
  template <class T> void store(T* at) const { *at = narrow<T>(v); }
};

template <class A, int N> inline Pack<A, N> operator+(Pack<A, N> a, Pack<A, N> b) { return {a.v + b.v}; }
template <class A, int N> inline Pack<A, N> operator-(Pack<A, N> a, Pack<A, N> b) { return {a.v - b.v}; }
template <class A, int N> inline Pack<A, N> operator*(Pack<A, N> a, Pack<A, N> b) { return {a.v * b.v}; }
template <class A, int N> inline Pack<A, N> operator/(Pack<A, N> a, Pack<A, N> b) { return {a.v / b.v}; }

// Asks for a line of memory, into the cache of a level, 1 or 2; it need not be there at all.
template <int kLevel = 2> inline void prefetch([[maybe_unused]] const void* at) {
#if defined(__GNUC__)
  __builtin_prefetch(at, 0, 4 - kLevel);
#endif
}

// a * b + c, in one rounding where the processor can.
template <class A> inline Pack<A, 1> multiply_add(Pack<A, 1> a, Pack<A, 1> b, Pack<A, 1> c) {
#if defined(__FMA__)
  if constexpr (sizeof(A) == sizeof(float)) return {__builtin_fmaf(a.v, b.v, c.v)};
  else return {__builtin_fma(a.v, b.v, c.v)};
#else
  return {a.v * b.v + c.v};
#endif
}

// The larger, b where either is a NaN.
template <class A> inline Pack<A, 1> maximum(Pack<A, 1> a, Pack<A, 1> b) { return {a.v > b.v ? a.v : b.v}; }

// What 2^x is made of: 2^whole times 2^fraction, with a fraction from 0 to 1. Where x is so large or small that 2^x is
// infinite or next to nothing the parts may be those of some other such number. Of a NaN the fraction is one.
template <class P> struct Split {
  P whole, fraction;
};

template <class A> struct Exponents;
template <> struct Exponents<float> {
  static constexpr float least = -126.5f, most = 128, rounder = 0x1.8p23f;
};
template <> struct Exponents<double> {
  static constexpr double least = -1022.5, most = 1024, rounder = 0x1.8p52;
};

// Adding and taking away the rounder leaves a whole number.
template <class A> inline Split<Pack<A, 1>> split(Pack<A, 1> x) {
  using E = Exponents<A>;
  const A raised = E::least > x.v ? E::least : x.v, bounded = E::most < raised ? E::most : raised;
  const A whole = bounded - static_cast<A>(0.5) + E::rounder - E::rounder;
  return {{whole}, {bounded - whole}};
}

// p * 2^whole, infinite where whole is Exponents::most and 0 where it is that of Exponents::least.
inline Pack<float, 1> times_power(Pack<float, 1> p, Pack<float, 1> whole) {
  return {p.v * float_of((bits_of(whole.v + Exponents<float>::rounder) + 127u) << 23)};
}
inline Pack<double, 1> times_power(Pack<double, 1> p, Pack<double, 1> whole) {
  const double shifted = whole.v + Exponents<double>::rounder;
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023u) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return {p.v * power};
}

#if defined(__AVX512F__)

template <class A> constexpr int kPackWidth = 64 / static_cast<int>(sizeof(A));

template <> struct Pack<float, 16> {
  __m512 v;

  static Pack fill(float x) { return {_mm512_set1_ps(x)}; }
  static Pack load(const float* at) { return {_mm512_loadu_ps(at)}; }
  static Pack load(const Half* at) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))};
  }
  static Pack load(const BFloat16* at) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store(float* at) const { _mm512_storeu_ps(at, v); }
  void store(Half* at) const {
    const __m256i halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), halves);
  }
  void store(BFloat16* at) const {
    const __m512i bits = _mm512_castps_si512(v), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    const __m512i wide = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(wide));
  }
};

inline Pack<float, 16> multiply_add(Pack<float, 16> a, Pack<float, 16> b, Pack<float, 16> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Pack<float, 16> maximum(Pack<float, 16> a, Pack<float, 16> b) { return {_mm512_max_ps(a.v, b.v)}; }
// The instruction takes what is whole in its exponent, and infinity too.
inline Split<Pack<float, 16>> split(Pack<float, 16> x) { return {x, {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)}}; }
inline Pack<float, 16> times_power(Pack<float, 16> p, Pack<float, 16> whole) {
  return {_mm512_scalef_ps(p.v, whole.v)};
}

template <> struct Pack<double, 8> {
  __m512d v;

  static Pack fill(double x) { return {_mm512_set1_pd(x)}; }
  static Pack load(const double* at) { return {_mm512_loadu_pd(at)}; }
  void store(double* at) const { _mm512_storeu_pd(at, v); }
};

inline Pack<double, 8> multiply_add(Pack<double, 8> a, Pack<double, 8> b, Pack<double, 8> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
inline Split<Pack<double, 8>> split(Pack<double, 8> x) { return {x, {_mm512_reduce_pd(x.v, _MM_FROUND_TO_NEG_INF)}}; }
inline Pack<double, 8> times_power(Pack<double, 8> p, Pack<double, 8> whole) {
  return {_mm512_scalef_pd(p.v, whole.v)};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

template <class A> constexpr int kPackWidth = 32 / static_cast<int>(sizeof(A));

template <> struct Pack<float, 8> {
  __m256 v;

  static Pack fill(float x) { return {_mm256_set1_ps(x)}; }
  static Pack load(const float* at) { return {_mm256_loadu_ps(at)}; }
  static Pack load(const Half* at) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)))}; }
  static Pack load(const BFloat16* at) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  void store(float* at) const { _mm256_storeu_ps(at, v); }
  void store(Half* at) const {
    const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), halves);
  }
  void store(BFloat16* at) const {
    const __m256i bits = _mm256_castps_si256(v), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, nan);
    const __m128i low = _mm256_castsi256_si128(wide), high = _mm256_extracti128_si256(wide, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_packus_epi32(low, high));
  }
};

inline Pack<float, 8> multiply_add(Pack<float, 8> a, Pack<float, 8> b, Pack<float, 8> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline Pack<float, 8> maximum(Pack<float, 8> a, Pack<float, 8> b) { return {_mm256_max_ps(a.v, b.v)}; }
// Of a NaN and a number the instructions give the second operand.
inline Split<Pack<float, 8>> split(Pack<float, 8> x) {
  const __m256 raised = _mm256_max_ps(_mm256_set1_ps(Exponents<float>::least), x.v);
  const __m256 bounded = _mm256_min_ps(_mm256_set1_ps(Exponents<float>::most), raised);
  const __m256 whole = _mm256_floor_ps(bounded);
  return {{whole}, {bounded - whole}};
}
inline Pack<float, 8> times_power(Pack<float, 8> p, Pack<float, 8> whole) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole.v), _mm256_set1_epi32(127));
  return {p.v * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}

template <> struct Pack<double, 4> {
  __m256d v;

  static Pack fill(double x) { return {_mm256_set1_pd(x)}; }
  static Pack load(const double* at) { return {_mm256_loadu_pd(at)}; }
  void store(double* at) const { _mm256_storeu_pd(at, v); }
};

inline Pack<double, 4> multiply_add(Pack<double, 4> a, Pack<double, 4> b, Pack<double, 4> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
inline Split<Pack<double, 4>> split(Pack<double, 4> x) {
  const __m256d raised = _mm256_max_pd(_mm256_set1_pd(Exponents<double>::least), x.v);
  const __m256d bounded = _mm256_min_pd(_mm256_set1_pd(Exponents<double>::most), raised);
  const __m256d whole = _mm256_floor_pd(bounded);
  return {{whole}, {bounded - whole}};
}
inline Pack<double, 4> times_power(Pack<double, 4> p, Pack<double, 4> whole) {
  const __m256i bits = _mm256_castpd_si256(_mm256_add_pd(whole.v, _mm256_set1_pd(Exponents<double>::rounder)));
  const __m256i exponent = _mm256_add_epi64(bits, _mm256_set1_epi64x(1023));
  return {p.v * _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52))};
}

#elif defined(__GNUC__)

// The compiler's own vectors, in the registers that every processor of the architecture has.
template <class A> constexpr int kPackWidth = 16 / static_cast<int>(sizeof(A));

template <class A> struct Registers;
template <> struct Registers<float> {
  typedef float Numbers __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  static constexpr uint32_t bias = 127, mantissa = 23;
};
template <> struct Registers<double> {
  typedef double Numbers __attribute__((vector_size(16)));
  typedef uint64_t Bits __attribute__((vector_size(16)));
  static constexpr uint64_t bias = 1023, mantissa = 52;
};

template <class A, int N> struct Pack {
  typename Registers<A>::Numbers v;

  static Pack fill(A x) { return {x - typename Registers<A>::Numbers{}}; }
  static Pack load(const A* at) {
    Pack pack;
    memcpy(&pack.v, at, sizeof pack.v);
    return pack;
  }
  template <class T> static Pack load(const T* at) {
    Pack pack;
    for (int i = 0; i < N; ++i) pack.v[i] = widen(at[i]);
    return pack;
  }
  void store(A* at) const { memcpy(at, &v, sizeof v); }
  template <class T> void store(T* at) const {
    for (int i = 0; i < N; ++i) at[i] = narrow<T>(v[i]);
  }
};

template <class A, int N> inline Pack<A, N> multiply_add(Pack<A, N> a, Pack<A, N> b, Pack<A, N> c) {
  return a * b + c;
}
template <class A, int N> inline Pack<A, N> maximum(Pack<A, N> a, Pack<A, N> b) { return {a.v > b.v ? a.v : b.v}; }
template <class A, int N> inline Split<Pack<A, N>> split(Pack<A, N> x) {
  using E = Exponents<A>;
  const Pack<A, N> least = Pack<A, N>::fill(E::least), most = Pack<A, N>::fill(E::most);
  const Pack<A, N> raised{least.v > x.v ? least.v : x.v}, bounded{most.v < raised.v ? most.v : raised.v};
  const Pack<A, N> whole{bounded.v - static_cast<A>(0.5) + E::rounder - E::rounder};
  return {whole, bounded - whole};
}
template <class A, int N> inline Pack<A, N> times_power(Pack<A, N> p, Pack<A, N> whole) {
  using R = Registers<A>;
  const auto shifted = whole.v + Exponents<A>::rounder;
  const auto power = (reinterpret_cast<typename R::Bits>(shifted) + R::bias) << R::mantissa;
  return {p.v * reinterpret_cast<typename R::Numbers>(power)};
}

#else

template <class A> constexpr int kPackWidth = 1;

#endif

// K packs that lie behind one another, which a loop takes at once.
template <class A, int N, int K> struct Strip {
  static constexpr int packs = K, width = N;
  using type = Pack<A, N>;
};

// Calls work(Strip, i) so that the strips that start at the i cover [0, n): wide ones first, single numbers last.
template <class A, class Work> inline void over_strips(int64_t n, const Work& work) {
  constexpr int width = kPackWidth<A>;
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) work(Strip<A, width, 4>{}, i);
  for (; i + width <= n; i += width) work(Strip<A, width, 1>{}, i);
  for (; i < n; ++i) work(Strip<A, 1, 1>{}, i);
}

}  // namespace
}  // namespace lf

#endif  // LF_COMMON_PACK_H
