// One run of the output from the windows that cover it. Two translation units include this file: one for any processor
// of the architecture, one for AVX2. The loops are written for the compiler to turn into vectors; as no operation is
// reordered or contracted, both give the same numbers.
#ifndef LF_BLEND_WINDOWS_RUN_H
#define LF_BLEND_WINDOWS_RUN_H

#include "blend_windows.h"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace lf {

template <class T> struct Run {
  T* out;
  int64_t out_stride;
  int64_t length;
  int64_t num_parts;
  const T* const* parts;
  const int64_t* part_strides;
  const Acc<T>* shares;    // of part k: shares[k], or of its i-th element shares[k * share_stride + i]
  int64_t share_stride;    // 0 where a part's share is the same along the run
};

template <class T> void blend_run_portable(const Run<T>& run) noexcept;
template <class T> void blend_run_avx2(const Run<T>& run) noexcept;

namespace {

constexpr int64_t kBlock = 512;  // elements on their way through the first-level cache

template <class T> inline void widen_dense(Acc<T>* __restrict to, const T* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <class T> inline void narrow_dense(T* __restrict to, const Acc<T>* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(from[i]);
}

#if defined(__AVX2__) && defined(__F16C__)
template <> inline void widen_dense<Half>(float* __restrict to, const Half* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}

template <> inline void narrow_dense<Half>(Half* __restrict to, const float* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < n; ++i) to[i] = narrow<Half>(from[i]);
}
#endif

template <class T> inline void widen_block(Acc<T>* to, const T* from, int64_t stride, int64_t n) {
  if (stride == 1) return widen_dense(to, from, n);
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i * stride]);
}

template <class T> inline void narrow_block(T* to, int64_t stride, const Acc<T>* from, int64_t n) {
  if (stride == 1) return narrow_dense(to, from, n);
  for (int64_t i = 0; i < n; ++i) to[i * stride] = narrow<T>(from[i]);
}

template <class A>
inline void step_block(A* __restrict mean, A share, const A* __restrict part, const A* __restrict first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) mean[i] = blend_step(mean[i], share, part[i], first[i]);
}

template <class A>
inline void step_block(A* __restrict mean, const A* __restrict shares, const A* __restrict part,
                       const A* __restrict first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) mean[i] = blend_step(mean[i], shares[i], part[i], first[i]);
}

// What one window alone covers is its own, bit for bit.
template <class T> inline void copy_run(const Run<T>& run) {
  const T* from = run.parts[0];
  if (run.out_stride == 1 && run.part_strides[0] == 1) {
    std::memcpy(run.out, from, run.length * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < run.length; ++i) run.out[i * run.out_stride] = from[i * run.part_strides[0]];
}

template <class T> inline bool is_dense(const Run<T>& run) {
  bool dense = run.out_stride == 1;
  for (int64_t k = 0; k < run.num_parts; ++k) dense = dense && run.part_strides[k] == 1;
  return dense;
}

// Two windows that need no conversion, by far the commonest overlap: in one pass and without a stop in between.
template <class A>
inline void blend_pair(A* __restrict out, A share, const A* __restrict part, const A* __restrict first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = blend_step(first[i], share, part[i], first[i]);
}
template <class T> inline bool blend_pair_in_place(const Run<T>&) { return false; }
template <class A> inline bool blend_pair_of(const Run<A>& run) {
  if (run.num_parts != 2 || run.share_stride != 0 || !is_dense(run)) return false;
  blend_pair(run.out, run.shares[1], run.parts[1], run.parts[0], run.length);
  return true;
}
template <> inline bool blend_pair_in_place<float>(const Run<float>& run) { return blend_pair_of(run); }
template <> inline bool blend_pair_in_place<double>(const Run<double>& run) { return blend_pair_of(run); }

template <class T> inline void blend_run(const Run<T>& run) {
  if (run.num_parts == 1) return copy_run(run);
  if (blend_pair_in_place(run)) return;
  Acc<T> first[kBlock], mean[kBlock], part[kBlock];
  for (int64_t begin = 0; begin < run.length; begin += kBlock) {
    const int64_t n = run.length - begin < kBlock ? run.length - begin : kBlock;
    widen_block(first, run.parts[0] + begin * run.part_strides[0], run.part_strides[0], n);
    std::memcpy(mean, first, n * sizeof(Acc<T>));
    for (int64_t k = 1; k < run.num_parts; ++k) {
      widen_block(part, run.parts[k] + begin * run.part_strides[k], run.part_strides[k], n);
      if (run.share_stride == 0) {
        step_block(mean, run.shares[k], part, first, n);
      } else {
        step_block(mean, run.shares + k * run.share_stride + begin, part, first, n);
      }
    }
    narrow_block(run.out + begin * run.out_stride, run.out_stride, mean, n);
  }
}

}  // namespace
}  // namespace lf

#endif  // LF_BLEND_WINDOWS_RUN_H
