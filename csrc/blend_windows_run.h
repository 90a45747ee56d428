// One run of the output from the windows that cover it. Two translation units include this file: one for any processor
// of the architecture, one for AVX2; both give the same numbers.
#ifndef LF_BLEND_WINDOWS_RUN_H
#define LF_BLEND_WINDOWS_RUN_H

#include "common/blocks.h"

namespace lf {

// The run's operands are the output and the windows, of type T.
template <class T> void blend_run_portable(const Run<Acc<T>>& run) noexcept;
template <class T> void blend_run_avx2(const Run<Acc<T>>& run) noexcept;

namespace {

// What one window alone covers is its own, bit for bit.
template <class T> inline void copy_run(T* out, int64_t out_stride, const T* from, int64_t stride, int64_t length) {
  if (out_stride == 1 && stride == 1) {
    std::memcpy(out, from, length * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < length; ++i) out[i * out_stride] = from[i * stride];
}

// Two windows that need no conversion, by far the commonest overlap: in one pass and without a stop in between.
template <class T> inline bool blend_pair_in_place(const Run<Acc<T>>&) { return false; }
template <class A> inline bool blend_pair_of(const Run<A>& run) {
  const auto at = [&](int64_t operand) { return reinterpret_cast<A*>(run.at[operand]); };
  if (run.num_parts != 2 || run.share_stride != 0) return false;
  if (run.strides[0] != 1 || run.strides[1] != 1 || run.strides[2] != 1) return false;
  blend_pair(at(0), run.shares[1], at(2), at(1), run.length);
  return true;
}
template <> inline bool blend_pair_in_place<float>(const Run<float>& run) { return blend_pair_of(run); }
template <> inline bool blend_pair_in_place<double>(const Run<double>& run) { return blend_pair_of(run); }

template <class T> inline void blend_run(const Run<Acc<T>>& run) {
  T* const out = reinterpret_cast<T*>(run.at[0]);
  const auto part = [&](int64_t k) { return reinterpret_cast<const T*>(run.at[1 + k]); };
  if (run.num_parts == 1) return copy_run(out, run.strides[0], part(0), run.strides[1], run.length);
  if (blend_pair_in_place<T>(run)) return;
  Acc<T> mean[kBlock];
  for (int64_t begin = 0; begin < run.length; begin += kBlock) {
    const int64_t n = run.length - begin < kBlock ? run.length - begin : kBlock;
    blend_block(run, begin, n, mean, [&](int64_t k, Acc<T>* room) {
      const int64_t stride = run.strides[1 + k];
      widen_block(room, part(k) + begin * stride, stride, n);
      return room;
    });
    narrow_block(out + begin * run.strides[0], run.strides[0], mean, n);
  }
}

}  // namespace
}  // namespace lf

#endif  // LF_BLEND_WINDOWS_RUN_H
