// Compiled for AVX-512 (F, BW, DQ, VL); called only where the processor has them.
#include "common/resample_kernel.h"

namespace lf {

template <class T> ResampleKernels<T> resample_kernels_avx512() noexcept { return resample_kernels<T>(); }

template ResampleKernels<float> resample_kernels_avx512() noexcept;
template ResampleKernels<double> resample_kernels_avx512() noexcept;
template ResampleKernels<Half> resample_kernels_avx512() noexcept;
template ResampleKernels<BFloat16> resample_kernels_avx512() noexcept;

}  // namespace lf
