// A stretch of a row of fixed taps, for the width of vectors that this file is compiled for; see resample_stretch.h.
// Three translation units include it. All of it has internal linkage.
//
// value = sum over W of weight (sum over H of weight (sum over T of weight x)), each sum from its first term on and
// without fused multiply-adds: the same bits on every processor, and on a CUDA device. The inner two sums of all
// samples of a stretch go into a row of scratch memory, from which the outer one is made.
#ifndef LF_COMMON_RESAMPLE_KERNEL_H
#define LF_COMMON_RESAMPLE_KERNEL_H

#include <type_traits>

#include "common/pack.h"
#include "common/resample_stretch.h"

namespace lf {
namespace {

constexpr int kLineBytes = 64;

// Past the caches, to a multiple of the size.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int64_t kStreamBytes = 32;
inline void stream_bytes(void* to, const void* from) {
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
inline void end_streams() noexcept { _mm_sfence(); }
#else
constexpr int64_t kStreamBytes = 32;
inline void stream_bytes(void* to, const void* from) { memcpy(to, from, kStreamBytes); }
inline void end_streams() noexcept {}
#endif
inline void stream(void* to, const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kStreamBytes) {
    stream_bytes(static_cast<char*>(to) + i, static_cast<const char*>(from) + i);
  }
}

template <bool kStream, class T, class P> inline void put(T* to, P pack) {
  constexpr int64_t bytes = sizeof(P) / sizeof(Acc<T>) * sizeof(T);
  if constexpr (kStream && bytes % kStreamBytes == 0) {
    alignas(64) T some[bytes / sizeof(T)];
    pack.store(some);
    stream(to, some, bytes);
  } else {
    pack.store(to);
  }
}

// As over_strips, but what is left over of whole packs is done by one that overlaps the last.
template <class A, class Work> inline void over_packs(int64_t n, const Work& work) {
  constexpr int width = kPackWidth<A>;
  if (n < width) {
    for (int64_t i = 0; i < n; ++i) work(Strip<A, 1, 1>{}, i);
    return;
  }
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) work(Strip<A, width, 4>{}, i);
  for (; i + width <= n; i += width) work(Strip<A, width, 1>{}, i);
  if (i < n) work(Strip<A, width, 1>{}, n - width);
}

template <bool kStream, class T> inline void copy(T* to, const T* from, int64_t n) {
  if constexpr (kStream) stream(to, from, n * static_cast<int64_t>(sizeof(T)));
  else memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

// --- along T and H ---------------------------------------------------------------------------------------------------

// Each line is asked for a page ahead: the processor itself follows no more than a few of the many rows that are read at
// once, and none of them into the next page.
constexpr int64_t kAheadBytes = 4096;
template <class T, int Width> inline void prefetch_ahead(const T* at, int index) {
  constexpr int bytes = Width * static_cast<int>(sizeof(T));
  if (index * bytes % kLineBytes == 0) prefetch(reinterpret_cast<const char*>(at + index * Width) + kAheadBytes);
}

// n samples behind one another, from `from` on in each frame and row; to results or to scratch memory.
template <bool kStream, class T, class D> inline void combine(const Stretch<T>& s, const T* from, D* to, int64_t n) {
  using A = Acc<T>;
  const Terms<A>&t = *s.t, &h = *s.h;
  from += t.first * s.frame + h.first * s.row;
  over_packs<A>(n, [&](auto strip, int64_t i) {
    using P = typename decltype(strip)::type;
    constexpr int packs = decltype(strip)::packs, width = decltype(strip)::width;
    const auto row = [&](int64_t k, P(&sums)[packs]) {  // along T, times its weight along H
      const T* at = from + k * s.row + i;
      for (int p = 0; p < packs; ++p) {
        prefetch_ahead<T, width>(at, p);
        sums[p] = P::fill(t.weights[0]) * P::load(at + p * width);
      }
      for (int64_t j = 1; j < t.count; ++j) {
        at += s.frame;
        for (int p = 0; p < packs; ++p) {
          prefetch_ahead<T, width>(at, p);
          sums[p] = sums[p] + P::fill(t.weights[j]) * P::load(at + p * width);
        }
      }
      for (int p = 0; p < packs; ++p) sums[p] = P::fill(h.weights[k]) * sums[p];
    };
    P sums[packs], others[packs];
    row(0, sums);
    for (int64_t k = 1; k < h.count; ++k) {
      row(k, others);
      for (int p = 0; p < packs; ++p) sums[p] = sums[p] + others[p];
    }
    for (int p = 0; p < packs; ++p) {
      if constexpr (std::is_same_v<D, T>) put<kStream>(to + i + p * width, sums[p]);
      else sums[p].store(to + i + p * width);
    }
  });
}

// `pixels` of them; results, and scratch memory, `to_pixel` apart.
template <bool kStream, class T, class D>
inline void combine_pixels(const Stretch<T>& s, int64_t first, int64_t pixels, D* to, int64_t to_pixel) {
  const T* from = s.from + first * s.pixel;
  if (s.pixel == s.channels && to_pixel == s.channels) return combine<kStream>(s, from, to, pixels * s.channels);
  for (int64_t i = 0; i < pixels; ++i) combine<kStream>(s, from + i * s.pixel, to + i * to_pixel, s.channels);
}

// --- along W ---------------------------------------------------------------------------------------------------------

// One result of each of a number of groups that are alike.
template <class T, class S> struct Results {
  const S* from;
  int64_t pixel, from_step;
  T* to;
  int64_t to_step, groups, channels;
  const Acc<T>* weights;
  int64_t taps;
};

// Taps: their number, or 0 where that is known only at run time.
template <int Taps, bool kStream, class T, class S> inline void add_up(const Results<T, S>& r) {
  using A = Acc<T>;
  const int64_t taps = Taps ? Taps : r.taps;
  A weights[Taps ? Taps : kMostTaps];
  for (int64_t k = 0; k < taps; ++k) weights[k] = r.weights[k];
  if (r.channels == 1) {
    for (int64_t g = 0; g < r.groups; ++g) {
      const S* at = r.from + g * r.from_step;
      A sum = weights[0] * widen(at[0]);
      for (int64_t k = 1; k < taps; ++k) sum = sum + weights[k] * widen(at[k * r.pixel]);
      r.to[g * r.to_step] = narrow<T>(sum);
    }
    return;
  }
  for (int64_t g = 0; g < r.groups; ++g) {
    const S* from = r.from + g * r.from_step;
    T* to = r.to + g * r.to_step;
    over_packs<A>(r.channels, [&](auto strip, int64_t i) {
      using P = typename decltype(strip)::type;
      constexpr int packs = decltype(strip)::packs, width = decltype(strip)::width;
      P sums[packs];
      for (int p = 0; p < packs; ++p) sums[p] = P::fill(weights[0]) * P::load(from + i + p * width);
      for (int64_t k = 1; k < taps; ++k) {
        const S* at = from + k * r.pixel + i;
        for (int p = 0; p < packs; ++p) sums[p] = sums[p] + P::fill(weights[k]) * P::load(at + p * width);
      }
      for (int p = 0; p < packs; ++p) put<kStream>(to + i + p * width, sums[p]);
    });
  }
}

template <bool kStream, class T> inline void copy_each(const Results<T, T>& r) {
  if (r.channels == 1) {
    for (int64_t g = 0; g < r.groups; ++g) r.to[g * r.to_step] = r.from[g * r.from_step];
  } else {
    for (int64_t g = 0; g < r.groups; ++g) copy<kStream>(r.to + g * r.to_step, r.from + g * r.from_step, r.channels);
  }
}

template <class T, class S> inline void clear_each(const Results<T, S>& r) {
  for (int64_t g = 0; g < r.groups; ++g) {
    for (int64_t c = 0; c < r.channels; ++c) r.to[g * r.to_step + c] = T{};
  }
}

template <bool kStream, class T, class S> inline void results(const Results<T, S>& r) {
  if constexpr (std::is_same_v<T, S>) {
    if (r.taps == 1 && r.weights[0] == 1) return copy_each<kStream>(r);
  }
  switch (r.taps) {
    case 0: return clear_each(r);
    case 1: return add_up<1, kStream>(r);
    case 2: return add_up<2, kStream>(r);
    case 3: return add_up<3, kStream>(r);
    case 4: return add_up<4, kStream>(r);
    default: return add_up<0, kStream>(r);
  }
}

// Where a row of samples lies: `pixel` apart, those of a group `step` of them behind those of the one before. Where
// `packed`, from `origin`, with no others than a group needs.
template <class S> struct Samples {
  const S* data;
  int64_t pixel, step, origin;
  bool packed;
};

template <bool kStream, class T, class S> inline void across(const Stretch<T>& s, const Samples<S>& from) {
  const Across<Acc<T>>& w = *s.w;
  const auto alike = [&](const Group<Acc<T>>& group, int64_t begin, int64_t end) {
    for (int64_t p = 0; p < w.phases && begin < end; ++p) {
      const int64_t first = group.first[p] - (from.packed ? group.low : 0);
      const S* data = from.data + (begin * from.step + first - from.origin) * from.pixel;
      T* to = s.to + (begin * w.phases + p) * s.to_pixel;
      results<kStream>(Results<T, S>{data, from.pixel, from.step * from.pixel, to, w.phases * s.to_pixel, end - begin,
                                     s.channels, group.weights[p], group.count[p]});
    }
  };
  const int64_t last = w.groups - 1;
  const bool starts = s.begin == 0, ends = s.end == w.groups && last > 0;
  if (starts) alike(w.first, 0, 1);
  alike(w.inner, starts ? 1 : s.begin, ends ? last : s.end);
  if (ends) alike(w.last, last, s.end);
}

template <class A> inline const Group<A>& group_at(const Across<A>& w, int64_t i) {
  return i == 0 ? w.first : i == w.groups - 1 ? w.last : w.inner;
}

// --- a stretch -------------------------------------------------------------------------------------------------------

template <bool kStream, class T> inline void from_scratch(const Stretch<T>& s) {
  using A = Acc<T>;
  const Across<A>& w = *s.w;
  alignas(64) A scratch[kScratchBytes / sizeof(A)];
  if (w.gaps) {
    const int64_t size = w.end - w.low;
    for (int64_t i = s.begin; i < s.end; ++i) {
      const Group<A>& group = group_at(w, i);
      A* const to = scratch + (i - s.begin) * size * s.channels;
      combine_pixels<false>(s, i * w.step + group.low, group.end - group.low, to, s.channels);
    }
    return across<kStream>(s, Samples<A>{scratch, s.channels, size, s.begin * size, true});
  }
  const int64_t first = s.begin * w.step + group_at(w, s.begin).low;
  const int64_t end = (s.end - 1) * w.step + group_at(w, s.end - 1).end;
  combine_pixels<false>(s, first, end - first, scratch, s.channels);
  across<kStream>(s, Samples<A>{scratch, s.channels, w.step, first, false});
}

template <bool kStream, class T> inline void copy_row(const Stretch<T>& s, const T* row) {
  const T* from = row + s.begin * s.pixel;
  T* to = s.to + s.begin * s.to_pixel;
  const int64_t pixels = s.end - s.begin;
  if (s.pixel == s.channels && s.to_pixel == s.channels) return copy<kStream>(to, from, pixels * s.channels);
  for (int64_t i = 0; i < pixels; ++i) copy<kStream>(to + i * s.to_pixel, from + i * s.pixel, s.channels);
}

template <bool kStream, class T> void stretch(const Stretch<T>& s) noexcept {
  const Across<Acc<T>>& w = *s.w;
  if (s.t->count == 0 || s.h->count == 0) {
    const int64_t begin = s.begin * w.phases, pixels = (s.end - s.begin) * w.phases;
    T* const to = s.to + begin * s.to_pixel;
    return clear_each(Results<T, T>{nullptr, 0, 0, to, s.to_pixel, pixels, s.channels, nullptr, 0});
  }
  if (s.t->alone && s.h->alone) {
    const T* row = s.from + s.t->first * s.frame + s.h->first * s.row;
    if (w.same) return copy_row<kStream>(s, row);
    return across<kStream>(s, Samples<T>{row, s.pixel, w.step, 0, false});
  }
  if (!w.same) return from_scratch<kStream>(s);
  combine_pixels<kStream>(s, s.begin, s.end - s.begin, s.to + s.begin * s.to_pixel, s.to_pixel);
}

template <class T> inline ResampleKernels<T> resample_kernels() noexcept {
  return {stretch<false, T>, stretch<true, T>, end_streams};
}

}  // namespace
}  // namespace lf

#endif  // LF_COMMON_RESAMPLE_KERNEL_H
