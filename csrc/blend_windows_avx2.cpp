// Compiled for AVX2 and F16C; called only where the processor has them.
#include "blend_windows_run.h"

namespace lf {

template <class T> void blend_run_avx2(const Run<T>& run) noexcept { blend_run(run); }

template void blend_run_avx2(const Run<float>&) noexcept;
template void blend_run_avx2(const Run<double>&) noexcept;
template void blend_run_avx2(const Run<Half>&) noexcept;
template void blend_run_avx2(const Run<BFloat16>&) noexcept;

}  // namespace lf
