// What convolutions and attention over time ask of packs of floats besides common/pack.h. Everything has internal
// linkage: see common/scalar.h.
#ifndef LF_COMMON_CONV_LANES_H
#define LF_COMMON_CONV_LANES_H

#include <type_traits>

#include "common/pack.h"

namespace lf {
namespace {

constexpr int kLanes = kPackWidth<float>;
using Lanes = Pack<float, kLanes>;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls at(m, v) for each sum. Unrolled: only what is known when compiled can tell one register from another.
#if defined(__clang__)
#define LF_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define LF_UNROLL _Pragma("GCC unroll 16")
#else
#define LF_UNROLL
#endif
template <int M, int V, class At> inline void for_sums(const At& at) {
  LF_UNROLL for (int m = 0; m < M; ++m) {
    LF_UNROLL for (int v = 0; v < V; ++v) at(m, v);
  }
}
#undef LF_UNROLL

// The first n of a pack, the others 0; and the first n to memory.
template <class T> inline Lanes load(const T* p, int64_t n) {
  T some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return Lanes::load(some);
}
template <class T> inline void store(T* p, Lanes x, int64_t n) {
  T some[kLanes];
  x.store(some);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

// Past the caches, to a multiple of the pack's size; others see it after `end_streams`.
#if defined(__AVX512F__)
inline __mmask16 first_of(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Lanes load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_of(n), p)}; }
inline void store(float* p, Lanes x, int64_t n) { _mm512_mask_storeu_ps(p, first_of(n), x.v); }
inline void stream(float* p, Lanes x) { _mm512_stream_ps(p, x.v); }
inline void end_streams() { _mm_sfence(); }
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
inline __m256i first_of(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Lanes load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first_of(n))}; }
inline void store(float* p, Lanes x, int64_t n) { _mm256_maskstore_ps(p, first_of(n), x.v); }
inline void stream(float* p, Lanes x) { _mm256_stream_ps(p, x.v); }
inline void end_streams() { _mm_sfence(); }
#else
inline void stream(float* p, Lanes x) { x.store(p); }
inline void end_streams() {}
#endif

// Where it is known that all lanes are in use.
using All = std::integral_constant<int64_t, kLanes>;
template <class T> inline Lanes load(const T* p, All) { return Lanes::load(p); }
template <class T> inline void store(T* p, Lanes x, All) { x.store(p); }

// Calls at(i, n) for each pack of `length` numbers: where it starts, and how many of its lanes are in use.
template <class At> inline void for_lanes(int64_t length, const At& at) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) at(i, All());
  if (i < length) at(i, length - i);
}

// Turns rows into columns: lane j of row i becomes lane i of row j.
inline void transpose(Lanes (&rows)[kLanes]) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = rows[i].v;
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = {r[i]};
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = rows[i].v;
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) rows[i] = {t[i]};
#else
  float square[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i].store(square[i]);
  for (int i = 0; i < kLanes; ++i) {
    float column[kLanes];
    for (int j = 0; j < kLanes; ++j) column[j] = square[j][i];
    rows[i] = Lanes::load(column);
  }
#endif
}

}  // namespace
}  // namespace lf

#endif  // LF_COMMON_CONV_LANES_H
