// denoise_step along one run, in blocks that stay in the first-level cache. Two translation units include this file: one
// for any processor of the architecture, one for AVX2. No operation is reordered or contracted, so that both give the
// same numbers, and those of the reference.
#ifndef LF_DENOISE_STEP_RUN_H
#define LF_DENOISE_STEP_RUN_H

#include <type_traits>

#include "common/blocks.h"
#include "lumiere_fast.h"

namespace lf {

// The clips of a run, before its windows. What is not read may lie anywhere.
enum StepOperand { kNext, kX0, kLatent, kHistory, kNoise, kStepClips };

template <class A> struct StepSettings {
  lf_dtype window_dtype, dtype;
  int64_t window_size, size;  // bytes of an element
  bool guided;
  A guidance_scale;
  A x0_latent, x0_prediction, latent, x0;
  bool reads_history, reads_noise;
  A history, noise;
};

// |x0| as an integer that orders like it, NaN above all.
template <class A> using Key = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// Which elements of a video are counted.
template <class A> struct Count {
  Key<A> low, high;   // at most low; in (low, high]: these are kept; above
  int64_t every;      // of so many chunks only one is looked at; 1 for all elements
  int64_t chunk = 0;  // the next one's number
  int64_t above = 0;
  void (*keep)(void* where, const Key<A>* keys, int64_t n);
  void* where;
};

template <class A> struct StepKernels {
  // Writes the next latent and x0, bounded by `limit` (1 for a static threshold) where that is not null. `predicted`, if
  // not null, is x0 before that, and is written over.
  void (*step)(const Run<A>& run, const StepSettings<A>& of, const A* limit, A* predicted);
  // Writes x0, not bounded, without gaps.
  void (*predict)(const Run<A>& run, const StepSettings<A>& of, A* x0);
  void (*count)(const Run<A>& run, const StepSettings<A>& of, Count<A>& count);
  // The same of x0 as `predict` left it.
  void (*count_predicted)(const A* x0, int64_t n, Count<A>& count);
  // Of `n` keys the one in place `from_top`, from 1, of descending order.
  Key<A> (*select)(const Key<A>* keys, int64_t n, int64_t from_top);
};

template <class A> const StepKernels<A>& step_kernels_avx2() noexcept;

namespace {

constexpr int64_t kChunk = 64;  // elements that are looked at together where not all are

template <class T, class A> inline const A* load_as(const char* at, int64_t stride, int64_t n, A* room) {
  const T* const from = reinterpret_cast<const T*>(at);
  if constexpr (std::is_same_v<T, A>) {
    if (stride == 1) return from;
  }
  widen_block(room, from, stride, n);
  return room;
}

// Where a block can be read: where it lies, or in `room`.
template <class A> inline const A* load(lf_dtype dtype, const char* at, int64_t stride, int64_t n, A* room) {
  switch (dtype) {
    case LF_FLOAT64: return load_as<double>(at, stride, n, room);
    case LF_FLOAT16: return load_as<Half>(at, stride, n, room);
    case LF_BFLOAT16: return load_as<BFloat16>(at, stride, n, room);
    default: return load_as<float>(at, stride, n, room);
  }
}

template <class A> inline void store(lf_dtype dtype, char* at, int64_t stride, const A* from, int64_t n) {
  switch (dtype) {
    case LF_FLOAT64: return narrow_block(reinterpret_cast<double*>(at), stride, from, n);
    case LF_FLOAT16: return narrow_block(reinterpret_cast<Half*>(at), stride, from, n);
    case LF_BFLOAT16: return narrow_block(reinterpret_cast<BFloat16*>(at), stride, from, n);
    default: return narrow_block(reinterpret_cast<float*>(at), stride, from, n);
  }
}

// x0 from the two halves of a guided prediction.
template <class A>
inline void combine_guided(A* __restrict x0, A a, const A* __restrict latent, A b, const A* __restrict conditional,
                           const A* __restrict unconditional, A scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A prediction = unconditional[i] + scale * (conditional[i] - unconditional[i]);
    x0[i] = a * latent[i] + b * prediction;
  }
}

template <class A>
inline void combine(A* __restrict sum, A a, const A* __restrict x, A b, const A* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = a * x[i] + b * y[i];
}

template <class A> inline void add(A* __restrict sum, A a, const A* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = sum[i] + a * x[i];
}

// A NaN stays one.
template <class A> inline void bound(A* x, A limit, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A raised = x[i] < -limit ? -limit : x[i];
    x[i] = raised > limit ? limit : raised;
  }
  if (limit == 1) return;
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] / limit;
}

// One block of a run, from its element `begin`.
template <class A> class StepBlock {
 public:
  StepBlock(const Run<A>& run, const StepSettings<A>& of, int64_t begin, int64_t n)
      : run_(run), of_(of), begin_(begin), n_(n) {}

  const A* clip(StepOperand operand, A* room) const {
    return load(of_.dtype, at(operand, of_.size), run_.strides[operand], n_, room);
  }

  void write(StepOperand operand, const A* from) const {
    store(of_.dtype, at(operand, of_.size), run_.strides[operand], from, n_);
  }

  // Before it is bounded.
  void predict_x0(const A* latent, A* x0) const {
    A room[kBlock], other[kBlock];
    const A* const prediction = blended(0, room);
    if (of_.guided) {
      combine_guided(x0, of_.x0_latent, latent, of_.x0_prediction, prediction, blended(1, other), of_.guidance_scale,
                     n_);
    } else {
      combine(x0, of_.x0_latent, latent, of_.x0_prediction, prediction, n_);
    }
  }

 private:
  char* at(int64_t operand, int64_t size) const { return run_.at[operand] + begin_ * run_.strides[operand] * size; }

  const A* blended(int64_t half, A* mean) const {
    return blend_block(run_, begin_, n_, mean, [&](int64_t k, A* room) {
      const int64_t operand = kStepClips + half * run_.num_parts + k;
      return load(of_.window_dtype, at(operand, of_.window_size), run_.strides[operand], n_, room);
    });
  }

  const Run<A>& run_;
  const StepSettings<A>& of_;
  const int64_t begin_, n_;
};

template <class A> void step_run(const Run<A>& run, const StepSettings<A>& of, const A* limit, A* predicted) {
  A room[kBlock], x0_room[kBlock], next[kBlock];
  for (int64_t begin = 0; begin < run.length; begin += kBlock) {
    const int64_t n = run.length - begin < kBlock ? run.length - begin : kBlock;
    const StepBlock<A> block(run, of, begin, n);
    const A* const latent = block.clip(kLatent, room);
    A* const x0 = predicted ? predicted + begin : x0_room;
    if (!predicted) block.predict_x0(latent, x0);
    if (limit) bound(x0, *limit, n);
    combine(next, of.latent, latent, of.x0, x0, n);
    if (of.reads_history) add(next, of.history, block.clip(kHistory, room), n);
    if (of.reads_noise) add(next, of.noise, block.clip(kNoise, room), n);
    // Each of them may lie where one was read: all that is needed of the block has been.
    block.write(kNext, next);
    block.write(kX0, x0);
  }
}

template <class A> void predict_run(const Run<A>& run, const StepSettings<A>& of, A* x0) {
  A room[kBlock];
  for (int64_t begin = 0; begin < run.length; begin += kBlock) {
    const int64_t n = run.length - begin < kBlock ? run.length - begin : kBlock;
    const StepBlock<A> block(run, of, begin, n);
    block.predict_x0(block.clip(kLatent, room), x0 + begin);
  }
}

inline int32_t key_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & INT32_MAX;
}

inline int64_t key_of(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & INT64_MAX;
}

// Which keys are to be kept is as good as random: a branch on it would be mistaken each time. Of `n` keys those in
// (low, high] go to `kept`, which has room for kLanes more. Returns their number; `above` are over `high`.
template <class K> inline int64_t keep_keys(const K* keys, int64_t n, K low, K high, K* kept, int64_t& above) {
  int64_t num_kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    kept[num_kept] = keys[i];
    num_kept += keys[i] > low && keys[i] <= high;
    above += keys[i] > high;
  }
  return num_kept;
}

constexpr int64_t kLanes = 8;

#if defined(__AVX2__) && defined(__F16C__)
// For each set of lanes, their numbers one after the other, a byte each.
struct Packing {
  uint64_t lanes[1 << kLanes];

  constexpr Packing() : lanes{} {
    for (int set = 0; set < 1 << kLanes; ++set) {
      for (int lane = 0, at = 0; lane < kLanes; ++lane) {
        if (set >> lane & 1) lanes[set] |= static_cast<uint64_t>(lane) << 8 * at++;
      }
    }
  }
};
constexpr Packing kPacking;

inline int lanes_of(__m256i mask) { return _mm256_movemask_ps(_mm256_castsi256_ps(mask)); }

template <>
inline int64_t keep_keys(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* kept, int64_t& above) {
  const __m256i least = _mm256_set1_epi32(low), most = _mm256_set1_epi32(high);
  int64_t num_kept = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    const __m256i over = _mm256_cmpgt_epi32(key, most);
    const int set = lanes_of(_mm256_andnot_si256(over, _mm256_cmpgt_epi32(key, least)));
    const __m128i order = _mm_cvtsi64_si128(static_cast<int64_t>(kPacking.lanes[set]));
    const __m256i packed = _mm256_permutevar8x32_epi32(key, _mm256_cvtepu8_epi32(order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept + num_kept), packed);
    num_kept += __builtin_popcount(set);
    above += __builtin_popcount(lanes_of(over));
  }
  for (; i < n; ++i) {
    kept[num_kept] = keys[i];
    num_kept += keys[i] > low && keys[i] <= high;
    above += keys[i] > high;
  }
  return num_kept;
}
#endif

template <class A> void count_block(const A* x0, int64_t n, Count<A>& count) {
  Key<A> keys[kBlock], kept[kBlock + kLanes];
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(x0[i]);
  const int64_t num_kept = keep_keys(keys, n, count.low, count.high, kept, count.above);
  if (num_kept > 0) count.keep(count.where, kept, num_kept);
}

template <class K> inline int64_t count_over(const K* keys, int64_t n, K low) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = n - begin < kBlock ? n : begin + kBlock;
    K some = 0;  // as wide as a key, for the compiler's sake
    for (int64_t i = begin; i < end; ++i) some += keys[i] > low ? 1 : 0;
    count += some;
  }
  return count;
}

// The key in place `from_top`, from 1, of descending order: the least that fewer others are above. It is found by halving
// the range that it lies in, since counting takes no branches.
template <class K> K select_key(const K* keys, int64_t n, int64_t from_top) {
  K low = keys[0], high = keys[0];
  for (int64_t i = 0; i < n; ++i) low = keys[i] < low ? keys[i] : low;
  for (int64_t i = 0; i < n; ++i) high = keys[i] > high ? keys[i] : high;
  while (low < high) {
    const K middle = low + (high - low) / 2;
    count_over(keys, n, middle) < from_top ? high = middle : low = middle + 1;
  }
  return low;
}

// Counts among `length` elements; x0(begin, n) is where a part of them can be read.
template <class A, class X0> inline void count_among(int64_t length, Count<A>& count, const X0& x0) {
  const int64_t size = count.every == 1 ? kBlock : kChunk;
  for (int64_t begin = 0; begin < length; begin += size) {
    if (count.chunk++ % count.every != 0) continue;
    const int64_t n = length - begin < size ? length - begin : size;
    count_block(x0(begin, n), n, count);
  }
}

template <class A> void count_run(const Run<A>& run, const StepSettings<A>& of, Count<A>& count) {
  A room[kBlock], x0[kBlock];
  count_among(run.length, count, [&](int64_t begin, int64_t n) -> const A* {
    const StepBlock<A> block(run, of, begin, n);
    block.predict_x0(block.clip(kLatent, room), x0);
    return x0;
  });
}

template <class A> void count_predicted(const A* x0, int64_t n, Count<A>& count) {
  count_among(n, count, [&](int64_t begin, int64_t) { return x0 + begin; });
}

template <class A> constexpr StepKernels<A> kStepKernels = {step_run<A>, predict_run<A>, count_run<A>,
                                                           count_predicted<A>, select_key<Key<A>>};

}  // namespace
}  // namespace lf

#endif  // LF_DENOISE_STEP_RUN_H
