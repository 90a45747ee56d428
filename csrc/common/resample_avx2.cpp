// Compiled for AVX2, FMA and F16C; called only where the processor has them.
#include "common/resample_kernel.h"

namespace lf {

template <class T> ResampleKernels<T> resample_kernels_avx2() noexcept { return resample_kernels<T>(); }

template ResampleKernels<float> resample_kernels_avx2() noexcept;
template ResampleKernels<double> resample_kernels_avx2() noexcept;
template ResampleKernels<Half> resample_kernels_avx2() noexcept;
template ResampleKernels<BFloat16> resample_kernels_avx2() noexcept;

}  // namespace lf
