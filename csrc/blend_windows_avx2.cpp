// Compiled for AVX2 and F16C; called only where the processor has them.
#include "blend_windows_run.h"

namespace lf {

template <class T> void blend_run_avx2(const Run<Acc<T>>& run) noexcept { blend_run<T>(run); }

template void blend_run_avx2<float>(const Run<float>&) noexcept;
template void blend_run_avx2<double>(const Run<double>&) noexcept;
template void blend_run_avx2<Half>(const Run<float>&) noexcept;
template void blend_run_avx2<BFloat16>(const Run<float>&) noexcept;

}  // namespace lf
