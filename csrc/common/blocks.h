// Blocks of elements on their way through the first-level cache: widened to the numbers of the arithmetic, blended, and
// narrowed again. The loops are written for the compiler to turn into vectors; as no operation is reordered or
// contracted, every translation unit that includes this file gives the same numbers.
//
// Everything here has internal linkage; see common/scalar.h.
#ifndef LF_COMMON_BLOCKS_H
#define LF_COMMON_BLOCKS_H

#include "common/blend.h"
#include "common/scalar.h"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace lf {

// Elements that lie at equal steps in each operand: some clips, and then the windows that cover them, as often as their
// batch holds the clip's.
template <class A> struct Run {
  int64_t length;
  char* const* at;         // each operand's first element
  const int64_t* strides;  // in elements
  int64_t num_parts;       // windows
  const A* shares;         // of part k: shares[k], or of its i-th element shares[k * share_stride + i]
  int64_t share_stride;    // 0 where a part's share is the same along the run
  int64_t place;           // elements of its box that the walk has before it
};

namespace {

constexpr int64_t kBlock = 512;

template <class A, class T> inline void widen_dense(A* __restrict to, const T* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(widen(from[i]));
}

template <class A, class T> inline void narrow_dense(T* __restrict to, const A* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(static_cast<Acc<T>>(from[i]));
}

#if defined(__AVX2__) && defined(__F16C__)
template <> inline void widen_dense(float* __restrict to, const Half* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}

template <> inline void narrow_dense(Half* __restrict to, const float* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < n; ++i) to[i] = narrow<Half>(from[i]);
}
#endif

template <class A, class T> inline void widen_block(A* to, const T* from, int64_t stride, int64_t n) {
  if (stride == 1) return widen_dense(to, from, n);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(widen(from[i * stride]));
}

template <class A, class T> inline void narrow_block(T* to, int64_t stride, const A* from, int64_t n) {
  if (stride == 1) return narrow_dense(to, from, n);
  for (int64_t i = 0; i < n; ++i) to[i * stride] = narrow<T>(static_cast<Acc<T>>(from[i]));
}

// From the first window to the second.
template <class A>
inline void blend_pair(A* __restrict out, A share, const A* __restrict part, const A* __restrict first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = blend_step(first[i], share, part[i], first[i]);
}

template <class A>
inline void blend_pair(A* __restrict out, const A* __restrict shares, const A* __restrict part,
                       const A* __restrict first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = blend_step(first[i], shares[i], part[i], first[i]);
}

// And on to a further one.
template <class A>
inline void blend_further(A* __restrict mean, A share, const A* __restrict part, const A* __restrict first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) mean[i] = blend_step(mean[i], share, part[i], first[i]);
}

template <class A>
inline void blend_further(A* __restrict mean, const A* __restrict shares, const A* __restrict part,
                          const A* __restrict first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) mean[i] = blend_step(mean[i], shares[i], part[i], first[i]);
}

// The mean of a block of a run, which starts at its element `begin`, in `mean` or, of a single window, where it lies.
// load(k, room) is where the block of window k can be read: where it lies, or in `room`.
template <class A, class Load>
inline const A* blend_block(const Run<A>& run, int64_t begin, int64_t n, A* mean, const Load& load) {
  if (run.num_parts == 1) return load(0, mean);
  A first_room[kBlock], part_room[kBlock];
  const A* const first = load(0, first_room);
  for (int64_t k = 1; k < run.num_parts; ++k) {
    const A* const part = load(k, part_room);
    if (run.share_stride == 0) {
      k == 1 ? blend_pair(mean, run.shares[k], part, first, n) : blend_further(mean, run.shares[k], part, first, n);
    } else {
      const A* const shares = run.shares + k * run.share_stride + begin;
      k == 1 ? blend_pair(mean, shares, part, first, n) : blend_further(mean, shares, part, first, n);
    }
  }
  return mean;
}

}  // namespace
}  // namespace lf

#endif  // LF_COMMON_BLOCKS_H
