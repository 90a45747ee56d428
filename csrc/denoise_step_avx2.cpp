// Compiled for AVX2 and F16C; called only where the processor has them.
#include "denoise_step_run.h"

namespace lf {

template <class A> const StepKernels<A>& step_kernels_avx2() noexcept { return kStepKernels<A>; }

template const StepKernels<float>& step_kernels_avx2() noexcept;
template const StepKernels<double>& step_kernels_avx2() noexcept;

}  // namespace lf
