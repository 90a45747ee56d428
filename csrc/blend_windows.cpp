// blend_windows on a CPU.
#include <algorithm>
#include <vector>

#include "blend_windows_run.h"
#include "common/cover.h"
#include "common/parallel.h"
#include "common/processor.h"
#include "common/runs.h"

namespace lf {

template <class T> void blend_run_portable(const Run<Acc<T>>& run) noexcept { blend_run<T>(run); }

namespace {

template <class T> using RunFunction = void (*)(const Run<Acc<T>>&) noexcept;

template <class T> RunFunction<T> run_function() {
#if defined(LF_WITH_AVX2)
  if (has_avx2()) return blend_run_avx2<T>;
#endif
  return blend_run_portable<T>;
}

template <class T> void blend(const Cover& cover, int64_t num_threads) {
  std::vector<Box> boxes;
  std::vector<int64_t> pieces{0};  // of the boxes before each box
  int64_t elements = 0;
  for (const Cell& cell : cover.cells) {
    boxes.push_back(whole(cover, cell));
    pieces.push_back(pieces.back() + boxes.back().pieces());
    elements += boxes.back().elements();
  }
  const int64_t threads = std::clamp<int64_t>(elements / elements_worth_a_thread(), 1, num_threads);
  const Clip out{cover.out, cover.element_size, cover.out_strides};
  std::vector<Walk<Acc<T>>> walks(threads, Walk<Acc<T>>(cover, {out}));
  const RunFunction<T> blend_one = run_function<T>();
  for_each_piece(pieces.back(), threads, [&](int64_t worker, int64_t piece) {
    const int64_t index = std::upper_bound(pieces.begin(), pieces.end(), piece) - pieces.begin() - 1;
    walks[worker].each_run(boxes[index], piece - pieces[index], pieces[index + 1] - pieces[index], blend_one);
  });
}

void blend(const Cover& cover, int64_t num_threads) {
  switch (cover.dtype) {
    case LF_FLOAT32: return blend<float>(cover, num_threads);
    case LF_FLOAT64: return blend<double>(cover, num_threads);
    case LF_FLOAT16: return blend<Half>(cover, num_threads);
    case LF_BFLOAT16: return blend<BFloat16>(cover, num_threads);
  }
}

}  // namespace
}  // namespace lf

lf_status lf_blend_windows_cpu(lf_dtype dtype, int64_t num_windows, const void* const* windows, const int64_t* shapes,
                               const int64_t* strides, int32_t axes, const int64_t* starts, const double* weights,
                               void* out, const int64_t* out_shape, const int64_t* out_strides,
                               int32_t num_threads) noexcept {
  return lf::guarded([&]() -> lf_status {
    lf::Cover cover;
    lf_status status = lf::plan_cover(
        {dtype, num_windows, windows, shapes, strides, axes, starts, weights, out, out_shape, out_strides}, cover);
    if (status == LF_OK) status = lf::check_apart_from_windows(cover, out, cover.out_strides, cover.element_size);
    if (status != LF_OK) return status;
    if (num_threads < 1) return LF_INVALID_ARGUMENT;
    if (!cover.empty()) lf::blend(cover, num_threads);
    return LF_OK;
  });
}
