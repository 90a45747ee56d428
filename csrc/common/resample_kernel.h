// A row of fixed taps, for the width of vectors that this file is compiled for; see resample_row.h. Three translation
// units include it. All of it has internal linkage.
//
// value = sum over W of weight (sum over H of weight (sum over T of weight x)), each sum in the order of its places and
// without fused multiply-adds: the same bits on every processor, and on a CUDA device, but for those of a NaN. A few
// vectors of channels walk along W: each column of samples is summed over T and H once, in registers, for all results
// of a part of the row.
#ifndef LF_COMMON_RESAMPLE_KERNEL_H
#define LF_COMMON_RESAMPLE_KERNEL_H

#include "common/pack.h"
#include "common/resample_row.h"

namespace lf {
namespace {

// --- past the caches -------------------------------------------------------------------------------------------------

// kBytes of a vector's, to a multiple of them.
template <int kBytes> inline void stream(void* to, const void* from) {
#if defined(__AVX512F__)
  if constexpr (kBytes == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  if constexpr (kBytes == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }
  if constexpr (kBytes == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
  }
#endif
  memcpy(to, from, kBytes);
}

inline void end_streams() noexcept {
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
  _mm_sfence();
#endif
}

template <class T, class P, int N> inline void put(T* to, const P (&packs)[N], bool streams) {
  constexpr int width = sizeof(P) / sizeof(Acc<T>);
  for (int p = 0; p < N; ++p) {
    if (streams) {
      T some[width];
      packs[p].store(some);
      stream<sizeof some>(to + p * width, some);
    } else {
      packs[p].store(to + p * width);
    }
  }
}

// --- along T and H ---------------------------------------------------------------------------------------------------

// A number of taps known here, or only at run time.
template <class A, int kCount> struct Taps {
  static constexpr int64_t count = kCount;
  A weights[kCount];
  explicit Taps(const Terms<A>& terms) { memcpy(weights, terms.weights, sizeof weights); }
};
template <class A> struct Taps<A, 0> {
  const int64_t count;
  const A* const weights;
  explicit Taps(const Terms<A>& terms) : count(terms.count), weights(terms.weights) {}
};

// The first term of sums, and another.
template <class P, int N> inline void set(P weight, const P (&values)[N], P (&sums)[N]) {
  for (int p = 0; p < N; ++p) sums[p] = weight * values[p];
}
template <class P, int N> inline void add(P weight, const P (&values)[N], P (&sums)[N]) {
  for (int p = 0; p < N; ++p) sums[p] = sums[p] + weight * values[p];
}

template <class P, int N, class S> inline void load(const S* from, P (&packs)[N]) {
  constexpr int width = sizeof(P) / sizeof(Acc<S>);
  for (int p = 0; p < N; ++p) packs[p] = P::load(from + p * width);
}

constexpr uint64_t kAheadBytes = 2048;

// The columns of a row, summed over T and H. With kAhead those further on are asked for: rows of several frames are
// more streams than the processor foresees by itself. Where a sample is read many times over, or goes into many
// results, it only costs.
template <class T, int kT, int kH, bool kAhead> class Columns {
  using A = Acc<T>;
  const Taps<A, kT> t;
  const Taps<A, kH> h;
  const T* const from;
  const int64_t frame, row, pixel;
  const uint64_t ahead;  // in bytes; it wraps where a stride is huge

 public:
  explicit Columns(const Row<T>& r)
      : t(*r.t), h(*r.h), from(r.from + r.t->first * r.frame + r.h->first * r.row), frame(r.frame), row(r.row),
        pixel(r.pixel),
        ahead((kAheadBytes / (r.channels * sizeof(T)) + 1) * sizeof(T) * static_cast<uint64_t>(r.pixel)) {}

  template <class P, int N> void sum(int64_t column, int64_t channel, P (&sums)[N]) const {
    const T* at = from + column * pixel + channel;
    P inner[N];
    sum_frames(at, inner);
    set(P::fill(h.weights[0]), inner, sums);
    for (int64_t k = 1; k < h.count; ++k) {
      sum_frames(at += row, inner);
      add(P::fill(h.weights[k]), inner, sums);
    }
  }

 private:
  template <class P, int N> void sum_frames(const T* at, P (&sums)[N]) const {
    P values[N];
    load_column(at, values);
    set(P::fill(t.weights[0]), values, sums);
    for (int64_t k = 1; k < t.count; ++k) {
      load_column(at += frame, values);
      add(P::fill(t.weights[k]), values, sums);
    }
  }

  template <class P, int N> void load_column(const T* at, P (&values)[N]) const {
    constexpr int width = sizeof(P) / sizeof(Acc<T>);
    load(at, values);
    for (int p = 0; kAhead && p < N; ++p) {
      prefetch<1>(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at + p * width) + ahead));
    }
  }
};

// --- along W ---------------------------------------------------------------------------------------------------------

// N packs of channels of a row. A column goes into the result at hand, and maybe the next.
template <class P, int N, class T, class Source>
inline void walk_to_coarse(const Row<T>& r, const Source& source, int64_t channel) {
  P sums[N], next[N], column[N];
  const P none = P::fill(-Acc<T>(0));  // plus anything is that
  for (int p = 0; p < N; ++p) sums[p] = next[p] = none;
  int64_t at = r.part.steps->first;
  for (const auto *s = r.part.steps, *end = s + r.part.size; s != end; ++s) {
    source.sum(s->fine, channel, column);
    if (s->first != at) {
      put(r.to + at++ * r.to_pixel + channel, sums, r.streams);
      for (int p = 0; p < N; ++p) sums[p] = next[p], next[p] = none;
    }
    add(P::fill(s->weights[0]), column, sums);
    if (s->count > 1) add(P::fill(s->weights[1]), column, next);
  }
  put(r.to + at * r.to_pixel + channel, sums, r.streams);
}

// The last two columns are kept.
template <class P, int N, class T, class Source>
inline void walk_to_fine(const Row<T>& r, const Source& source, int64_t channel) {
  P first[N] = {}, second[N] = {}, results[N];
  int64_t place = -1;
  bool both = false;
  for (const auto *s = r.part.steps, *end = s + r.part.size; s != end; ++s) {
    if (s->count > 0 && s->first != place) {
      if (both && s->first == place + 1) {
        for (int p = 0; p < N; ++p) first[p] = second[p];
      } else {
        source.sum(s->first, channel, first);
      }
      place = s->first, both = false;
    }
    if (s->count > 1 && !both) source.sum(place + 1, channel, second), both = true;
    set(P::fill(s->weights[0]), first, results);
    if (s->count > 1) add(P::fill(s->weights[1]), second, results);
    for (int p = 0; p < N && s->count == 0; ++p) results[p] = P::fill(0);
    put(r.to + s->fine * r.to_pixel + channel, results, r.streams);
  }
}

template <bool kToCoarse, class P, int N, class T, class Source>
inline void walk(const Row<T>& r, const Source& source, int64_t channel) {
  if constexpr (kToCoarse) walk_to_coarse<P, N>(r, source, channel);
  else walk_to_fine<P, N>(r, source, channel);
}

// --- a row -----------------------------------------------------------------------------------------------------------

constexpr int kMostPacks = 4;

// Calls work(Strip, i) so that the strips that start at the i cover [0, n), where n is a pack at least: the last one
// overlaps others.
template <class A, int N = kMostPacks, class Work> inline void over_packs(int64_t n, const Work& work, int64_t i = 0) {
  constexpr int width = kPackWidth<A>;
  for (; i + N * width <= n; i += N * width) work(Strip<A, width, N>{}, i);
  if constexpr (N > 1) over_packs<A, N / 2>(n, work, i);
  else if (i < n) work(Strip<A, width, 1>{}, n - width);
}

// A part of a row whose columns are summed already, `channels` each and behind one another, and where results go.
template <class A> struct Summed {
  const Part<A>& part;
  const Across<A>& across;
  int64_t channels;
  const A* columns;
  A* to;  // the part's first result
  int64_t to_pixel;
};

// What is not 0 of the numbers is known here: of coarse places that are alike, the compiler then takes many at a time.
// With kDense it is known, too, that results go behind one another.
template <bool kToCoarse, bool kDense, int kFactor, int kChannels, int kTaps, class A>
inline void add_up(const Summed<A>& s, const Alike<A>& alike) {
  const int64_t factor = kFactor ? kFactor : s.across.factor, channels = kChannels ? kChannels : s.channels;
  const int64_t taps = kTaps ? kTaps : alike.count, step = kToCoarse ? factor * channels : channels;
  const int64_t begin = alike.begin > s.part.begin ? alike.begin : s.part.begin;
  const int64_t n = (alike.end < s.part.end ? alike.end : s.part.end) - begin;
  const int64_t to_pixel = kDense ? channels : s.to_pixel, to_step = (kToCoarse ? 1 : factor) * to_pixel;
  const A* __restrict from = s.columns + (alike.sample - s.part.low) * channels + begin * step;
  A* __restrict to = s.to + alike.first * to_pixel + (begin - s.part.begin) * to_step;
  A weights[kTaps ? kTaps : kMostTaps];
  for (int64_t k = 0; k < taps; ++k) weights[k] = alike.weights[k];
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      A sum = taps > 0 ? weights[0] * from[i * step + c] : 0;
      for (int64_t k = 1; k < taps; ++k) sum = sum + weights[k] * from[i * step + k * channels + c];
      to[i * to_step + c] = sum;
    }
  }
}

template <bool kToCoarse, bool kDense, int kFactor, int kChannels, class A>
inline void add_up_taps(const Summed<A>& s) {
  const Alike<A>* const list = s.across.list;
  for (int64_t i = 0; i < s.across.size; ++i) {
    switch (list[i].count) {
      case 1: add_up<kToCoarse, kDense, kFactor, kChannels, 1>(s, list[i]); break;
      case 2: add_up<kToCoarse, kDense, kFactor, kChannels, 2>(s, list[i]); break;
      case 3: add_up<kToCoarse, kDense, kFactor, kChannels, 3>(s, list[i]); break;
      case 4: add_up<kToCoarse, kDense, kFactor, kChannels, 4>(s, list[i]); break;
      case 8: add_up<kToCoarse, kDense, kFactor, kChannels, 8>(s, list[i]); break;
      default: add_up<kToCoarse, kDense, kFactor, kChannels, 0>(s, list[i]);
    }
  }
}

template <bool kToCoarse, bool kDense, class A> inline void add_up_row(const Summed<A>& s) {
  if (s.channels == 3) return add_up_taps<kToCoarse, kDense, 0, 3>(s);
  if (s.channels > 1) return add_up_taps<kToCoarse, kDense, 0, 0>(s);
  switch (s.across.factor) {
    case 2: return add_up_taps<kToCoarse, kDense, 2, 1>(s);
    case 4: return add_up_taps<kToCoarse, kDense, 4, 1>(s);
    default: return add_up_taps<kToCoarse, kDense, 0, 1>(s);
  }
}

// Results of `pixels` that lie behind one another, rounded.
template <class T> inline void write_row(const Row<T>& r, T* to, const Acc<T>* results, int64_t pixels) {
  using A = Acc<T>;
  const int64_t n = pixels * r.channels;
  if (r.to_pixel == r.channels && n >= kPackWidth<A>) {
    over_packs<A>(n, [&](auto strip, int64_t i) {
      typename decltype(strip)::type packs[strip.packs];
      load(results + i, packs);
      put(to + i, packs, false);
    });
    return;
  }
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < r.channels; ++c) to[i * r.to_pixel + c] = narrow<T>(results[i * r.channels + c]);
  }
}

// Channels too few for a pack: the columns are summed first, in packs where they lie behind one another.
template <bool kToCoarse, class T> inline void narrow_row(const Row<T>& r) {
  using A = Acc<T>;
  constexpr bool rounds = sizeof(A) > sizeof(T);
  A columns[kMostSteps * kPackWidth<A>], results[rounds ? kMostSteps * kPackWidth<A> : 1];
  const Columns<T, 0, 0, false> source(r);
  const int64_t n = (r.part.high - r.part.low) * r.channels;
  if (r.pixel == r.channels && n >= kPackWidth<A>) {
    over_packs<A>(n, [&](auto strip, int64_t i) {
      typename decltype(strip)::type packs[strip.packs];
      source.sum(r.part.low, i, packs);
      put(columns + i, packs, false);
    });
  } else {
    for (int64_t i = 0; i < n; ++i) {
      Pack<A, 1> one[1] = {};
      source.sum(r.part.low + i / r.channels, i % r.channels, one);
      put(columns + i, one, false);
    }
  }
  const int64_t phases = kToCoarse ? 1 : r.across->factor;
  T* const to = r.to + r.part.begin * phases * r.to_pixel;
  if constexpr (rounds) {
    add_up_row<kToCoarse, true>(Summed<A>{r.part, *r.across, r.channels, columns, results, r.channels});
    write_row(r, to, results, (r.part.end - r.part.begin) * phases);
  } else {
    add_up_row<kToCoarse, false>(Summed<A>{r.part, *r.across, r.channels, columns, to, r.to_pixel});
  }
}

template <bool kToCoarse, int kT, int kH, class T> inline void wide_row(const Row<T>& r) {
  const Columns<T, kT, kH, kToCoarse && kT != 0> columns(r);
  over_packs<Acc<T>>(r.channels, [&](auto strip, int64_t c) {
    walk<kToCoarse, typename decltype(strip)::type, decltype(strip)::packs>(r, columns, c);
  });
}

template <bool kToCoarse, class T> void weighed_row(const Row<T>& r) noexcept {
  if (r.channels < kPackWidth<Acc<T>>) return narrow_row<kToCoarse>(r);
  const int64_t t = r.t->count, h = r.h->count;
  if (t == 1 && h == 1) return wide_row<kToCoarse, 1, 1>(r);
  if (t == 1 && h == 2) return wide_row<kToCoarse, 1, 2>(r);
  if (t == 2 && h == 1) return wide_row<kToCoarse, 2, 1>(r);
  if (t == 2 && h == 2) return wide_row<kToCoarse, 2, 2>(r);
  if constexpr (kToCoarse) {  // going up there are two at most
    if (t == 1 && h == 3) return wide_row<kToCoarse, 1, 3>(r);
    if (t == 3 && h == 3) return wide_row<kToCoarse, 3, 3>(r);
    wide_row<kToCoarse, 0, 0>(r);
  }
}

// --- copies ----------------------------------------------------------------------------------------------------------

// N to 2 N bytes.
template <int N> inline void copy_ends(char* to, const char* from, int64_t n) {
  char first[N], last[N];
  memcpy(first, from, N), memcpy(last, from + n - N, N);
  memcpy(to, first, N), memcpy(to + n - N, last, N);
}

// No more than a vector of 64 bytes.
inline void copy_few(char* to, const char* from, int64_t n) {
  if (n >= 32) return copy_ends<32>(to, from, n);
  if (n >= 16) return copy_ends<16>(to, from, n);
  if (n >= 8) return copy_ends<8>(to, from, n);
  if (n >= 4) return copy_ends<4>(to, from, n);
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// Without a call of memcpy for each. Zeros, where there is nothing to copy.
template <bool kZeros> inline void write_pixel(char* to, const char* from, int64_t n, bool streams) {
  using P = Pack<float, kPackWidth<float>>;
  constexpr int64_t bytes = sizeof(P);
  const auto write = [&](int64_t i) {
    P packs[1] = {P::fill(0)};
    if constexpr (!kZeros) load(reinterpret_cast<const float*>(from + i), packs);
    put(reinterpret_cast<float*>(to + i), packs, streams);
  };
  int64_t i = 0;
  for (; i + bytes <= n; i += bytes) write(i);
  if (i == n) return;
  if (n > bytes) return write(n - bytes);
  if constexpr (kZeros) memset(to, 0, static_cast<size_t>(n));
  else copy_few(to, from, n);
}

// One channel. `from` is the row's first sample.
template <bool kToCoarse, int kFactor, bool kDense, class T>
inline void copy_alike(const Row<T>& r, const Alike<Acc<T>>& alike, const T* from, bool zero) {
  const int64_t factor = kFactor ? kFactor : r.across->factor;
  const int64_t pixel = kDense ? 1 : r.pixel, to_pixel = kDense ? 1 : r.to_pixel;
  const int64_t step = (kToCoarse ? factor : 1) * pixel, to_step = (kToCoarse ? 1 : factor) * to_pixel;
  const int64_t begin = alike.begin > r.part.begin ? alike.begin : r.part.begin;
  const int64_t n = (alike.end < r.part.end ? alike.end : r.part.end) - begin;
  T* const to = r.to + alike.first * to_pixel + begin * to_step;
  if (zero || alike.count == 0) {
    for (int64_t i = 0; i < n; ++i) to[i * to_step] = T{};
    return;
  }
  from += alike.sample * pixel + begin * step;
  for (int64_t i = 0; i < n; ++i) to[i * to_step] = from[i * step];
}

template <bool kToCoarse, int kFactor, bool kDense, class T>
inline void copy_elements(const Row<T>& r, const T* from, bool zero) {
  for (int64_t i = 0; i < r.across->size; ++i) {
    copy_alike<kToCoarse, kFactor, kDense>(r, r.across->list[i], from, zero);
  }
}

template <bool kToCoarse, class T> void copy_row(const Row<T>& r) noexcept {
  const T* const from = r.from + r.t->first * r.frame + r.h->first * r.row;
  const bool none = r.t->count == 0 || r.h->count == 0;
  if (r.channels < 2) {
    const bool dense = r.pixel == 1 && r.to_pixel == 1;
    if (dense && r.across->factor == 2) return copy_elements<kToCoarse, 2, true>(r, from, none);
    if (dense && r.across->factor == 4) return copy_elements<kToCoarse, 4, true>(r, from, none);
    return copy_elements<kToCoarse, 0, false>(r, from, none);
  }
  for (const auto *s = r.part.steps, *end = s + r.part.size; s != end; ++s) {
    const T* const sample = from + (kToCoarse ? s->fine : s->first) * r.pixel;
    T* const result = r.to + (kToCoarse ? s->first : s->fine) * r.to_pixel;
    const bool zero = none || s->count == 0;
    const int64_t size = r.channels * static_cast<int64_t>(sizeof(T));
    char* const to = reinterpret_cast<char*>(result);
    if (zero) write_pixel<true>(to, nullptr, size, r.streams);
    else write_pixel<false>(to, reinterpret_cast<const char*>(sample), size, r.streams);
  }
}

template <class T> inline ResampleKernels<T> resample_kernels() noexcept {
  return {weighed_row<true, T>, weighed_row<false, T>, copy_row<true, T>, copy_row<false, T>, end_streams,
          kMostPacks * kPackWidth<Acc<T>>};
}

}  // namespace
}  // namespace lf

#endif  // LF_COMMON_RESAMPLE_KERNEL_H
