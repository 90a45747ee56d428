// A vector of floats, as wide as the processor that a translation unit is compiled for has them, and what the kernels do
// with it. Everything has internal linkage: see common/scalar.h.
#ifndef LF_TEMPORAL_CONV_LANES_H
#define LF_TEMPORAL_CONV_LANES_H

#include "common/scalar.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the intrinsics' own operands that do not matter
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace lf {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

constexpr int kLanes = 16;
using Lanes = __m512;

inline __mmask16 first_of(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Lanes load(const float* p) { return _mm512_loadu_ps(p); }
inline Lanes load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_of(n), p); }
inline Lanes load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Lanes load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, Lanes x, int64_t n) { _mm512_mask_storeu_ps(p, first_of(n), x); }
inline void store(Half* p, Lanes x) {
  const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
inline void store(BFloat16* p, Lanes x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i upper = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
}
// Past the caches, to a multiple of the vector's size; others see it after `end_streams`.
inline void stream(float* p, Lanes x) { _mm512_stream_ps(p, x); }
inline void end_streams() { _mm_sfence(); }
inline Lanes broadcast(float x) { return _mm512_set1_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes largest(Lanes a, Lanes or_nan) { return _mm512_max_ps(a, or_nan); }
// x * 2^n, where n is in the low bits of `exponents`.
inline Lanes scale(Lanes x, Lanes exponents) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(exponents), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), n));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int kLanes = 8;
using Lanes = __m256;

inline __m256i first_of(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Lanes load(const float* p) { return _mm256_loadu_ps(p); }
inline Lanes load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_of(n)); }
inline Lanes load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Lanes load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store(float* p, Lanes x) { _mm256_storeu_ps(p, x); }
inline void store(float* p, Lanes x, int64_t n) { _mm256_maskstore_ps(p, first_of(n), x); }
inline void store(Half* p, Lanes x) {
  const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
inline void store(BFloat16* p, Lanes x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void stream(float* p, Lanes x) { _mm256_stream_ps(p, x); }
inline void end_streams() { _mm_sfence(); }
inline Lanes broadcast(float x) { return _mm256_set1_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes largest(Lanes a, Lanes or_nan) { return _mm256_max_ps(a, or_nan); }
inline Lanes scale(Lanes x, Lanes exponents) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(exponents), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n));
}

#else

constexpr int kLanes = 4;
struct Lanes {
  float of[kLanes];
};

template <class F> inline Lanes each(const F& value) {
  Lanes lanes;
  for (int i = 0; i < kLanes; ++i) lanes.of[i] = value(i);
  return lanes;
}

template <class T> inline Lanes load(const T* p) {
  return each([=](int i) { return widen(p[i]); });
}
inline Lanes load(const float* p, int64_t n) {
  return each([=](int i) { return i < n ? p[i] : 0.0f; });
}
template <class T> inline void store(T* p, Lanes x) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow<T>(x.of[i]);
}
inline void store(float* p, Lanes x, int64_t n) {
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) p[i] = x.of[i];
  }
}
inline void stream(float* p, Lanes x) { store(p, x); }
inline void end_streams() {}
inline Lanes broadcast(float x) {
  return each([=](int) { return x; });
}
inline Lanes operator+(Lanes a, Lanes b) {
  return each([&](int i) { return a.of[i] + b.of[i]; });
}
inline Lanes operator-(Lanes a, Lanes b) {
  return each([&](int i) { return a.of[i] - b.of[i]; });
}
inline Lanes operator*(Lanes a, Lanes b) {
  return each([&](int i) { return a.of[i] * b.of[i]; });
}
inline Lanes operator/(Lanes a, Lanes b) {
  return each([&](int i) { return a.of[i] / b.of[i]; });
}
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return a.of[i] * b.of[i] + c.of[i]; });
}
inline Lanes largest(Lanes a, Lanes or_nan) {
  return each([&](int i) { return a.of[i] > or_nan.of[i] ? a.of[i] : or_nan.of[i]; });
}
inline Lanes scale(Lanes x, Lanes exponents) {
  return each([&](int i) { return float_of(bits_of(x.of[i]) + (bits_of(exponents.of[i]) << 23)); });
}

#endif

// e^x to within 1 ulp for -87 <= x <= 88: 2^n e^r with |r| <= ln(2)/2, and a polynomial for (e^r - 1 - r) / r^2.
inline Lanes exponential(Lanes x) {
  const Lanes round = broadcast(0x1.8p23f);  // added and taken off again, it leaves a whole number
  const Lanes shifted = multiply_add(x, broadcast(0x1.715476p0f), round), n = shifted - round;
  Lanes r = multiply_add(n, broadcast(-0x1.62e400p-1f), x);  // ln(2) in two parts: n times the first is exact
  r = multiply_add(n, broadcast(-0x1.7f7d1cp-20f), r);
  Lanes p = multiply_add(broadcast(0x1.6a27d2p-10f), r, broadcast(0x1.123a78p-7f));
  p = multiply_add(p, r, broadcast(0x1.5558eep-5f));
  p = multiply_add(p, r, broadcast(0x1.555490p-3f));
  p = multiply_add(p, r, broadcast(0x1.fffffcp-2f));
  p = multiply_add(p, r * r, r) + broadcast(1.0f);
  return scale(p, shifted);
}

// x / (1 + e^-x). Below -88 and above 87 it is 0 and x to within fp32, and e^-x would not be within reach.
inline Lanes silu(Lanes x) {
  const Lanes above = largest(broadcast(-88.0f), x);
  return above / (broadcast(1.0f) + exponential(largest(broadcast(-87.0f), broadcast(0.0f) - above)));
}

// Turns rows into columns: lane j of row i becomes lane i of row j.
inline void transpose(Lanes (&rows)[kLanes]) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  Lanes t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    rows[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    rows[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    rows[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  Lanes t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    rows[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    rows[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    rows[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    rows[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) rows[i] = t[i];
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = rows[i].of[j];
      rows[i].of[j] = rows[j].of[i];
      rows[j].of[i] = kept;
    }
  }
#endif
}

}  // namespace
}  // namespace lf

#endif  // LF_TEMPORAL_CONV_LANES_H
