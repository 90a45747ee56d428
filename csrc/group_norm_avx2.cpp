// Compiled for AVX2, FMA and F16C; called only where the processor has them.
#include "group_norm_kernels.h"

namespace lf {

template <class T> const NormKernels<T>& norm_kernels_avx2() noexcept { return kNormKernels<T>; }

template const NormKernels<float>& norm_kernels_avx2() noexcept;
template const NormKernels<double>& norm_kernels_avx2() noexcept;
template const NormKernels<Half>& norm_kernels_avx2() noexcept;
template const NormKernels<BFloat16>& norm_kernels_avx2() noexcept;

}  // namespace lf
